#!/usr/bin/env bash
# Environment and tests: bash tests/run.sh [--python VERSION] [--gpu] [pytest options]
#
#   --python 3.12   another interpreter, in an environment of its own: Megatron-Core's newer line (a large download)
#   --gpu           only the tests that need a CUDA device
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
marks=(-m "not gpu")
while [ $# -gt 0 ]; do
  case $1 in
    --python)
      version=$2
      shift 2
      export VENV=$PWD/.venv-$version
      PYTHON=$(command -v "python$version" || true)
      if ! "${PYTHON:-false}" -c '' 2>/dev/null && command -v pyenv >/dev/null; then
        PYTHON=$(pyenv root)/versions/$(pyenv versions --bare | grep "^${version//./\\.}" | tail -n 1)/bin/python
      fi
      export PYTHON
      ;;
    --gpu) marks=(-m gpu) && shift ;;
    *) break ;;
  esac
done
source launch/environment.sh
make_environment "[test]"
export OMP_NUM_THREADS=1
exec "$python" -m pytest "${marks[@]}" "$@"
