#include "fold_weight.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace subspace {
namespace {

// A block of 256 threads makes a 64 x 64 tile of the weight, 4 x 4 elements a thread, 16 columns of the bases at a
// time. The kernel is bound by reading and writing the weight: 2 K flops an element against 4 to 8 bytes.
constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kSide = 16;                // threads along one side of the block
constexpr int kPerThread = kTile / kSide;

__device__ float load(const float* p) { return *p; }
__device__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ float load(const __half* p) { return __half2float(*p); }
__device__ void store(float* p, float value) { *p = value; }
__device__ void store(__nv_bfloat16* p, float value) { *p = __float2bfloat16_rn(value); }
__device__ void store(__half* p, float value) { *p = __float2half_rn(value); }

// tile[q][i] = factor[first + i, depth + q], zero outside [rows, rank]; rows of the tile are padded against bank
// conflicts of the transposed write.
__device__ void load_tile(float (*tile)[kTile + 1], const float* factor, std::int64_t stride, std::int64_t first,
                          std::int64_t rows, std::int64_t depth, std::int64_t rank) {
  const int thread = threadIdx.y * kSide + threadIdx.x;
  for (int i = thread; i < kTile * kDepth; i += kSide * kSide) {
    const int row = i / kDepth;
    const int column = i % kDepth;
    const bool inside = first + row < rows && depth + column < rank;
    tile[column][row] = inside ? factor[(first + row) * stride + depth + column] : 0.0f;
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(kSide* kSide)
    fold_weight_kernel(const In* w, std::int64_t w_stride, const float* left, std::int64_t left_stride,
                       const float* right, std::int64_t right_stride, Out* w_eff, std::int64_t w_eff_stride,
                       std::int64_t out, std::int64_t in, std::int64_t rank, float scale) {
  __shared__ float left_tile[kDepth][kTile + 1];
  __shared__ float right_tile[kDepth][kTile + 1];
  // Rows lie along x: a weight may have more rows than the y axis of a grid may have blocks.
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const std::int64_t first_column = static_cast<std::int64_t>(blockIdx.y) * kTile;
  float sum[kPerThread][kPerThread] = {};
  for (std::int64_t depth = 0; depth < rank; depth += kDepth) {
    load_tile(left_tile, left, left_stride, first_row, out, depth, rank);
    load_tile(right_tile, right, right_stride, first_column, in, depth, rank);
    __syncthreads();
#pragma unroll
    for (int q = 0; q < kDepth; ++q) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const float row_value = left_tile[q][threadIdx.y + i * kSide];
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) sum[i][j] += row_value * right_tile[q][threadIdx.x + j * kSide];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const std::int64_t row = first_row + threadIdx.y + i * kSide;
    if (row >= out) break;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      // Neighbouring threads own neighbouring columns, so that a warp reads and writes whole segments.
      const std::int64_t column = first_column + threadIdx.x + j * kSide;
      if (column < in) {
        store(w_eff + row * w_eff_stride + column, load(w + row * w_stride + column) + scale * sum[i][j]);
      }
    }
  }
}

template <class In, class Out>
void launch(const FoldWeight& a, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((a.out + kTile - 1) / kTile),
                    static_cast<unsigned>((a.in + kTile - 1) / kTile));
  fold_weight_kernel<In, Out><<<blocks, dim3(kSide, kSide), 0, stream>>>(
      static_cast<const In*>(a.w), a.w_stride, a.left, a.left_stride, a.right, a.right_stride,
      static_cast<Out*>(a.w_eff), a.w_eff_stride, a.out, a.in, a.rank, a.scale);
}

template <class In>
void launch_to(const FoldWeight& a, cudaStream_t stream) {
  switch (a.w_eff_dtype) {
    case DType::kFloat32: return launch<In, float>(a, stream);
    case DType::kBFloat16: return launch<In, __nv_bfloat16>(a, stream);
    case DType::kFloat16: return launch<In, __half>(a, stream);
  }
}

}  // namespace

void fold_weight_cuda(const FoldWeight& a, void* stream) {
  if (a.out == 0 || a.in == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (a.w_dtype) {
    case DType::kFloat32: launch_to<float>(a, queue); break;
    case DType::kBFloat16: launch_to<__nv_bfloat16>(a, queue); break;
    case DType::kFloat16: launch_to<__half>(a, queue); break;
  }
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("fold_weight: launch failed: ") + cudaGetErrorString(status));
  }
}

}  // namespace subspace
