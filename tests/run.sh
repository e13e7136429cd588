#!/usr/bin/env bash
# Environment and tests: bash tests/run.sh [--python VERSION] [--slurm] [pytest options]
#
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
make_environment "[test]"
export OMP_NUM_THREADS=1
[ "${1:-}" != --slurm ] || set -- tests/slurm -m "slurm and not long" "${@:2}"
exec "$python" -m pytest "$@"
