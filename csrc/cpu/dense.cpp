#include "cpu/dense.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

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

// Four doubles, one AVX2 register; loads need no alignment.
typedef double Lane __attribute__((vector_size(4 * sizeof(double)), aligned(sizeof(double))));
constexpr int kWidth = 4;
static_assert(kLane == 2 * kWidth, "rows are padded to two registers");

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr int kMaxSweeps = 40;

inline __attribute__((always_inline)) const Lane& lane(const double* p) { return *reinterpret_cast<const Lane*>(p); }
inline __attribute__((always_inline)) Lane& lane(double* p) { return *reinterpret_cast<Lane*>(p); }

// kRows x kLane elements of C are kept in registers over the whole depth.
template <int kRows>
inline __attribute__((always_inline)) void multiply_tile(std::int64_t depth, const double* a, std::int64_t row_stride,
                                                         std::int64_t column_stride, const double* b,
                                                         std::int64_t ldb, double* c, std::int64_t ldc) {
  Lane first[kRows] = {}, second[kRows] = {};
  for (std::int64_t p = 0; p < depth; ++p, a += column_stride, b += ldb) {
    const Lane b_first = lane(b), b_second = lane(b + kWidth);
    for (int i = 0; i < kRows; ++i) {
      first[i] += a[i * row_stride] * b_first;
      second[i] += a[i * row_stride] * b_second;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    lane(c + i * ldc) = first[i];
    lane(c + i * ldc + kWidth) = second[i];
  }
}

// x, y <- cosine x - sine y, sine x + cosine y
SUBSPACE_MULTIVERSION
void rotate(std::int64_t size, double cosine, double sine, double* x, double* y) {
  for (std::int64_t i = 0; i < size; i += kWidth) {
    const Lane first = lane(x + i), second = lane(y + i);
    lane(x + i) = cosine * first - sine * second;
    lane(y + i) = sine * first + cosine * second;
  }
}

void swap_rows(std::int64_t size, double* x, double* y) { std::swap_ranges(x, x + size, y); }

// Selection sort by decreasing norm: few rows, and safe whatever the values are.
void sort_rows(std::int64_t rows, double* x, std::int64_t ld, double* companion, std::int64_t ld_companion,
               double* norms) {
  for (std::int64_t i = 0; i + 1 < rows; ++i) {
    const std::int64_t best = std::max_element(norms + i, norms + rows) - norms;
    if (best == i) continue;
    std::swap(norms[i], norms[best]);
    swap_rows(ld, x + i * ld, x + best * ld);
    if (companion) swap_rows(ld_companion, companion + i * ld_companion, companion + best * ld_companion);
  }
}

// Pivoted Householder QR of G [m, n] given as gt = G^T [n, ldm]. Afterwards R[j, i], i >= j, stands at gt[i * ldm + j].
// Returns the number of pivots above rounding level. norms [n] is scratch; order[i] is the column of G at place i.
std::int64_t pivoted_triangle(std::int64_t m, std::int64_t n, double* gt, std::int64_t ldm, double* reflector,
                              double* norms, std::int64_t* order) {
  for (std::int64_t i = 0; i < n; ++i) {
    order[i] = i;
    norms[i] = dot(ldm, gt + i * ldm, gt + i * ldm);
  }
  double first = 0.0;
  for (std::int64_t j = 0; j < n; ++j) {
    const std::int64_t best = std::max_element(norms + j, norms + n) - norms;
    if (best != j) {
      std::swap(order[j], order[best]);
      std::swap(norms[j], norms[best]);
      swap_rows(ldm, gt + j * ldm, gt + best * ldm);
    }
    double* column = gt + j * ldm;
    // The reflector is kept with zeros before entry j, so that whole padded rows can be used.
    std::copy(column, column + ldm, reflector);
    std::fill(reflector, reflector + j, 0.0);
    const double norm = std::sqrt(dot(ldm, reflector, reflector));
    if (j == 0) first = norm;
    if (!(norm > kEpsilon * first)) return j;
    const double diagonal = reflector[j] > 0 ? -norm : norm;
    reflector[j] -= diagonal;
    const double half_square = -diagonal * reflector[j];
    column[j] = diagonal;
    for (std::int64_t i = j + 1; i < n; ++i) {
      double* other = gt + i * ldm;
      add_scaled(ldm, -dot(ldm, reflector, other) / half_square, reflector, other);
      norms[i] -= other[j] * other[j];
    }
    // Downdated norms lose digits; only the choice of the pivot depends on them, so now and then is often enough.
    if (j % 16 == 15) {
      for (std::int64_t i = j + 1; i < n; ++i) {
        norms[i] = 0.0;
        for (std::int64_t q = j + 1; q < m; ++q) norms[i] += gt[i * ldm + q] * gt[i * ldm + q];
      }
    }
  }
  return n;
}

}  // namespace

SUBSPACE_MULTIVERSION
void multiply(std::int64_t m, std::int64_t n, std::int64_t depth, const double* a, std::int64_t row_stride,
              std::int64_t column_stride, const double* b, std::int64_t ldb, double* c, std::int64_t ldc) {
  // Six rows fill the sixteen registers of AVX2: twelve sums, one row of B, one element of A.
  constexpr int kRows = 6;
  for (std::int64_t j = 0; j < n; j += kLane) {
    std::int64_t i = 0;
    for (; i + kRows <= m; i += kRows) {
      multiply_tile<kRows>(depth, a + i * row_stride, row_stride, column_stride, b + j, ldb, c + i * ldc + j, ldc);
    }
    for (; i < m; ++i) {
      multiply_tile<1>(depth, a + i * row_stride, row_stride, column_stride, b + j, ldb, c + i * ldc + j, ldc);
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

void scale(std::int64_t size, double factor, double* values) {
  for (std::int64_t i = 0; i < size; ++i) values[i] *= factor;
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

void orthogonalise_rows(std::int64_t rows, double* x, std::int64_t ld, double* companion, std::int64_t ld_companion,
                        double* norms) {
  const double tolerance = kEpsilon * std::sqrt(static_cast<double>(ld));
  bool rotated = true;
  for (int sweep = 0; sweep < kMaxSweeps && rotated; ++sweep) {
    rotated = false;
    double largest = 0.0;
    for (std::int64_t i = 0; i < rows; ++i) {
      norms[i] = dot(ld, x + i * ld, x + i * ld);
      largest = std::max(largest, norms[i]);
    }
    const double negligible = kEpsilon * kEpsilon * largest;
    for (std::int64_t i = 0; i + 1 < rows; ++i) {
      for (std::int64_t j = i + 1; j < rows; ++j) {
        if (norms[i] <= negligible || norms[j] <= negligible) continue;
        const double product = dot(ld, x + i * ld, x + j * ld);
        if (!(std::abs(product) > tolerance * std::sqrt(norms[i] * norms[j]))) continue;
        rotated = true;
        const double zeta = (norms[j] - norms[i]) / (2.0 * product);
        const double tangent = std::copysign(1.0 / (std::abs(zeta) + std::sqrt(1.0 + zeta * zeta)), zeta);
        const double cosine = 1.0 / std::sqrt(1.0 + tangent * tangent);
        const double sine = cosine * tangent;
        rotate(ld, cosine, sine, x + i * ld, x + j * ld);
        if (companion) {
          rotate(ld_companion, cosine, sine, companion + i * ld_companion, companion + j * ld_companion);
        }
        norms[i] -= tangent * product;
        norms[j] += tangent * product;
      }
    }
  }
  for (std::int64_t i = 0; i < rows; ++i) norms[i] = std::sqrt(dot(ld, x + i * ld, x + i * ld));
  sort_rows(rows, x, ld, companion, ld_companion, norms);
}

void right_singular_vectors(std::int64_t m, std::int64_t n, double* gt, std::int64_t ldm, double* vt,
                            std::int64_t ldn, double* values, double* scratch, std::int64_t* order) {
  const std::int64_t rank = pivoted_triangle(m, n, gt, ldm, scratch, values, order);
  // G P = Q R and R = J S V'^T: orthogonalising the rows of R leaves S V'^T, so neither Q nor J is needed.
  std::fill(vt, vt + n * ldn, 0.0);
  for (std::int64_t j = 0; j < rank; ++j) {
    for (std::int64_t i = j; i < n; ++i) vt[j * ldn + i] = gt[i * ldm + j];
  }
  orthogonalise_rows(rank, vt, ldn, nullptr, 0, values);
  std::fill(values + rank, values + n, 0.0);
  const double negligible = kEpsilon * static_cast<double>(m) * values[0];
  for (std::int64_t j = 0; j < n; ++j) {
    double* row = vt + j * ldn;
    const double factor = values[j] > negligible ? 1.0 / values[j] : 0.0;
    for (std::int64_t i = 0; i < n; ++i) scratch[order[i]] = factor * row[i];
    std::copy(scratch, scratch + n, row);
  }
}

}  // namespace subspace
