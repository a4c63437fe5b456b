#!/usr/bin/env bash
# Build the wheel as a user's pip would, then try that one file in fresh environments with different torch releases.
#
#   bash scripts/check_wheel.sh [TORCH_RELEASE ...]        default: 2.13.0 2.12.0
#
# torch is installed without its CUDA libraries, which take gigabytes and are not what is checked. A CUDA build of
# torch does not load without them; then empty stand-ins take their place, and the output says so: such a check covers
# torch's CPU side only. PYTHON chooses the interpreter.
set -euo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
releases=("$@")
[ ${#releases[@]} -gt 0 ] || releases=(2.13.0 2.12.0)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\n== %s\n' "$*"; }

build_wheel() {
  say "build the wheel"
  rm -f dist/subspace3d-*.whl
  # a build folder of its own leaves that of an editable install alone
  "$python" -m pip wheel . --no-deps --quiet -w dist -C build-dir="$work/build"
  wheel=$(ls "$PWD"/dist/subspace3d-*.whl)
  ls -sh "$wheel"
}

check_links() {
  say "shared libraries that _C names"
  "$python" -m zipfile -e "$wheel" "$work/content"
  local needed
  needed=$(readelf -d "$work"/content/subspace_ext/_C*.so | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
  echo "$needed"
  if grep -qE '^lib(torch|c10|cuda|cudart|cublas)' <<<"$needed"; then
    echo "check_wheel: _C must name neither torch nor a CUDA library" >&2
    exit 1
  fi
}

# Empty libraries under the names that torch's own libraries look for and do not find, and one library with every CUDA
# function they need before it is called; each returns the error code 999.
make_stand_ins() {
  local libraries=$1 out=$2 name
  mkdir -p "$out"
  { for file in "$libraries"/*.so*; do ldd "$file"; done } 2>/dev/null | awk '/not found/ {print $1}' | sort -u |
    while read -r name; do gcc -shared -x c /dev/null -o "$out/$name" -Wl,-soname,"$name"; done
  nm -D --undefined-only "$libraries"/*.so* 2>/dev/null | awk '$2 ~ /^(cu|nv|nccl)/ {sub(/@.*/, "", $2); print $2}' |
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
  local run=(env CUDA_VISIBLE_DEVICES= "$environment/bin/python")
  if ! (cd "$work" && "${run[@]}" -c 'import torch') 2>/dev/null; then
    make_stand_ins "$(echo "$environment"/lib/python3*/site-packages/torch/lib)" "$environment/stand_ins"
    run=(env CUDA_VISIBLE_DEVICES= LD_LIBRARY_PATH="$environment/stand_ins"
      LD_PRELOAD="$environment/stand_ins/functions.so" "$environment/bin/python")
    note=", a CUDA build with stand-ins for its CUDA libraries"
  fi
  # outside the repository, so that nothing but the wheel can be imported
  (cd "$work" && "${run[@]}" -W ignore::UserWarning "$work/try.py")
  (cd "$work" && "${run[@]}" -W ignore::UserWarning "$environment/bin/subspace3d" doctor)
  checked+=("torch $("${run[@]}" -c 'from importlib.metadata import version; print(version("torch"))') (CPU side$note)")
  rm -rf "$environment"
}

cat >"$work/try.py" <<'PYTHON'
"""Both plans of the fused linear against the formula with its gradients, and mining of a planted subspace."""

import torch

import subspace_ext as se

torch.manual_seed(0)
print(f"torch {torch.__version__}, subspace_ext from {se.__file__}", se.build_info(), sep="\n")
x, w, bias = torch.randn(5, 12), torch.randn(10, 12), torch.randn(10)
u, v = torch.linalg.qr(torch.randn(10, 3))[0], torch.linalg.qr(torch.randn(12, 3))[0]
for plan in ("fold", "factored"):
    c, expected_c = (torch.full((3, 3), 0.5, requires_grad=True) for _ in range(2))
    y = se.subspace_linear(x, w, bias, u, c, v, scale=2.0, plan=plan)
    expected = x @ w.T + bias + 2.0 * ((x @ v) @ expected_c.T) @ u.T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(c.grad, expected_c.grad, rtol=1e-4, atol=1e-3)

adapters, rank = 4, 3
lora_b = u @ torch.randn(adapters, rank, rank)
mined = se.mine_subspace(lora_b, v.T.expand(adapters, -1, -1), k=rank)
basis = torch.linalg.qr(mined.u)[0]  # mined.u carries the square roots of the singular values
torch.testing.assert_close(basis @ basis.T, (u @ u.T).to(basis.dtype), rtol=1e-4, atol=1e-4)
print("fused linear (both plans, with gradients) and mining agree with their formulas")
PYTHON

checked=()
build_wheel
check_links
for release in "${releases[@]}"; do try_release "$release"; done
say "the same file works with:"
printf '   %s\n' "${checked[@]}"
