# Sourced by the other scripts: a virtual environment with offmoe and its dependencies, made once and remade when they
# change. $versions chooses which: pinned (constraints.txt, into .venv; the default), lowest (the lower bounds of
# pyproject.toml, into .venv-lowest) or newest (whatever pip finds today, into .venv-newest).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
versions="${versions:-pinned}"
venv=.venv
if [ "$versions" != pinned ]; then venv=".venv-$versions"; fi
stamp="$(cat pyproject.toml constraints.txt scripts/bounds.py | cksum)"
if [ "$versions" = newest ]; then stamp="$stamp $(date -u +%F)"; fi
# A line every ten seconds while a command runs: what it does and for how long.
with_beat() {
  local what="$1" begin=$SECONDS beat status=0
  shift
  (while sleep 10; do echo "$what: $((SECONDS - begin)) s, $(du -sm "$venv" 2>/dev/null | cut -f1) MB in $venv" >&2; done) &
  beat=$!
  "$@" || status=$?
  kill "$beat" 2>/dev/null || true
  wait "$beat" 2>/dev/null || true
  return "$status"
}
kernels="$(find setup.py scripts/kernels_build.py offmoe/kernels/cpu/src -type f | LC_ALL=C sort | xargs cat | cksum)"
if [ "$(cat "$venv/.stamp" 2>/dev/null || true)" != "$stamp" ]; then
  python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "offmoe needs Python 3.10 or newer, $python is $("$python" -V); set PYTHON=/path/to/python" >&2
    exit 2
  }
  echo "installing into $venv (a few minutes the first time)" >&2
  "$python" -m venv "$venv"
  # Few releases of torch have a CPU wheel on PyPI, the others bring CUDA: some 7 GB on disk. Elsewhere
  # PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes pip take small ones.
  case "$versions" in
    pinned) pins=(-c constraints.txt -e '.[test,check]') ;;
    lowest) "$python" scripts/bounds.py >"$venv/lowest.txt"; pins=(-c "$venv/lowest.txt" -e '.[test]') ;;
    newest) pins=(--upgrade --upgrade-strategy eager -e '.[test]') ;;
    *) echo "versions is $versions; known: pinned, lowest, newest" >&2; exit 2 ;;
  esac
  with_beat "installing" "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${pins[@]}"
  echo "$stamp" >"$venv/.stamp"
  for library in offmoe/kernels/cpu/_kernels*; do  # pip has just built it
    if [ "$library" -nt "$venv/pyvenv.cfg" ]; then echo "$kernels" >"$venv/.kernels"; fi
  done
fi
if [ "$(cat "$venv/.kernels" 2>/dev/null || true)" != "$kernels" ]; then
  echo "building the CPU kernels (a minute)" >&2
  build_kernels() {
    "$venv/bin/python" setup.py build_ext --inplace 2>&1 | tee "$venv/kernels.log" | { grep --line-buffered "^compiled" >&2 || true; }
  }
  with_beat "building the CPU kernels" build_kernels || echo "not built, see $venv/kernels.log" >&2
  echo "$kernels" >"$venv/.kernels"
fi
export PATH="$PWD/$venv/bin:$PATH"
