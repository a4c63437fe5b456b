// Products of tiles in shared memory on tensor cores.
//
// float32 operands are split into two TF32 parts where `kExact` (three products, relative error about 2^-21);
// otherwise each is rounded once to TF32, which changes no bfloat16 or float16 value.
#pragma once

#include "cuda/ptx.cuh"

namespace subspace {

// Sums of a warp's 16 x 8 tiles: kRowTiles of them below each other, kColumnTiles beside each other.
template <int kRowTiles, int kColumnTiles>
struct WarpTile {
  float sum[kRowTiles][kColumnTiles][4] = {};

  // Adds a b over `kDepth` columns. a(i, k) and b(k, j) give the elements of the warp's operands.
  template <bool kExact, int kDepth, class A, class B>
  __device__ void multiply(A a, B b) {
    const int g = static_cast<int>(threadIdx.x % 32) / 4;
    const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      float left[kRowTiles][4], right[kColumnTiles][2];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        left[i][0] = a(16 * i + g, k + t);
        left[i][1] = a(16 * i + g + 8, k + t);
        left[i][2] = a(16 * i + g, k + t + 4);
        left[i][3] = a(16 * i + g + 8, k + t + 4);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        right[j][0] = b(k + t, 8 * j + g);
        right[j][1] = b(k + t + 4, 8 * j + g);
      }
      add<kExact>(left, right);
    }
  }

 private:
  template <bool kExact>
  __device__ void add(float (&left)[kRowTiles][4], float (&right)[kColumnTiles][2]) {
    float left_rest[kRowTiles][4], right_rest[kColumnTiles][2];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) split(left[i], left_rest[i]);
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) split(right[j], right_rest[j]);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        if constexpr (kExact) {
          mma_tf32(sum[i][j], left_rest[i], right[j]);
          mma_tf32(sum[i][j], left[i], right_rest[j]);
        }
        mma_tf32(sum[i][j], left[i], right[j]);
      }
    }
  }

  // values = TF32 part of values, rest = TF32 part of what is left.
  template <int kCount>
  static __device__ void split(float (&values)[kCount], float (&rest)[kCount]) {
#pragma unroll
    for (int q = 0; q < kCount; ++q) {
      const float head = to_tf32(values[q]);
      rest[q] = to_tf32(values[q] - head);
      values[q] = head;
    }
  }
};

}  // namespace subspace
