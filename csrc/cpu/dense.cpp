#include "cpu/dense.h"

#include <algorithm>
#include <cmath>

#include "cpu/lane.h"

// One binary for every x86-64: the hot loops are compiled twice and the loader picks. A clone named after a processor
// ("arch=haswell") would be picked on that very model only; feature levels are picked wherever they are present.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SUBSPACE_MULTIVERSION __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define SUBSPACE_MULTIVERSION __attribute__((target_clones("avx2", "default")))
#endif
#else
#define SUBSPACE_MULTIVERSION
#endif

namespace subspace {
namespace {

// Four doubles, one AVX2 register.
SUBSPACE_LANE(Lane, double, 4);
constexpr int kWidth = 4;
static_assert(kLane == 2 * kWidth, "rows are padded to two registers");

SUBSPACE_INLINE const Lane& lane(const double* p) { return *reinterpret_cast<const Lane*>(p); }
SUBSPACE_INLINE Lane& lane(double* p) { return *reinterpret_cast<Lane*>(p); }

// kRows x kLane elements of C are kept in registers over the whole depth; kAdd: C += A B.
template <int kRows, bool kAdd>
SUBSPACE_INLINE void multiply_tile(std::int64_t depth, const double* a, std::int64_t row_stride,
                                   std::int64_t column_stride, const double* b, std::int64_t ldb, double* c,
                                   std::int64_t ldc) {
  Lane first[kRows] = {}, second[kRows] = {};
  for (std::int64_t p = 0; p < depth; ++p, a += column_stride, b += ldb) {
    const Lane b_first = lane(b), b_second = lane(b + kWidth);
    for (int i = 0; i < kRows; ++i) {
      first[i] += a[i * row_stride] * b_first;
      second[i] += a[i * row_stride] * b_second;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    if (kAdd) {
      lane(c + i * ldc) += first[i];
      lane(c + i * ldc + kWidth) += second[i];
    } else {
      lane(c + i * ldc) = first[i];
      lane(c + i * ldc + kWidth) = second[i];
    }
  }
}

// Six rows fill the sixteen registers of AVX2: twelve sums, one row of B, one element of A.
constexpr int kTileRows = 6;

template <bool kAdd>
SUBSPACE_INLINE void multiply_panels(std::int64_t m, std::int64_t n, std::int64_t depth, const double* a,
                                     std::int64_t row_stride, std::int64_t column_stride, const double* b,
                                     std::int64_t ldb, double* c, std::int64_t ldc) {
  for (std::int64_t j = 0; j < n; j += kLane) {
    std::int64_t i = 0;
    for (; i + kTileRows <= m; i += kTileRows) {
      multiply_tile<kTileRows, kAdd>(depth, a + i * row_stride, row_stride, column_stride, b + j, ldb, c + i * ldc + j,
                                     ldc);
    }
    for (; i < m; ++i) {
      multiply_tile<1, kAdd>(depth, a + i * row_stride, row_stride, column_stride, b + j, ldb, c + i * ldc + j, ldc);
    }
  }
}

// The lower triangle of C [n, ldc] += A^T B with A and B [depth, ld], and some elements above it.
SUBSPACE_MULTIVERSION
void add_lower(std::int64_t n, std::int64_t depth, const double* a, const double* b, std::int64_t ld, double* c,
               std::int64_t ldc) {
  constexpr std::int64_t kBlock = 4 * kTileRows;
  for (std::int64_t i = 0; i < n; i += kBlock) {
    const std::int64_t end = std::min(i + kBlock, n);
    multiply_panels<true>(end - i, end, depth, a + i, 1, ld, b, ld, c + i * ldc, ldc);
  }
}

// y = A x for a symmetric A [n, ld] of which the lower triangle is read; the padding of x is zero, that of y becomes
// so.
SUBSPACE_MULTIVERSION
void symmetric_times(std::int64_t n, const double* a, std::int64_t ld, const double* x, double* y) {
  std::fill(y, y + lanes(n), 0.0);
  std::int64_t r = 0;
  for (; r + 4 <= n; r += 4) {
    const double* row[4] = {a + r * ld, a + (r + 1) * ld, a + (r + 2) * ld, a + (r + 3) * ld};
    Lane sums[4] = {};
    for (std::int64_t j = 0; j < r; j += kWidth) {
      const Lane right = lane(x + j);
      Lane left = lane(y + j);
      for (int q = 0; q < 4; ++q) {
        const Lane element = lane(row[q] + j);
        sums[q] += element * right;
        left += element * x[r + q];
      }
      lane(y + j) = left;
    }
    for (int q = 0; q < 4; ++q) {
      double sum = (sums[q][0] + sums[q][1]) + (sums[q][2] + sums[q][3]);
      for (int j = 0; j < 4; ++j) sum += (j <= q ? row[q][r + j] : row[j][r + q]) * x[r + j];
      y[r + q] += sum;
    }
  }
  for (; r < n; ++r) {
    double sum = a[r * ld + r] * x[r];
    for (std::int64_t j = 0; j < r; ++j) {
      sum += a[r * ld + j] * x[j];
      y[j] += a[r * ld + j] * x[r];
    }
    y[r] += sum;
  }
}

// How many eigenvalues of the tridiagonal matrix exceed each of kShifts numbers.
constexpr int kShifts = 4 * kWidth;

SUBSPACE_MULTIVERSION
void count_above(std::int64_t n, const double* diagonal, const double* squares, double smallest, const double* shifts,
                 double* counts) {
  constexpr int kLanes = kShifts / kWidth;
  Lane pivot[kLanes], shift[kLanes], count[kLanes] = {};
  const Lane one = {1.0, 1.0, 1.0, 1.0}, zero = {};
  const Lane tiny = {smallest, smallest, smallest, smallest};
  for (int q = 0; q < kLanes; ++q) {
    shift[q] = lane(shifts + q * kWidth);
    pivot[q] = one;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    for (int q = 0; q < kLanes; ++q) {
      Lane next = diagonal[i] - shift[q] - squares[i] / pivot[q];
      Lane size, above;
      choose(next < zero, -next, next, size);
      choose(size < tiny, -tiny, next, next);
      choose(next > zero, one, zero, above);
      count[q] += above;
      pivot[q] = next;
    }
  }
  for (int q = 0; q < kLanes; ++q) lane(counts + q * kWidth) = count[q];
}

}  // namespace

SUBSPACE_MULTIVERSION
void multiply(std::int64_t m, std::int64_t n, std::int64_t depth, const double* a, std::int64_t row_stride,
              std::int64_t column_stride, const double* b, std::int64_t ldb, double* c, std::int64_t ldc) {
  multiply_panels<false>(m, n, depth, a, row_stride, column_stride, b, ldb, c, ldc);
}

SUBSPACE_MULTIVERSION
void add_product(std::int64_t m, std::int64_t n, std::int64_t depth, const double* a, std::int64_t lda, const double* b,
                 std::int64_t ldb, double* c, std::int64_t ldc) {
  multiply_panels<true>(m, n, depth, a, lda, 1, b, ldb, c, ldc);
}

SUBSPACE_MULTIVERSION
void gram(std::int64_t m, std::int64_t n, const double* matrix, std::int64_t ld, double* g, double* packed) {
  // Panels of kLane columns that lie together, so that a tile reads two streams.
  const std::int64_t panels = lanes(n) / kLane;
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < panels; ++j) {
      double* out = packed + (j * m + i) * kLane;
      lane(out) = lane(matrix + i * ld + j * kLane);
      lane(out + kWidth) = lane(matrix + i * ld + j * kLane + kWidth);
    }
  }
  constexpr std::int64_t kDepth = 256;  // two such panels fit the first cache
  constexpr int kRows = 4;
  for (std::int64_t p = 0; p < m; p += kDepth) {
    const std::int64_t depth = std::min(kDepth, m - p);
    for (std::int64_t i = 0; i < panels; ++i) {
      const double* left = packed + (i * m + p) * kLane;
      for (std::int64_t j = 0; j <= i; ++j) {
        const double* right = packed + (j * m + p) * kLane;
        for (int half = 0; half < 2; ++half) {
          const std::int64_t row = i * kLane + half * kRows;
          if (row >= n) break;
          double* out = g + row * ld + j * kLane;
          Lane first[kRows] = {}, second[kRows] = {};
          const double* a = left + half * kRows;
          const double* b = right;
          for (std::int64_t q = 0; q < depth; ++q, a += kLane, b += kLane) {
            const Lane b_first = lane(b), b_second = lane(b + kWidth);
            for (int r = 0; r < kRows; ++r) {
              first[r] += a[r] * b_first;
              second[r] += a[r] * b_second;
            }
          }
          for (int r = 0; r < kRows && row + r < n; ++r) {
            Lane &to_first = lane(out + r * ld), &to_second = lane(out + r * ld + kWidth);
            to_first = p == 0 ? first[r] : to_first + first[r];
            to_second = p == 0 ? second[r] : to_second + second[r];
          }
        }
      }
    }
  }
}

SUBSPACE_MULTIVERSION
void add_scaled(std::int64_t size, double factor, const double* in, double* out) {
  for (std::int64_t i = 0; i < size; i += kWidth) lane(out + i) += factor * lane(in + i);
}

SUBSPACE_MULTIVERSION
double dot(std::int64_t size, const double* a, const double* b) {
  Lane sums[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kWidth <= size; i += 4 * kWidth) {
    for (int q = 0; q < 4; ++q) sums[q] += lane(a + i + q * kWidth) * lane(b + i + q * kWidth);
  }
  for (; i < size; i += kWidth) sums[0] += lane(a + i) * lane(b + i);
  const Lane sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

SUBSPACE_MULTIVERSION
double squared_distance(std::int64_t size, const double* a, const double* b) {
  Lane even = {}, odd = {};
  for (std::int64_t i = 0; i < size; i += 2 * kWidth) {
    const Lane first = lane(a + i) - lane(b + i);
    const Lane second = lane(a + i + kWidth) - lane(b + i + kWidth);
    even += first * first;
    odd += second * second;
  }
  even += odd;
  return (even[0] + even[1]) + (even[2] + even[3]);
}

void transpose(std::int64_t rows, std::int64_t columns, const double* in, std::int64_t ld_in, double* out,
               std::int64_t ld_out) {
  constexpr std::int64_t kBlock = 16;
  for (std::int64_t i0 = 0; i0 < rows; i0 += kBlock) {
    const std::int64_t i1 = std::min(i0 + kBlock, rows);
    for (std::int64_t j0 = 0; j0 < columns; j0 += kBlock) {
      const std::int64_t j1 = std::min(j0 + kBlock, columns);
      for (std::int64_t j = j0; j < j1; ++j) {
        for (std::int64_t i = i0; i < i1; ++i) out[j * ld_out + i] = in[i * ld_in + j];
      }
    }
  }
  for (std::int64_t j = 0; j < columns; ++j) std::fill(out + j * ld_out + rows, out + (j + 1) * ld_out, 0.0);
}

void tridiagonalise(std::int64_t n, double* a, std::int64_t ld, double* diagonal, double* below, double* reflectors,
                    double* tau, double* panel) {
  // The matrix shrinks from its last row on, and the rows of a panel change it together: A -= R^T W + W^T R. Until
  // then the row in hand and the product A r are corrected for those before it.
  double* reflected = panel;  // R, and W behind it
  double* images = panel + kPanel * ld;
  double* opposite = panel + 2 * kPanel * ld;  // -W, and -R behind it
  std::int64_t gathered = 0;
  for (std::int64_t i = n - 1; i >= 0; --i) {
    double* row = a + i * ld;
    for (std::int64_t q = 0; q < gathered; ++q) {
      add_scaled(lanes(i + 1), -reflected[q * ld + i], images + q * ld, row);
      add_scaled(lanes(i + 1), -images[q * ld + i], reflected + q * ld, row);
    }
    diagonal[i] = row[i];
    double* r = reflectors + i * ld;
    std::fill(r, r + ld, 0.0);
    tau[i] = below[i] = 0.0;
    if (i == 0) break;
    std::copy(row, row + i, r);
    const double last = r[i - 1];
    r[i - 1] = 0.0;
    const double rest = dot(lanes(i), r, r);
    below[i] = last;
    r[i - 1] = 1.0;
    double* w = images + gathered * ld;
    std::fill(w, w + ld, 0.0);
    if (rest > 0.0) {
      const double beta = last > 0.0 ? -std::sqrt(last * last + rest) : std::sqrt(last * last + rest);
      const double factor = 1.0 / (last - beta);
      for (std::int64_t j = 0; j + 1 < i; ++j) r[j] *= factor;
      below[i] = beta;
      tau[i] = (beta - last) / beta;
      symmetric_times(i, a, ld, r, w);
      for (std::int64_t q = 0; q < gathered; ++q) {
        const double along_image = dot(lanes(i), images + q * ld, r);
        const double along_reflector = dot(lanes(i), reflected + q * ld, r);
        add_scaled(lanes(i), -along_image, reflected + q * ld, w);
        add_scaled(lanes(i), -along_reflector, images + q * ld, w);
      }
      for (std::int64_t j = 0; j < i; ++j) w[j] *= tau[i];
      std::fill(w + i, w + ld, 0.0);
      add_scaled(lanes(i), -0.5 * tau[i] * dot(lanes(i), w, r), r, w);
    }
    std::copy(r, r + ld, reflected + gathered * ld);
    if (++gathered == kPanel) {
      for (std::int64_t q = 0; q < kPanel * ld; ++q) {
        opposite[q] = -images[q];
        opposite[kPanel * ld + q] = -reflected[q];
      }
      add_lower(i, 2 * kPanel, opposite, reflected, ld, a, ld);
      gathered = 0;
    }
  }
}

void largest_eigenvalues(std::int64_t n, const double* diagonal, const double* squares, double bound,
                         std::int64_t count, double* values) {
  constexpr int kHalvings = 64;
  const double smallest = 1e-290 * bound;
  for (std::int64_t first = 0; first < count; first += kShifts) {
    double low[kShifts], high[kShifts], middle[kShifts], counts[kShifts];
    std::fill(low, low + kShifts, -bound);
    std::fill(high, high + kShifts, bound);
    for (int step = 0; step < kHalvings; ++step) {
      for (int q = 0; q < kShifts; ++q) middle[q] = 0.5 * (low[q] + high[q]);
      count_above(n, diagonal, squares, smallest, middle, counts);
      for (int q = 0; q < kShifts; ++q) (counts[q] > static_cast<double>(first + q) ? low : high)[q] = middle[q];
    }
    for (int q = 0; q < kShifts && first + q < count; ++q) values[first + q] = low[q];
  }
}

}  // namespace subspace
