#include "irls.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/dense.h"
#include "cpu/threads.h"
#include "irls_loop.h"

namespace subspace {
namespace {

// One thread; see leading.h.
struct Core {
  using Index = std::int64_t;
  static constexpr bool kPacks = true;
  static constexpr Index pad(Index n) { return padded(n); }
  static constexpr Index width(Index n) { return lanes(n); }
  static constexpr Index panel_doubles(Index n) { return 4 * kPanel * padded(n); }

  static bool leader() { return true; }
  static void barrier() {}

  template <class Visit>
  static void each(Index n, Visit visit) {
    for (Index i = 0; i < n; ++i) visit(i);
  }
  template <class Visit>
  static void rows(Index n, Visit visit) {
    each(n, visit);
  }
  template <class Value>
  static double sum(Index n, Value value) {
    double total = 0.0;
    for (Index i = 0; i < n; ++i) total += value(i);
    return total;
  }
  template <class Value>
  static double largest(Index n, Value value) {
    double result = 0.0;
    for (Index i = 0; i < n; ++i) result = std::max(result, value(i));
    return result;
  }

  static double power(double base, double exponent) { return std::pow(base, exponent); }
  static double dot(Index n, const double* a, const double* b) { return subspace::dot(lanes(n), a, b); }
  static void add_scaled(Index n, double factor, const double* in, double* out) {
    subspace::add_scaled(lanes(n), factor, in, out);
  }
  static void scale(Index n, double factor, double* row) {
    for (Index i = 0; i < n; ++i) row[i] *= factor;
  }
  static void subtract_rows(Index count, Index n, const double* factors, const double* rows, Index ld, double* out) {
    for (Index q = 0; q < count; ++q) add_scaled(n, -factors[q], rows + q * ld, out);
  }
  static void combine(Index size, Index count, const double* shares, const double* matrices, double* out) {
    std::fill(out, out + size, 0.0);
    for (Index n = 0; n < count; ++n) subspace::add_scaled(size, shares[n], matrices + n * size, out);
  }

  static double squared_distance(Index size, const double* a, const double* b) {
    return subspace::squared_distance(size, a, b);
  }
  static void multiply(Index m, Index n, Index depth, const double* a, Index row_stride, Index column_stride,
                       const double* b, Index ldb, double* c, Index ldc) {
    subspace::multiply(m, n, depth, a, row_stride, column_stride, b, ldb, c, ldc);
  }
  static void add_product(Index m, Index n, Index depth, const double* a, Index lda, const double* b, Index ldb,
                          double* c, Index ldc) {
    subspace::add_product(m, n, depth, a, lda, b, ldb, c, ldc);
  }
  static void gram(Index m, Index n, const double* matrix, Index ld, double* g, double* packed) {
    subspace::gram(m, n, matrix, ld, g, packed);
  }
  static void transpose(Index rows, Index columns, const double* in, Index ld_in, double* out, Index ld_out) {
    subspace::transpose(rows, columns, in, ld_in, out, ld_out);
  }
  static void tridiagonalise(Index n, double* a, Index ld, double* diagonal, double* below, double* reflectors,
                             double* tau, double* panel) {
    subspace::tridiagonalise(n, a, ld, diagonal, below, reflectors, tau, panel);
  }
  static void largest_eigenvalues(Index n, const double* diagonal, const double* squares, double bound, Index count,
                                  double* values) {
    subspace::largest_eigenvalues(n, diagonal, squares, bound, count, values);
  }
};

}  // namespace

std::int64_t irls_workspace(const IrlsJob& job) { return IrlsRoom<Core>(IrlsShape<Core::Index>(job), nullptr).used; }

void irls_cpu(const IrlsJob& job) {
  const IrlsShape<Core::Index> shape(job);
  const std::int64_t doubles = irls_workspace(job);
  std::atomic<std::int64_t> next{0};
  run_on_threads(std::min(job.workers, job.layers), [&](std::int64_t worker) {
    double* workspace = job.workspace + worker * doubles;
    std::fill(workspace, workspace + doubles, 0.0);  // padding stays zero from here on
    const IrlsRoom<Core> room(shape, workspace);
    for (std::int64_t layer = next.fetch_add(1); layer < job.layers; layer = next.fetch_add(1)) {
      const IrlsOutputs out(job, shape, layer);
      IrlsLayer<Core>(shape, job, room, out).solve();
    }
  });
}

}  // namespace subspace
