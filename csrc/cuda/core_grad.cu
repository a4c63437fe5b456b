#include "core_grad.h"

#include <algorithm>
#include <type_traits>

#include "check.h"
#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "cuda/multiply.cuh"

namespace subspace {
namespace {

// A block of eight warps, two below and four beside each other, makes one 64 x 64 tile of one run's g^T p.
constexpr int kThreads = 256;
constexpr int kTile = 64;
constexpr int kTokens = 32;  // in shared memory at a time
constexpr int kWarpRows = 32;
constexpr int kWarpColumns = 16;
// Tokens start eight banks apart: four tokens and eight columns read at a time lie in 32 different banks.
constexpr int kStride = kTile + 8;
constexpr int kFours = kTokens * kTile / 4 / kThreads;  // groups of four elements a thread moves of each operand

constexpr std::int64_t kTokensPerRun = 128;
constexpr std::int64_t kBlocksWanted = 264;  // two for each multiprocessor of a large card

// One operand's way to shared memory: fetched into registers while the tile before is multiplied.
template <class Element>
struct Panel {
  const Element* start;
  std::int64_t stride;
  std::int64_t first_column;
  std::int64_t columns;
  bool vector;  // four columns can be moved as one everywhere
  Four<Element> held[kFours];

  __device__ Panel(const void* matrix, std::int64_t row_stride, std::int64_t first, std::int64_t rank)
      : start(static_cast<const Element*>(matrix)),
        stride(row_stride),
        first_column(first),
        columns(rank),
        vector(row_stride % 4 == 0 && rank % 4 == 0 &&
               reinterpret_cast<std::uint64_t>(matrix) % (4 * sizeof(Element)) == 0) {}

  __device__ void fetch(std::int64_t token, std::int64_t end) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const int index = static_cast<int>(threadIdx.x) + i * kThreads;
      const std::int64_t row = token + index / (kTile / 4);
      const std::int64_t column = first_column + index % (kTile / 4) * 4;
      const Element* in = start + row * stride + column;
      if (vector && row < end && column < columns) {
        held[i] = *reinterpret_cast<const Four<Element>*>(in);
      } else {
        for (int q = 0; q < 4; ++q) held[i].at[q] = row < end && column + q < columns ? in[q] : Element{};
      }
    }
  }

  __device__ void put(float* tile) const {
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const int index = static_cast<int>(threadIdx.x) + i * kThreads;
      for (int q = 0; q < 4; ++q) {
        tile[index / (kTile / 4) * kStride + index % (kTile / 4) * 4 + q] = load(&held[i].at[q]);
      }
    }
  }
};

template <class Element>
__global__ void __launch_bounds__(kThreads) run_kernel(const CoreGrad a, std::int64_t tokens_per_run) {
  __shared__ float g_tile[kTokens * kStride];
  __shared__ float p_tile[kTokens * kStride];
  const std::int64_t tiles = (a.rank + kTile - 1) / kTile;
  const std::int64_t row = blockIdx.y / tiles * kTile;
  const std::int64_t column = blockIdx.y % tiles * kTile;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * tokens_per_run;
  const std::int64_t end = first + tokens_per_run < a.tokens ? first + tokens_per_run : a.tokens;
  const int warp_row = static_cast<int>(threadIdx.x) / 128 * kWarpRows;
  const int warp_column = static_cast<int>(threadIdx.x) / 32 % 4 * kWarpColumns;

  Panel<Element> g(a.g, a.g_stride, row, a.rank);
  Panel<Element> p(a.p, a.p_stride, column, a.rank);
  WarpTile<kWarpRows / 16, kWarpColumns / 8> tile;
  g.fetch(first, end);
  p.fetch(first, end);
  for (std::int64_t token = first; token < end; token += kTokens) {
    g.put(g_tile);
    p.put(p_tile);
    __syncthreads();
    g.fetch(token + kTokens, end);
    p.fetch(token + kTokens, end);
    tile.template multiply<std::is_same_v<Element, float> ? 3 : 1, kTokens>(
        [&](int i, int k) { return g_tile[k * kStride + warp_row + i]; },
        [&](int k, int j) { return p_tile[k * kStride + warp_column + j]; });
    __syncthreads();
  }

  float* partial = a.partial + static_cast<std::int64_t>(blockIdx.x) * a.rank * a.rank;
  const int lane_row = static_cast<int>(threadIdx.x) % 32 / 4;
  const int lane_column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const std::int64_t own_row = row + warp_row + 16 * i + lane_row + q / 2 * 8;
        const std::int64_t own_column = column + warp_column + 8 * j + lane_column + q % 2;
        if (own_row < a.rank && own_column < a.rank) partial[own_row * a.rank + own_column] = tile.sum[i][j][q];
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const CoreGrad a) {
  const std::int64_t size = a.rank * a.rank;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
#pragma unroll 8
  for (std::int64_t run = 0; run < a.splits; ++run) sum += a.partial[run * size + i];
  a.dc[i] = a.scale * sum;
}

}  // namespace

std::int64_t core_grad_splits(std::int64_t tokens, std::int64_t rank) {
  const std::int64_t tiles = (rank + kTile - 1) / kTile;
  const std::int64_t wanted = kBlocksWanted / std::max<std::int64_t>(1, tiles * tiles);
  return std::clamp<std::int64_t>((tokens + kTokensPerRun - 1) / kTokensPerRun, 1, std::max<std::int64_t>(1, wanted));
}

void core_grad_cuda(const CoreGrad& a, void* stream) {
  if (a.rank == 0) return;
  SUBSPACE_CHECK(a.splits >= 1, "core_grad: splits must be at least 1, got ", a.splits);
  const std::int64_t tiles = (a.rank + kTile - 1) / kTile;
  // Whole steps, so that only the last run has a ragged end.
  const std::int64_t tokens_per_run = ((a.tokens + a.splits - 1) / a.splits + kTokens - 1) / kTokens * kTokens;
  const dim3 blocks(static_cast<unsigned>(a.splits), static_cast<unsigned>(tiles * tiles));
  with_element(a.dtype, [&](auto element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    launch("core_grad", run_kernel<Element>, blocks, kThreads, 0, stream, a, tokens_per_run);
  });
  const std::int64_t sums = (a.rank * a.rank + kThreads - 1) / kThreads;
  launch("core_grad", sum_kernel, dim3(static_cast<unsigned>(sums)), kThreads, 0, stream, a);
}

}  // namespace subspace
