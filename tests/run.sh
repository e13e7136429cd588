#!/usr/bin/env bash
# Create the environment and run tests: bash tests/run.sh [--python VERSION] [--megatron VERSION] [SET] [pytest options]
#
#   SET is one of
#     (none)        the default set, 7 to 8 minutes on two cores
#     --fast        only tests that start no job and no command, 4 minutes
#     --all         the slow ones too, as in CI
#     --slurm       the batch scripts on a two-node Slurm on this machine (as root, on Debian; installed if missing);
#                   add -m slurm for the long scenarios
#     --gpu         the tests that need a GPU, with Transformer Engine; if no environment can be created, run
#                   `python -m pytest -m gpu` with what is installed
#     --te          the tests that need Transformer Engine, but no GPU: with the one that is installed, or one in the directory
#                   $IWSFT_TE (default .transformer-engine), a site directory or archives of one (*.tar.xz); skipped if there is none
#
#   With pytest-xdist two tests run at a time (IWSFT_TEST_WORKERS), except for --slurm and --gpu. -n0 runs one at a time, and -s and --pdb
#   need it.
#
#   --python 3.12   another interpreter, in a separate environment: for newer Megatron-Core versions (a large download)
#   --megatron V    another Megatron-Core version, installed beside that environment
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --python ]; then
  version=$2
  shift 2
  PYTHON=python$version
  if ! "$PYTHON" -c '' 2>/dev/null && command -v pyenv >/dev/null; then # pyenv hides versions that are not selected
    PYTHON=$(pyenv prefix "$(pyenv latest "$version" 2>/dev/null)" 2>/dev/null)/bin/python
  fi
  "$PYTHON" -c '' 2>/dev/null || { echo "Python $version is not installed." >&2; exit 2; }
  export PYTHON VENV=$PWD/.venv-$version
fi
megatron=
[ "${1:-}" != --megatron ] || { megatron=$2; shift 2; }
source launch/environment.sh
workers=(-n "${IWSFT_TEST_WORKERS:-2}")
if [ "${1:-}" = --gpu ]; then
  make_environment "[test]"
  add_transformer_engine
  [ "${IWSFT_DEVICE:-}" = cpu ] || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no GPU here." >&2; exit 2; }
  "$python" tools/doctor.py || true
  set -- -m gpu -s -rs --continue-on-collection-errors "${@:2}" && workers=()
else
  make_environment "[test]"
fi
if [ -n "$megatron" ]; then
  overlay=$VENV/megatron-core-$megatron
  [ -d "$overlay/megatron" ] || "$python" -m pip install --quiet --no-deps --target "$overlay" "megatron-core==$megatron"
  export PYTHONPATH=$overlay${PYTHONPATH:+:$PYTHONPATH}
fi
if [ "${1:-}" = --te ] && ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("transformer_engine") is None)'; then
  bundle=${IWSFT_TE:-$PWD/.transformer-engine} archives=()
  for archive in "$bundle"/*.tar.xz; do [ ! -f "$archive" ] || archives+=("$archive"); done
  if [ ${#archives[@]} -gt 0 ]; then
    bundle=$VENV/transformer-engine
    found=$(stat -c '%n %s %Y' "${archives[@]}")
    if [ ! -d "$bundle" ] || [ "$found" != "$(cat "$bundle.archives" 2>/dev/null)" ]; then
      rm -rf "$bundle" "$bundle.partial" && mkdir "$bundle.partial"
      for archive in "${archives[@]}"; do tar xJf "$archive" -C "$bundle.partial"; done
      mv "$bundle.partial" "$bundle" && printf '%s\n' "$found" >"$bundle.archives"
    fi
  fi
  [ -d "$bundle/transformer_engine" ] || { echo "skipped: no Transformer Engine is installed, and none is in $bundle."; exit 0; }
  export PYTHONPATH=$bundle${PYTHONPATH:+:$PYTHONPATH}
fi
export OMP_NUM_THREADS=1
"$python" -c 'import xdist' 2>/dev/null || workers=()
case ${1:-} in
  --fast) set -- -m "not parallel and not command and not slow and not exhaustive and not slurm and not gpu" "${@:2}" ;;
  --all) set -- -m "not slurm and not gpu" "${@:2}" ;;
  --te) set -- -m te "${@:2}" ;;
  --slurm) set -- tests/slurm -m "slurm and not long" "${@:2}" && workers=() ;;
esac
exec "$python" -m pytest ${workers[@]+"${workers[@]}"} "$@"
