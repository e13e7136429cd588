#!/usr/bin/env bash
# Environment and tests: bash tests/run.sh [--python VERSION] [--slurm | --gpu] [pytest options]
#
#   --gpu           instead, the tests that need a GPU, with Transformer Engine; where no environment can be made, run
#                   `python -m pytest -m gpu` with whatever is there
#   --slurm         instead, the batch scripts on a real Slurm of two nodes on this machine (as root, on Debian; it is installed if
#                   missing); all of its scenarios with --slurm -m slurm
#   --python 3.12   another interpreter, in an environment of its own: Megatron-Core's newer line (a large download)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --python ]; then
  version=$2
  shift 2
  PYTHON=python$version
  if ! "$PYTHON" -c '' 2>/dev/null && command -v pyenv >/dev/null; then # pyenv hides versions that are not selected
    PYTHON=$(pyenv prefix "$(pyenv latest "$version" 2>/dev/null)" 2>/dev/null)/bin/python
  fi
  "$PYTHON" -c '' 2>/dev/null || { echo "there is no Python $version here." >&2; exit 2; }
  export PYTHON VENV=$PWD/.venv-$version
fi
source launch/environment.sh
if [ "${1:-}" = --gpu ]; then
  make_environment "[test,gpu]"
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no GPU here." >&2; exit 2; }
  "$python" tools/doctor.py
  set -- -m gpu -s -rs "${@:2}"
else
  make_environment "[test]"
fi
export OMP_NUM_THREADS=1
[ "${1:-}" != --slurm ] || set -- tests/slurm -m "slurm and not long" "${@:2}"
exec "$python" -m pytest "$@"
