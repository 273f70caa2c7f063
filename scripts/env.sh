# Sourced by the other scripts: a .venv with offmoe and its pinned dependencies, made once and remade when they change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp="$(cat pyproject.toml constraints.txt | cksum)"
if [ "$(cat .venv/.stamp 2>/dev/null || true)" != "$stamp" ]; then
  python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "offmoe needs Python 3.10 or newer, $python is $("$python" -V); set PYTHON=/path/to/python" >&2
    exit 2
  }
  echo "installing into .venv (a few minutes the first time)" >&2
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
  echo "$stamp" >.venv/.stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
