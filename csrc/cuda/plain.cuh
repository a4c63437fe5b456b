// The functions of ptx.cuh from instructions that every card has.
#pragma once

#include <cuda_runtime.h>

namespace subspace::plain {

// All of a float32 is one operand.
template <int kWanted>
constexpr int kParts = 1;
constexpr int kUnrolledSteps = 1;  // a step is long already

__device__ inline float to_tf32(float value) { return value; }

// float32 products and sums; every lane reads the operands of its four elements from the lanes that hold them.
__device__ inline void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  const int g = static_cast<int>(threadIdx.x % 32) / 4;
  const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const int holder = k % 4, half = k / 4;
    const float upper = __shfl_sync(0xffffffffu, a[2 * half], 4 * g + holder);
    const float lower = __shfl_sync(0xffffffffu, a[2 * half + 1], 4 * g + holder);
    const float left = __shfl_sync(0xffffffffu, b[half], 8 * t + holder);
    const float right = __shfl_sync(0xffffffffu, b[half], 8 * t + 4 + holder);
    d[0] += upper * left;
    d[1] += upper * right;
    d[2] += lower * left;
    d[3] += lower * right;
  }
}

template <int kBytes>
__device__ inline void copy_async(float* out, const float* in, bool inside) {
#pragma unroll
  for (int i = 0; i < kBytes / 4; ++i) out[i] = inside ? in[i] : 0.0f;
}

__device__ inline void commit_copies() {}

template <int kPending>
__device__ inline void wait_copies() {}

}  // namespace subspace::plain
