#!/usr/bin/env bash
# Builds the native module with AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitize and runs the tests of
# the numerical core with it; the emulated CUDA kernels run under UBSan alone, because AddressSanitizer takes their
# fibers' stacks for overflows. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="$PWD/.venv/bin/python"
BUILD=build/sanitize
"$PWD/.venv/bin/cmake" -S . -B "$BUILD" -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DSUBSPACE_SANITIZE=ON -DSUBSPACE_CUDA=OFF -DPython_EXECUTABLE="$PYTHON" \
  -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" -DSKBUILD_PROJECT_VERSION=sanitized >/dev/null
"$PWD/.venv/bin/cmake" --build "$BUILD"
export SUBSPACE_EMULATED_SANITIZE=undefined PYTHONPATH=tests OMP_NUM_THREADS=1
"$PYTHON" -c "import emulated; emulated.load()"  # compiled before the libraries below slow the compiler down

# libstdc++ comes along because exceptions are intercepted, and python itself does not load it
LIBRARIES=""
for name in libasan.so libubsan.so libstdc++.so.6; do
  LIBRARIES+=" $(c++ -print-file-name="$name")"
done
MODULE=$(ls "$BUILD"/_C*.so)
start=$SECONDS
LD_PRELOAD="${LIBRARIES# }" \
  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  SUBSPACE_SANITIZED="$MODULE" \
  "$PWD/.venv/bin/pytest" -p sanitized tests/core tests/fuzz/test_numerics.py -p no:cacheprovider "$@"
echo "clean under AddressSanitizer and UBSan, $((SECONDS - start)) s"
