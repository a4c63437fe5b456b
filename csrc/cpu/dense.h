// Small dense linear algebra on row-major float64 matrices whose rows are padded with zeros to kLane elements or more.
#pragma once

#include <cstdint>

namespace subspace {

constexpr std::int64_t kLane = 8;

constexpr std::int64_t lanes(std::int64_t size) { return (size + kLane - 1) / kLane * kLane; }

// Length of a padded row. An odd number of cache lines, so that the elements of a column are spread over all of them.
constexpr std::int64_t padded(std::int64_t size) { return lanes(size) | kLane; }

// C = A B. A [m, depth] has element (i, p) at a[i * row_stride + p * column_stride]; B [depth, n] and C [m, n] are
// padded. C must not overlap A or B.
void multiply(std::int64_t m, std::int64_t n, std::int64_t depth, const double* a, std::int64_t row_stride,
              std::int64_t column_stride, const double* b, std::int64_t ldb, double* c, std::int64_t ldc);

// C += A B, where A [m, depth] is row-major with rows of lda.
void add_product(std::int64_t m, std::int64_t n, std::int64_t depth, const double* a, std::int64_t lda, const double* b,
                 std::int64_t ldb, double* c, std::int64_t ldc);

// The lower triangle of G [n, ld] = M^T M, M [m, ld]; packed [m, ld] is scratch.
void gram(std::int64_t m, std::int64_t n, const double* matrix, std::int64_t ld, double* g, double* packed);

// out += factor * in over `size` elements, a multiple of kLane.
void add_scaled(std::int64_t size, double factor, const double* in, double* out);

// sum of a[i] * b[i], and of (a[i] - b[i])^2, over `size` elements, a multiple of kLane.
double dot(std::int64_t size, const double* a, const double* b);
double squared_distance(std::int64_t size, const double* a, const double* b);

// out [columns, ld_out] = transpose of in [rows, ld_in]; the padding of out becomes zero.
void transpose(std::int64_t rows, std::int64_t columns, const double* in, std::int64_t ld_in, double* out,
               std::int64_t ld_out);

// Rows of reflectors and updates that are gathered before the matrix is changed; see tridiagonalise.
constexpr std::int64_t kPanel = 16;

// Householder tridiagonalisation Q^T A Q = T of a symmetric A [n, ld], whose lower triangle is read and destroyed.
//   diagonal [n]; below [n]: T(i, i - 1), with below[0] = 0
//   reflectors [n, ld], tau [n]: Q = H_{n-1} .. H_1 with H_i = I - tau[i] r_i r_i^T, r_i zero from place i on
//   panel [4 * kPanel, ld] is scratch
void tridiagonalise(std::int64_t n, double* a, std::int64_t ld, double* diagonal, double* below, double* reflectors,
                    double* tau, double* panel);

// The `count` largest eigenvalues of a tridiagonal matrix, descending, by bisection to rounding. squares[i] is
// below[i]^2; all lie in -bound .. bound.
void largest_eigenvalues(std::int64_t n, const double* diagonal, const double* squares, double bound,
                         std::int64_t count, double* values);

}  // namespace subspace
