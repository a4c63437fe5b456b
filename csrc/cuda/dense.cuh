// Small dense linear algebra in float64, each function a step that a whole block of kThreads takes together: every
// thread must arrive. The counterpart of cpu/dense.h, on row-major matrices without padding.
#pragma once

#include <cuda_runtime.h>

namespace subspace {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ int thread_id() { return static_cast<int>(threadIdx.x); }
__device__ int warp_id() { return static_cast<int>(threadIdx.x) / 32; }
__device__ int lane_id() { return static_cast<int>(threadIdx.x) % 32; }

__device__ double warp_sum(double value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Added in a fixed order; the same value for every thread.
__device__ __noinline__ double block_sum(double value) {
  __shared__ double sums[kWarps];
  value = warp_sum(value);
  __syncthreads();
  if (lane_id() == 0) sums[warp_id()] = value;
  __syncthreads();
  double total = 0.0;
  for (int w = 0; w < kWarps; ++w) total += sums[w];
  return total;
}

__device__ __noinline__ double block_max(double value) {
  __shared__ double largest[kWarps];
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmax(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  __syncthreads();
  if (lane_id() == 0) largest[warp_id()] = value;
  __syncthreads();
  double result = largest[0];
  for (int w = 1; w < kWarps; ++w) result = fmax(result, largest[w]);
  return result;
}

// Called in several places and long: one copy leaves the loop its registers.
__device__ __noinline__ double power(double base, double exponent) { return pow(base, exponent); }

// C [m, n] = A B. A [m, depth] has element (i, p) at a[i * row_stride + p * column_stride]; B and C are row-major.
__device__ __noinline__ void multiply(int m, int n, int depth, const double* a, int row_stride, int column_stride,
                                      const double* b, int ldb, double* c, int ldc) {
  constexpr int kRows = 2, kColumns = 4, kSide = 16;
  __syncthreads();
  const int own_row = thread_id() / kSide, own_column = thread_id() % kSide;
  for (int first_row = 0; first_row < m; first_row += kRows * kSide) {
    for (int first_column = 0; first_column < n; first_column += kColumns * kSide) {
      double sum[kRows][kColumns] = {};
      // Threads beyond the edge work on the last row or column again and write nothing.
      const double* rows[kRows];
      int columns[kColumns];
      for (int i = 0; i < kRows; ++i) rows[i] = a + min(first_row + own_row + i * kSide, m - 1) * row_stride;
      for (int j = 0; j < kColumns; ++j) columns[j] = min(first_column + own_column + j * kSide, n - 1);
#pragma unroll 4
      for (int p = 0; p < depth; ++p) {
        double left[kRows], right[kColumns];
        for (int i = 0; i < kRows; ++i) left[i] = rows[i][p * column_stride];
        for (int j = 0; j < kColumns; ++j) right[j] = b[p * ldb + columns[j]];
        for (int i = 0; i < kRows; ++i) {
          for (int j = 0; j < kColumns; ++j) sum[i][j] += left[i] * right[j];
        }
      }
      for (int i = 0; i < kRows; ++i) {
        const int row = first_row + own_row + i * kSide;
        for (int j = 0; j < kColumns; ++j) {
          const int column = first_column + own_column + j * kSide;
          if (row < m && column < n) c[row * ldc + column] = sum[i][j];
        }
      }
    }
  }
  __syncthreads();
}

// out [columns, ld_out] = transpose of in [rows, ld_in].
__device__ __noinline__ void transpose(int rows, int columns, const double* in, int ld_in, double* out, int ld_out) {
  __syncthreads();
  for (int i = thread_id(); i < rows * columns; i += kThreads) {
    out[i / rows * ld_out + i % rows] = in[i % rows * ld_in + i / rows];
  }
  __syncthreads();
}

// Householder tridiagonalisation as in cpu/dense.h, but of a full symmetric A that is changed after every row.
__device__ __noinline__ void tridiagonalise(int n, double* a, int ld, double* diagonal, double* below,
                                            double* reflectors, double* tau, double* image) {
  for (int i = n - 1; i > 0; --i) {
    const double* row = a + i * ld;
    double* r = reflectors + i * ld;
    const double last = row[i - 1];
    double own = 0.0;
    for (int j = thread_id(); j + 1 < i; j += kThreads) own += row[j] * row[j];
    const double rest = block_sum(own);
    const bool reflect = rest > 0.0;
    const double beta = reflect ? copysign(sqrt(last * last + rest), -last) : last;
    const double factor = reflect ? 1.0 / (last - beta) : 0.0, scale = reflect ? (beta - last) / beta : 0.0;
    for (int j = thread_id(); j < n; j += kThreads) r[j] = j + 1 < i ? row[j] * factor : j + 1 == i ? 1.0 : 0.0;
    if (thread_id() == 0) {
      diagonal[i] = row[i];
      below[i] = beta;
      tau[i] = scale;
    }
    __syncthreads();
    if (!reflect) continue;
    for (int j = warp_id(); j < i; j += kWarps) {
      double sum = 0.0;
      for (int q = lane_id(); q < i; q += 32) sum += a[j * ld + q] * r[q];
      sum = warp_sum(sum);
      if (lane_id() == 0) image[j] = scale * sum;
    }
    __syncthreads();
    own = 0.0;
    for (int j = thread_id(); j < i; j += kThreads) own += image[j] * r[j];
    const double along = 0.5 * scale * block_sum(own);
    for (int j = thread_id(); j < i; j += kThreads) image[j] -= along * r[j];
    __syncthreads();
    for (int j = warp_id(); j < i; j += kWarps) {
      for (int q = lane_id(); q < i; q += 32) a[j * ld + q] -= r[j] * image[q] + image[j] * r[q];
    }
    __syncthreads();
  }
  if (thread_id() == 0) {
    diagonal[0] = a[0];
    below[0] = tau[0] = 0.0;
  }
  __syncthreads();
}

// The largest eigenvalues of a tridiagonal matrix as in cpu/dense.h, each by one thread.
__device__ __noinline__ void largest_eigenvalues(int n, const double* diagonal, const double* squares, double bound,
                                                 int count, double* values) {
  constexpr int kHalvings = 64;
  const double smallest = 1e-290 * bound;
  for (int j = thread_id(); j < count; j += kThreads) {
    double low = -bound, high = bound;
    for (int step = 0; step < kHalvings; ++step) {
      const double middle = 0.5 * (low + high);
      double pivot = 1.0;
      int above = 0;
      for (int i = 0; i < n; ++i) {
        pivot = diagonal[i] - middle - squares[i] / pivot;
        if (fabs(pivot) < smallest) pivot = -smallest;
        above += pivot > 0.0;
      }
      (above > j ? low : high) = middle;
    }
    values[j] = low;
  }
  __syncthreads();
}

}  // namespace
}  // namespace subspace
