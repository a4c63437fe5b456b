#!/usr/bin/env bash
# Tries the wheel in dist/ (scripts/build_wheel.sh makes it) in fresh environments: what it holds, then the ops, the
# tests of the core, `doctor` and `params` with several torch releases and the base dependencies, then, with all extras
# (EXTRAS=OFF leaves that out), the whole method at its smallest scale.
#
#   bash scripts/check_wheel.sh [TORCH_RELEASE ...]        default: 2.13.0 2.12.0
#
# torch is installed without its CUDA libraries, which take gigabytes and are not what is checked. A CUDA build of
# torch does not load without them; then empty stand-ins take their place, and the output says so: such a check covers
# torch's CPU side only. The extras are tried with the first release. PYTHON chooses the interpreter.
set -euo pipefail

cd "$(dirname "$0")/.."
repository=$PWD
python=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
releases=("$@")
[ ${#releases[@]} -gt 0 ] || releases=(2.13.0 2.12.0)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\n== %s\n' "$*"; }

fail() { printf 'check_wheel: error: %s\n' "$*" >&2; exit 1; }

wheel=$(ls "$PWD"/dist/subspace3d-*.whl 2>/dev/null) || fail "no wheel in dist/; make wheel builds one"

check_content() {
  say "what is in $(basename "$wheel")"
  "$python" -m zipfile -e "$wheel" "$work/content"
  local module needed package
  module=$(ls "$work"/content/subspace_ext/_C*.so)
  needed=$(readelf -d "$module" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
  echo "_C needs" $needed
  ! grep -qE '^lib(torch|c10|cuda|cudart|cublas)' <<<"$needed" || fail "_C must name neither torch nor a CUDA library"
  ! readelf -S "$module" | grep '\.symtab' || fail "_C must be stripped"
  for package in subspace_ext subspace3d; do
    [ -e "$work/content/$package/py.typed" ] || fail "$package/py.typed is missing"
  done
  for file in LICENSE $(cd "$repository" && ls notices/*); do
    cmp -s "$repository/$file" "$work"/content/subspace3d-*.dist-info/licenses/"$file" || fail "$file is missing or old"
  done
  cmp -s "$repository/python/subspace3d/backbones/vggt_nano.safetensors" \
    "$work/content/subspace3d/backbones/vggt_nano.safetensors" || fail "the weights are not those of the repository"
  "$python" "$repository/scripts/wheel_size.py" "$wheel"
}

# Empty libraries under the names that torch's own libraries look for and do not find, and one library with every CUDA
# function they need before it is called; each returns the error code 999.
make_stand_ins() {
  local libraries=$1 out=$2 name
  mkdir -p "$out"
  { for file in "$libraries"/*.so*; do ldd "$file"; done } 2>/dev/null | awk '/not found/ {print $1}' | sort -u |
    while read -r name; do gcc -shared -x c /dev/null -o "$out/$name" -Wl,-soname,"$name"; done
  nm -D --undefined-only "$libraries"/*.so* 2>/dev/null | awk '$2 ~ /^(cu|nv|nccl|__cuda)/ {sub(/@.*/, "", $2); print $2}' |
    sort -u | awk '{print "int " $1 "(void) { return 999; }"}' >"$out/functions.c"
  gcc -shared -w -x c "$out/functions.c" -o "$out/functions.so"
}

try_release() {
  local release=$1 environment="$work/torch-$1" note=""
  say "torch $release"
  "$python" -m venv "$environment"
  "$environment/bin/pip" install --quiet --no-deps "torch==$release"
  "$environment/bin/pip" install --quiet --no-deps "$wheel"
  "$environment/bin/pip" install --quiet numpy filelock typing-extensions sympy networkx jinja2 fsspec 'setuptools>=77,<82'
  "$environment/bin/pip" install --quiet safetensors pyyaml tyro tqdm packaging
  local run=(env CUDA_VISIBLE_DEVICES= "$environment/bin/python")
  if ! (cd "$work" && "${run[@]}" -c 'import torch') 2>/dev/null; then
    make_stand_ins "$(echo "$environment"/lib/python3*/site-packages/torch/lib)" "$environment/stand_ins"
    run=(env CUDA_VISIBLE_DEVICES= LD_LIBRARY_PATH="$environment/stand_ins"
      LD_PRELOAD="$environment/stand_ins/functions.so" "$environment/bin/python")
    note=", a CUDA build with stand-ins for its CUDA libraries"
  fi
  # outside the repository, so that nothing but the wheel can be imported
  "$environment/bin/pip" install --quiet pytest pytest-timeout
  mkdir -p "$work/tests"
  cp -r "$repository/tests" "$repository/pyproject.toml" "$work/tests"
  # emulated kernels are skipped: the sources are not there
  (cd "$work/tests" && "${run[@]}" -m pytest -q -o pythonpath=tests -p no:cacheprovider tests/core | tail -n 4)
  (cd "$work" && "${run[@]}" -W ignore::UserWarning "$repository/scripts/try_wheel.py")
  (cd "$work" && "${run[@]}" -W ignore::UserWarning -m subspace3d doctor)
  (cd "$work" && "${run[@]}" -W ignore::UserWarning -m subspace3d params --backbone vggt-1b --method lora --rank 16)
  checked+=("torch $("${run[@]}" -c 'from importlib.metadata import version; print(version("torch"))') (CPU side$note)")
  rm -rf "$environment"
}

# Rendering, tuning, mining, evaluation and the report, by the console script.
try_extras() {
  local release=$1 environment="$work/extras"
  say "torch $release with the extras"
  "$python" -m venv "$environment"
  "$environment/bin/pip" install --quiet --no-deps "torch==$release"
  "$environment/bin/pip" install --quiet "subspace3d[all] @ file://$wheel"
  (cd "$work" && "$environment/bin/subspace3d" doctor)
  (cd "$work" && CUDA_VISIBLE_DEVICES='' "$environment/bin/subspace3d" demo --smoke --out "$work/demo")
  [ -s "$work/demo/report/index.html" ] || fail "the demo wrote no report"
  checked+=("torch $release with all extras, demo --smoke")
}

checked=()
check_content
for release in "${releases[@]}"; do try_release "$release"; done
[ "${EXTRAS:-ON}" = OFF ] || try_extras "${releases[0]}"
say "the same file works with:"
printf '   %s\n' "${checked[@]}"
