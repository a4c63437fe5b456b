#!/usr/bin/env bash
# Builds, tests, sanitizes and measures on a machine with a GPU, unattended, in under eight minutes on an H100.
#
#   bash benchmarks/gpu_suite.sh [FOLDER]        FOLDER: $OUT, else runs/gpu_suite
#
# Needs python3 with torch (CUDA build), nvcc, and what pip would otherwise fetch: scikit-build-core, pybind11, cmake,
# ninja, pytest, peft, tyro, safetensors, pyyaml, tqdm. Nothing is downloaded and nothing outside FOLDER is changed.
# FOLDER gets log.txt (everything), summary.txt (a line a step) and results/<device>.jsonl. Every step runs whatever
# became of the others; the exit status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-${OUT:-runs/gpu_suite}}" && cd "${1:-${OUT:-runs/gpu_suite}}" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site
: >"$out/log.txt"
: >"$out/summary.txt"
worst=0
started=$SECONDS

say() { printf '%s\n' "$*" | tee -a "$out/log.txt" "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: runs it under a limit, output into the log, one line into the summary.
step() {
  local name=$1 limit=$2 status=0 begun=$SECONDS
  shift 2
  printf '\n==== %s: %s\n' "$name" "$*" >>"$out/log.txt"
  timeout "$limit" "$@" >>"$out/log.txt" 2>&1 || status=$?
  say "$(printf '%-28s %4d s  %s' "$name" $((SECONDS - begun)) "$([ $status = 0 ] && echo ok || echo "FAILED ($status)")")"
  [ $status = 0 ] || worst=1
  return $status
}

bench() { step "bench $*" 130 "$python" -m subspace3d bench "$@" --device cuda --out "$out/results"; }

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
  || { say "error: torch sees no GPU in $python"; exit 1; }
say "$("$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)')"
say "commit $(git describe --always --dirty --exclude='*' 2>/dev/null || echo unknown)"
nvidia-smi >>"$out/log.txt" 2>&1

step "build the wheel" 200 env SUBSPACE_CUDA=ON "$python" -m pip wheel --no-build-isolation --no-deps \
  --no-index -w "$work/wheel" . || exit 1
step "install it" 60 "$python" -m pip install --no-deps --no-index --target "$site" "$work"/wheel/*.whl || exit 1
# The checkout's own packages must not be found in the place of the wheel's.
export PYTHONPATH=$site PYTHONSAFEPATH=1
from_wheel='import sys, subspace_ext, subspace3d
for module in (subspace_ext, subspace3d):
    assert module.__file__.startswith(sys.argv[1]), f"{module.__file__}: uninstall the editable install first"'
step "import it" 60 "$python" -c "$from_wheel" "$site" || exit 1

step "pytest -m gpu" 150 "$python" -m pytest -m gpu -q -p no:cacheprovider tests

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool" 90 "$sanitizer" --tool $tool --error-exitcode 9 \
      "$python" -m pytest -m gpu -q -x -p no:cacheprovider tests/core
  done
else
  say "compute-sanitizer            not installed, skipped"
fi

bench mining --dense 1
bench linear --views 8 --rounds 15
bench linear --views 8 --rounds 15 --precision bf16 --peers frozen fold factored lora lora-xs unsloth axolotl lorafusion
bench linear --views 24 --rounds 10 --peers frozen fold factored lora
bench block --views 8 --rounds 10
bench step --views 2 --rounds 5

say "finished in $((SECONDS - started)) s: $out"
exit $worst
