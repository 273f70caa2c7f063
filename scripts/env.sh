# Sourced by the other scripts: a .venv with offmoe and its pinned dependencies, made once and remade when they change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp="$(cat pyproject.toml constraints.txt | cksum)"
kernels="$(cat setup.py offmoe/kernels/cpu/src/* | cksum)"
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
  for library in offmoe/kernels/cpu/_kernels*; do  # pip has just built it
    if [ "$library" -nt .venv/pyvenv.cfg ]; then echo "$kernels" >.venv/.kernels; fi
  done
fi
if [ "$(cat .venv/.kernels 2>/dev/null || true)" != "$kernels" ]; then
  echo "building the CPU kernels (a minute)" >&2
  .venv/bin/python setup.py -q build_ext --inplace >.venv/kernels.log 2>&1 || echo "not built, see .venv/kernels.log" >&2
  echo "$kernels" >.venv/.kernels
fi
export PATH="$PWD/.venv/bin:$PATH"
