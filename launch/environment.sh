# Sourced by launch/quickstart.sh, launch/local.sh and tests/run.sh: create or reuse a virtual environment in the repository root.
#
#   make_environment [EXTRAS]    reads PYTHON (an interpreter; default python3) and VENV (default .venv); sets $python
#
# Packages are installed again only when pyproject.toml or constraints.txt changes. An environment with extras is reused without them.

make_environment() {
  local extras=${1:-} root stamp log
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
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
  local stamps=("$stamp") candidate current=''
  [ -n "$extras" ] || stamps=("$VENV"/installed*)
  for candidate in "${stamps[@]}"; do
    ! cat "$root/pyproject.toml" "$root/constraints.txt" | cmp -s - "$candidate" || current=yes
  done
  if [ -z "$current" ]; then
    echo "installing packages (log: $log)"
    "$python" -m pip install --quiet --editable "$root$extras" --constraint "$root/constraints.txt" >"$log" 2>&1 || {
      tail -n 20 "$log" >&2
      echo "installation failed; full log: $log" >&2
      return 1
    }
    cat "$root/pyproject.toml" "$root/constraints.txt" >"$stamp"
  fi
}
