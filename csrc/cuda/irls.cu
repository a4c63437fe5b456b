// The loop of irls_loop.h with a block of threads for each layer, float64 throughout, so that weights, subspace and
// objective agree with those of the CPU to rounding.
#include <cuda_runtime.h>

#define SUBSPACE_FN __device__
#define SUBSPACE_STEP __noinline__
#define SUBSPACE_BOTH __host__ __device__

#include <algorithm>

#include "check.h"
#include "cuda/dense.cuh"
#include "cuda/launch.h"
#include "irls_loop.h"

namespace subspace {
namespace {

// One block; rows() deals out rows to warps. See leading.h.
struct Block {
  using Index = int;  // cores stay far below 2^31 elements
  static constexpr bool kPacks = false;
  SUBSPACE_BOTH static constexpr Index pad(Index n) { return n; }
  SUBSPACE_BOTH static constexpr Index width(Index n) { return n; }
  SUBSPACE_BOTH static constexpr Index panel_doubles(Index n) { return n; }

  __device__ static bool leader() { return thread_id() == 0; }
  __device__ static void barrier() { __syncthreads(); }

  template <class Visit>
  __device__ static void each(Index n, Visit visit) {
#pragma unroll 1
    for (Index i = thread_id(); i < n; i += kThreads) visit(i);
    __syncthreads();
  }
  template <class Visit>
  __device__ static void rows(Index n, Visit visit) {
#pragma unroll 1
    for (Index i = warp_id(); i < n; i += kWarps) visit(i);
    __syncthreads();
  }
  template <class Value>
  __device__ static double sum(Index n, Value value) {
    double own = 0.0;
#pragma unroll 1
    for (Index i = thread_id(); i < n; i += kThreads) own += value(i);
    return block_sum(own);
  }
  template <class Value>
  __device__ static double largest(Index n, Value value) {
    double own = 0.0;
#pragma unroll 1
    for (Index i = thread_id(); i < n; i += kThreads) own = fmax(own, value(i));
    return block_max(own);
  }

  __device__ static double power(double base, double exponent) { return subspace::power(base, exponent); }
  __device__ static double dot(Index n, const double* a, const double* b) {
    double sum = 0.0;
#pragma unroll 2
    for (Index i = lane_id(); i < n; i += 32) sum += a[i] * b[i];
    return warp_sum(sum);
  }
  __device__ static void add_scaled(Index n, double factor, const double* in, double* out) {
#pragma unroll 2
    for (Index i = lane_id(); i < n; i += 32) out[i] += factor * in[i];
    __syncwarp();
  }
  __device__ static void scale(Index n, double factor, double* row) {
#pragma unroll 2
    for (Index i = lane_id(); i < n; i += 32) row[i] *= factor;
  }
  __device__ static void subtract_rows(Index count, Index n, const double* factors, const double* rows, Index ld,
                                       double* out) {
    each(n, [&](Index i) {
      double sum = 0.0;
      for (Index q = 0; q < count; ++q) sum += factors[q] * rows[q * ld + i];
      out[i] -= sum;
    });
  }
  __device__ static void combine(Index size, Index count, const double* shares, const double* matrices, double* out) {
    each(size, [&](Index i) {
      double sum = 0.0;
      for (Index n = 0; n < count; ++n) sum += shares[n] * matrices[static_cast<std::int64_t>(n) * size + i];
      out[i] = sum;
    });
  }
  __device__ static double squared_distance(Index size, const double* a, const double* b) {
    return sum(size, [&](Index i) { return (a[i] - b[i]) * (a[i] - b[i]); });
  }
  __device__ static void multiply(Index m, Index n, Index depth, const double* a, Index row_stride,
                                  Index column_stride, const double* b, Index ldb, double* c, Index ldc) {
    subspace::multiply(m, n, depth, a, row_stride, column_stride, b, ldb, c, ldc);
  }
  __device__ static void add_product(Index m, Index n, Index depth, const double* a, Index lda, const double* b,
                                     Index ldb, double* c, Index ldc) {
    rows(m, [&](Index i) {
      for (Index j = lane_id(); j < n; j += 32) {
        double sum = 0.0;
        for (Index q = 0; q < depth; ++q) sum += a[i * lda + q] * b[q * ldb + j];
        c[i * ldc + j] += sum;
      }
    });
  }
  __device__ static void gram(Index m, Index n, const double* matrix, Index ld, double* g, double*) {
    subspace::multiply(n, n, m, matrix, 1, ld, matrix, ld, g, ld);
  }
  __device__ static void transpose(Index rows, Index columns, const double* in, Index ld_in, double* out,
                                   Index ld_out) {
    subspace::transpose(rows, columns, in, ld_in, out, ld_out);
  }
  __device__ static void tridiagonalise(Index n, double* a, Index ld, double* diagonal, double* below,
                                        double* reflectors, double* tau, double* image) {
    subspace::tridiagonalise(n, a, ld, diagonal, below, reflectors, tau, image);
  }
  __device__ static void largest_eigenvalues(Index n, const double* diagonal, const double* squares, double bound,
                                             Index count, double* values) {
    subspace::largest_eigenvalues(n, diagonal, squares, bound, count, values);
  }
};

// Turing needs a few registers more than two blocks leave.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBlocksPlaced = 1;
#else
constexpr int kBlocksPlaced = 2;
#endif

__global__ void __launch_bounds__(kThreads, kBlocksPlaced)
    irls_kernel(const IrlsJob job, const IrlsShape<int> shape, std::int64_t doubles_per_block) {
  // What every thread needs alike is kept in shared memory: there is too much of it for the registers.
  __shared__ IrlsJob shared_job;
  __shared__ IrlsShape<int> shared_shape;
  __shared__ IrlsRoom<Block> room;
  __shared__ IrlsOutputs out;
  if (thread_id() == 0) {
    shared_job = job;
    shared_shape = shape;
    room = IrlsRoom<Block>(shape, job.workspace + blockIdx.x * doubles_per_block);
  }
  for (std::int64_t layer = blockIdx.x; layer < job.layers; layer += gridDim.x) {
    if (thread_id() == 0) out = IrlsOutputs(job, shape, layer);
    __syncthreads();
    IrlsLayer<Block>(shared_shape, shared_job, room, out).solve();
    __syncthreads();
  }
}

}  // namespace

std::int64_t irls_cuda_workspace(const IrlsJob& job) { return IrlsRoom<Block>(IrlsShape<int>(job), nullptr).used; }

void irls_cuda(const IrlsJob& job, void* stream) {
  if (job.layers == 0) return;
  SUBSPACE_CHECK(job.workers >= 1, "irls: workers must be at least 1, got ", job.workers);
  const auto grid = static_cast<unsigned>(std::min(job.workers, job.layers));
  launch("irls", irls_kernel, dim3(grid), kThreads, 0, stream, job, IrlsShape<int>(job), irls_cuda_workspace(job));
}

}  // namespace subspace
