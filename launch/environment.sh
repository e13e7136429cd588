# Sourced by launch/quickstart.sh, launch/local.sh, tests/run.sh and .ci/lint: find or create a Python environment.
#
#   make_environment [EXTRAS]    sets $python
#   add_transformer_engine       then builds Transformer Engine there, the version of the extra `gpu`, unless it is installed
#
#   IWSFT_PYTHON       the interpreter of an environment to use as it is (a container's, a cluster module's): nothing is installed
#   VENV, PYTHON       else a virtual environment (default: .venv in the repository root), created with this interpreter (default: python3)
#                      Without VENV and EXTRAS, an active environment into which you have installed the package yourself is used as it is.
#   IWSFT_CONSTRAINTS  versions to install; CI's are in constraints.txt. Without it, any that pyproject.toml allows
#
# Packages are installed again only when pyproject.toml or the constraints change. An environment with extras is reused without them.

make_environment() {
  local extras=${1:-} root stamp log lazily=()
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if [ -n "${IWSFT_PYTHON:-}" ]; then
    python=$IWSFT_PYTHON
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "IWSFT_PYTHON must be an interpreter of Python 3.11 or newer; found $IWSFT_PYTHON." >&2
      return 1
    }
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    "$python" -W ignore -c 'import torch, megatron.core, megatron_iwsft.cli.main' >/dev/null || {
      echo "$IWSFT_PYTHON lacks packages that are needed (see above). Install them there, or unset IWSFT_PYTHON to create an environment." >&2
      return 1
    }
    return 0
  fi
  if [ -z "$extras" ]; then
    local own candidates=(${VIRTUAL_ENV:+"$VIRTUAL_ENV"} ${CONDA_PREFIX:+"$CONDA_PREFIX"} "$root/.venv")
    [ -z "${VENV:-}" ] || candidates=("$VENV")
    for own in "${candidates[@]}"; do
      python=$own/bin/python
      if [ -x "$own/bin/iwsft" ] && ! compgen -G "$own/installed*" >/dev/null; then return 0; fi
    done
  fi
  VENV=${VENV:-$root/.venv}
  python=$VENV/bin/python
  stamp=$VENV/installed$extras
  log=$VENV/install.log
  if [ ! -x "$python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "Python 3.11 or newer is required; set PYTHON=/path/to/python." >&2
      return 1
    }
    echo "creating the environment $VENV"
    "${PYTHON:-python3}" -m venv "$VENV" || { echo "python -m venv failed; on Debian, install python3-venv." >&2; return 1; }
  fi
  if ! is_installed "$extras"; then
    echo "installing packages (log: $log)"
    [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || lazily=(--no-compile) # most modules are never imported
    "$python" -m pip install ${lazily[@]+"${lazily[@]}"} --editable "$root$extras" ${IWSFT_CONSTRAINTS:+--constraint "$IWSFT_CONSTRAINTS"} 2>&1 |
      tee "$log" | show_installation || {
      tail -n 20 "$log" >&2
      echo "installation failed; full log: $log" >&2
      return 1
    }
    cat "$root/pyproject.toml" ${IWSFT_CONSTRAINTS:+"$IWSFT_CONSTRAINTS"} >"$stamp"
  fi
}

# Of pip's output, what takes long. With `set -o pipefail`, a pipeline that ends in it has pip's exit status.
show_installation() {
  local word rest
  while read -r word rest; do
    case $word in
      Downloading) case $rest in *" MB)"*) echo "  downloading $rest" ;; esac ;;
      Installing) case $rest in "collected packages:"*) echo "  unpacking, a minute or two" ;; esac ;;
    esac
  done
}

add_transformer_engine() {
  local requirement
  "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("transformer_engine") is None)' && return 0
  [ -z "${IWSFT_PYTHON:-}" ] || return 0 # nothing is installed there
  requirement=$("$python" -c 'import sys, tomllib; print(tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"]["gpu"][0])' \
    "$(dirname "${BASH_SOURCE[0]}")/../pyproject.toml")
  echo "building $requirement"
  # With build isolation pip would build it against another torch, downloaded for the build: docs/gpu.md.
  "$python" -m pip install --quiet --no-build-isolation "$requirement"
}

# is_installed EXTRAS: whether $VENV was installed from this pyproject.toml (and these constraints, if there are any) with these extras.
is_installed() {
  local candidate candidates=("$VENV/installed$1")
  case $1 in
    '') candidates=("$VENV"/installed*) ;;
    '[report]') candidates+=("$VENV"/installed*test* "$VENV"/installed*dev*) ;; # which have it, too
    '[test]') candidates+=("$VENV"/installed*dev*) ;;
  esac
  for candidate in "${candidates[@]}"; do
    [ -f "$candidate" ] || continue
    if [ -n "${IWSFT_CONSTRAINTS:-}" ]; then
      cat "$root/pyproject.toml" "$IWSFT_CONSTRAINTS" | cmp -s - "$candidate" && return 0
    else
      head -c "$(wc -c <"$root/pyproject.toml")" "$candidate" | cmp -s - "$root/pyproject.toml" && return 0
    fi
  done
  return 1
}
