// Products of tiles in shared memory on tensor cores.
//
// An operand counts as the sum of its leading TF32 parts of 11 bits each; three parts are all of a float32. The
// products of parts that together leave out more than the sum keeps are not made: 1, 3 or 6 are, for a relative error
// of about 2^-11, 2^-22 or that of float32. One part is all of a bfloat16 or float16. Cards without
// TF32 multiply float32 values whole.
#pragma once

#include "cuda/ptx.cuh"

namespace subspace {

// Sums of a warp's 16 x 8 tiles: kRowTiles of them below each other, kColumnTiles beside each other.
template <int kRowTiles, int kColumnTiles>
struct WarpTile {
  float sum[kRowTiles][kColumnTiles][4] = {};

  // Adds a b over `kDepth` columns. a(i, k) and b(k, j) give the elements of the warp's operands.
  template <int kWanted, int kDepth, class A, class B>
  __device__ void multiply(A a, B b) {
    constexpr int kParts = subspace::kParts<kWanted>;
    const int g = static_cast<int>(threadIdx.x % 32) / 4;
    const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll kUnrolledSteps
    for (int k = 0; k < kDepth; k += 8) {
      float left[kParts][kRowTiles][4], right[kParts][kColumnTiles][2];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        left[0][i][0] = a(16 * i + g, k + t);
        left[0][i][1] = a(16 * i + g + 8, k + t);
        left[0][i][2] = a(16 * i + g, k + t + 4);
        left[0][i][3] = a(16 * i + g + 8, k + t + 4);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        right[0][j][0] = b(k + t, 8 * j + g);
        right[0][j][1] = b(k + t + 4, 8 * j + g);
      }
      split(left);
      split(right);
      // The small products first.
#pragma unroll
      for (int order = kParts - 1; order >= 0; --order) {
#pragma unroll
        for (int part = 0; part <= order; ++part) {
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
            for (int j = 0; j < kColumnTiles; ++j) mma_tf32(sum[i][j], left[part][i], right[order - part][j]);
          }
        }
      }
    }
  }

 private:
  // values[0] is taken apart: its TF32 part stays, that of the rest goes to values[1], and so on.
  template <int kParts, int kTiles, int kCount>
  static __device__ void split(float (&values)[kParts][kTiles][kCount]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int q = 0; q < kCount; ++q) {
        float rest = values[0][i][q];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          values[part][i][q] = to_tf32(rest);
          rest -= values[part][i][q];
        }
      }
    }
  }
};

}  // namespace subspace
