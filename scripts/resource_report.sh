#!/usr/bin/env bash
# Registers, shared memory and spills of every CUDA kernel, as ptxas reports them, into benchmarks/resources.txt.
# Fails when a kernel spills. Needs nvcc, no GPU.   bash scripts/resource_report.sh [FILE]
set -euo pipefail
cd "$(dirname "$0")/.."
report=${1:-benchmarks/resources.txt}
nvcc=${CUDACXX:-nvcc}
command -v "$nvcc" >/dev/null || { echo "resource report: error: no nvcc on PATH or in CUDACXX" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  "$nvcc" --version | tail -2 | head -1
  for arch in sm_75 sm_80 sm_86 sm_89 sm_90a sm_100 sm_120; do
    for source in csrc/cuda/*.cu; do
      "$nvcc" -std=c++17 -O3 -Icsrc -arch=$arch -cubin -Xptxas -v -o "$work/out.cubin" "$source" 2>"$work/log" \
        || { cat "$work/log" >&2; exit 1; }
      printf '\n%s %s\n' "$arch" "$source"
      # Three lines a kernel: its name, its stack and spills, its registers and memory.
      c++filt <"$work/log" | awk '
        /Compiling entry function/ { sub(/^[^\047]*\047/, ""); sub(/\047.*$/, ""); name = $0 }
        /bytes stack frame/ { sub(/^ +/, ""); frame = $0 }
        /Used [0-9]+ registers/ { sub(/^.*Used /, ""); sub(/, used [0-9]+ barriers/, "")
          print "  " $0 "; " frame "\n    " name }'
    done
  done
} >"$work/report"
mv "$work/report" "$report"
kernels=$(grep -c ' registers' "$report") || { echo "resource report: error: ptxas named no kernel" >&2; exit 1; }
if grep -vE ' 0 bytes spill stores, 0 bytes spill loads' "$report" | grep -E 'bytes spill'; then
  echo "resource report: error: the kernels above spill registers" >&2
  exit 1
fi
echo "resource report: $kernels kernels, no spills: $report"
