// Small dense linear algebra in float64, each function a step that a whole block of kThreads takes together: every thread
// must arrive. The counterpart of cpu/dense.h, on row-major matrices without padding.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "irls_shape.h"

namespace subspace {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSweeps = 40;

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

// Called in four places and long: one copy leaves the loop its registers.
__device__ __noinline__ double power(double base, double exponent) { return pow(base, exponent); }

// For one warp: sum of a[i] b[i], the same value in every lane.
__device__ double warp_dot(int size, const double* a, const double* b) {
  double sum = 0.0;
  for (int i = lane_id(); i < size; i += 32) sum += a[i] * b[i];
  return warp_sum(sum);
}

// visit(i) for all i below size, dealt out to the threads.
template <class Visit>
__device__ void for_each(int size, Visit visit) {
  for (int i = thread_id(); i < size; i += kThreads) visit(i);
}

// C [m, n] = A B. A [m, depth] has element (i, p) at a[i * row_stride + p * column_stride]; B and C are row-major.
__device__ __noinline__ void multiply(int m, int n, int depth, const double* a, int row_stride, int column_stride, const double* b,
                         int ldb, double* c, int ldc) {
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

__device__ __noinline__ void transpose(int rows, int columns, const double* in, double* out) {
  __syncthreads();
  for_each(rows * columns, [&](int i) { out[i] = in[i % rows * columns + i / rows]; });
  __syncthreads();
}

// Sorts the rows of x by decreasing norm, and those of companion with them; sorted is scratch as large as either.
__device__ void sort_rows(int rows, double* x, int ld, double* companion, int ld_companion, double* norms,
                          double* sorted, double* order) {
  for_each(rows, [&](int i) {
    int place = 0;
    for (int j = 0; j < rows; ++j) place += norms[j] > norms[i] || (norms[j] == norms[i] && j < i);
    order[place] = i;
  });
  __syncthreads();
  const auto rearrange = [&](double* matrix, int width) {
    for_each(rows * width, [&](int i) { sorted[i] = matrix[static_cast<int>(order[i / width]) * width + i % width]; });
    __syncthreads();
    for_each(rows * width, [&](int i) { matrix[i] = sorted[i]; });
    __syncthreads();
  };
  rearrange(x, ld);
  if (companion) rearrange(companion, ld_companion);
  rearrange(norms, 1);
}

// One-sided Jacobi: rotates the rows of x until they are orthogonal, then sorts them by decreasing norm, each rotation
// and exchange applied to companion too unless it is null. A round pairs every row with one other, as in a tournament
// in which row 0 keeps its seat. `temporary` has room for `rows`.
__device__ __noinline__ void orthogonalise_rows(int rows, double* x, int ld, double* companion, int ld_companion, double* norms,
                                   double* sorted, double* temporary) {
  __syncthreads();
  const double tolerance = kEpsilon * sqrt(static_cast<double>(ld));
  const int seats = rows + rows % 2;
  for (int sweep = 0, rotated = 1; sweep < kMaxSweeps && rotated; ++sweep) {
    rotated = 0;
    for (int i = warp_id(); i < rows; i += kWarps) {
      const double norm = warp_dot(ld, x + i * ld, x + i * ld);
      if (lane_id() == 0) norms[i] = norm;
    }
    __syncthreads();
    double largest = 0.0;
    for (int i = 0; i < rows; ++i) largest = fmax(largest, norms[i]);
    const double negligible = kEpsilon * kEpsilon * largest;
    for (int round = 0; round + 1 < seats; ++round) {
      for (int pair = warp_id(); pair < seats / 2; pair += kWarps) {
        const int first = pair == 0 ? 0 : (round + pair - 1) % (seats - 1) + 1;
        const int second = (round + seats - 2 - pair) % (seats - 1) + 1;
        const int i = min(first, second), j = max(first, second);
        if (j >= rows || norms[i] <= negligible || norms[j] <= negligible) continue;
        double *a = x + i * ld, *b = x + j * ld;
        const double product = warp_dot(ld, a, b);
        if (!(fabs(product) > tolerance * sqrt(norms[i] * norms[j]))) continue;
        rotated = 1;
        const double zeta = (norms[j] - norms[i]) / (2.0 * product);
        const double tangent = copysign(1.0 / (fabs(zeta) + sqrt(1.0 + zeta * zeta)), zeta);
        const double cosine = 1.0 / sqrt(1.0 + tangent * tangent);
        const double sine = cosine * tangent;
        const auto rotate = [&](double* u, double* v, int size) {
          for (int q = lane_id(); q < size; q += 32) {
            const double old_u = u[q], old_v = v[q];
            u[q] = cosine * old_u - sine * old_v;
            v[q] = sine * old_u + cosine * old_v;
          }
        };
        rotate(a, b, ld);
        if (companion) rotate(companion + i * ld_companion, companion + j * ld_companion, ld_companion);
        __syncwarp();  // every lane has read the norms that lane 0 now changes
        if (lane_id() == 0) {
          norms[i] -= tangent * product;
          norms[j] += tangent * product;
        }
      }
      __syncthreads();
    }
    rotated = __syncthreads_or(rotated);
  }
  for (int i = warp_id(); i < rows; i += kWarps) {
    const double norm = sqrt(warp_dot(ld, x + i * ld, x + i * ld));
    if (lane_id() == 0) norms[i] = norm;
  }
  __syncthreads();
  sort_rows(rows, x, ld, companion, ld_companion, norms, sorted, temporary);
}

}  // namespace
}  // namespace subspace
