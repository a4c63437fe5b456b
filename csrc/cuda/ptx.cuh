// The instructions that C++ has no word for: one TF32 matrix product, asynchronous copies, the dynamic shared memory.
// Turing, which lacks the first two, takes the functions of plain.cuh in their place.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/plain.cuh"

namespace subspace {

// The block's dynamic shared memory, 16-byte aligned.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800

using namespace plain;

#else

// Operands that a value is taken apart into where kWanted of 11 bits are wanted.
template <int kWanted>
constexpr int kParts = kWanted;
constexpr int kUnrolledSteps = 4;  // of eight columns each

// The nearest value of 10 mantissa bits, ties away from zero.
__device__ inline float to_tf32(float value) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

// d += a b for one warp; a [16, 8], b [8, 8], d [16, 8], TF32 in, float32 sums. With g = lane / 4 and t = lane % 4:
//   a[0..3] at (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);  b[0..1] at (t, g), (t + 4, g);
//   d[0..3] at (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ inline void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// Copies kBytes (4 or 16) from global to shared memory in the background, or writes zeros where `inside` is false;
// `in` must be a valid address in either case.
template <int kBytes>
__device__ inline void copy_async(float* out, const float* in, bool inside) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(out));
  const int size = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(in), "r"(size));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(in), "r"(size));
  }
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}

#endif

}  // namespace subspace
