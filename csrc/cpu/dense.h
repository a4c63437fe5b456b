// Small dense linear algebra on row-major float64 matrices whose rows are padded with zeros to a multiple of kLane.
#pragma once

#include <cstdint>

namespace subspace {

constexpr std::int64_t kLane = 8;

constexpr std::int64_t padded(std::int64_t size) { return (size + kLane - 1) / kLane * kLane; }

// C = A B. A [m, depth] has element (i, p) at a[i * row_stride + p * column_stride]; B [depth, n] and C [m, n] are
// padded. C must not overlap A or B.
void multiply(std::int64_t m, std::int64_t n, std::int64_t depth, const double* a, std::int64_t row_stride,
              std::int64_t column_stride, const double* b, std::int64_t ldb, double* c, std::int64_t ldc);

// out += factor * in over `size` elements, a multiple of kLane.
void add_scaled(std::int64_t size, double factor, const double* in, double* out);

// sum of a[i] * b[i], and of (a[i] - b[i])^2, over `size` elements, a multiple of kLane.
double dot(std::int64_t size, const double* a, const double* b);
double squared_distance(std::int64_t size, const double* a, const double* b);

void scale(std::int64_t size, double factor, double* values);

// out [columns, ld_out] = transpose of in [rows, ld_in]; the padding of out becomes zero.
void transpose(std::int64_t rows, std::int64_t columns, const double* in, std::int64_t ld_in, double* out,
               std::int64_t ld_out);

// One-sided Jacobi: rotates the rows of x [rows, ld] until they are orthogonal, then sorts them by decreasing norm.
// Every rotation and swap is applied to the rows of companion [rows, ld_companion] too, unless it is null.
// norms [rows] receives the Euclidean norms. Rows below machine epsilon times the largest are left as they are.
void orthogonalise_rows(std::int64_t rows, double* x, std::int64_t ld, double* companion, std::int64_t ld_companion,
                        double* norms);

// Singular values and right singular vectors of a matrix G [m, n], m >= n, given as its transpose.
//   gt [n, ldm]       G^T; destroyed
//   vt [n, ldn]       receives the right singular vectors as rows; zero rows where the value is at rounding level
//   values [n]        receives the singular values, descending
//   scratch [ldm], order [n]
// Householder QR with column pivoting, then one-sided Jacobi on the triangle.
void right_singular_vectors(std::int64_t m, std::int64_t n, double* gt, std::int64_t ldm, double* vt,
                            std::int64_t ldn, double* values, double* scratch, std::int64_t* order);

}  // namespace subspace
