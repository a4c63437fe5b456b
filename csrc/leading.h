// Leading right singular vectors of a matrix, written once for a CPU core and for a block of a GPU's threads.
//
// What differs is the Machine, a class of static functions that all its threads call together:
//   Index, pad(n)                  its integer, and the length it gives to a row of n
//   each(n, f), rows(n, f)         f(i) for all i < n: by threads, and by groups of threads that share the work inside
//   dot, add_scaled, scale         such work, on rows of n; only inside rows()
//   sum(n, f), largest(n, f)       of f(i) over all i < n, the same number for every thread
//   multiply, add_product, gram, transpose, subtract_rows, tridiagonalise, largest_eigenvalues     as in cpu/dense.h
// Every function returns when all threads have finished it. Sizes are those without padding, which is zero throughout.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifndef SUBSPACE_FN
#define SUBSPACE_FN    // in front of a function that a Machine runs
#define SUBSPACE_STEP  // of one that is better not inlined
#define SUBSPACE_BOTH  // of one that the host calls too
#endif

namespace subspace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// x <- (T - shift)^-1 x for a tridiagonal T, by elimination with partial pivoting. A pivot below `smallest` becomes it.
// scratch [3 n]
template <class Index>
SUBSPACE_STEP SUBSPACE_FN void solve_shifted(Index n, const double* diagonal, const double* below, double shift,
                                             double smallest, double* x, double* scratch) {
  double *pivots = scratch, *next = scratch + n, *after = scratch + 2 * n;
  double head = diagonal[0] - shift, second = n > 1 ? below[1] : 0.0, right = x[0];
  for (Index i = 0; i + 1 < n; ++i) {
    const double low = below[i + 1], low_diagonal = diagonal[i + 1] - shift, low_second = i + 2 < n ? below[i + 2] : 0.0;
    const double low_right = x[i + 1];
    if (std::fabs(head) >= std::fabs(low)) {
      if (std::fabs(head) < smallest) head = head < 0.0 ? -smallest : smallest;
      const double factor = low / head;
      pivots[i] = head;
      next[i] = second;
      after[i] = 0.0;
      x[i] = right;
      head = low_diagonal - factor * second;
      second = low_second;
      right = low_right - factor * right;
    } else {
      const double factor = head / low;
      pivots[i] = low;
      next[i] = low_diagonal;
      after[i] = low_second;
      x[i] = low_right;
      head = second - factor * low_diagonal;
      second = -factor * low_second;
      right -= factor * low_right;
    }
  }
  if (std::fabs(head) < smallest) head = head < 0.0 ? -smallest : smallest;
  double one = right / head, two = 0.0;
  x[n - 1] = one;
  for (Index i = n - 2; i >= 0; --i) {
    const double value = (x[i] - next[i] * one - after[i] * two) / pivots[i];
    x[i] = value;
    two = one;
    one = value;
  }
}

template <class Machine>
class LeadingVectors {
 public:
  using Index = typename Machine::Index;

  // Scratch for matrices of at most m rows and n columns and for `count` vectors.
  struct Room {
    double *rest, *packed;                            // [m, pad(n)]
    double *gram, *reflectors;                        // [n, pad(n)]
    double* panel;                                    // Machine::panel_doubles(n)
    double *diagonal, *below, *squares, *tau;         // [n]
    double *values, *products;                        // [count]
    double* elimination;                              // [count, 3 n]
    double *columns, *images;                         // [n, pad(count)] and [m, pad(count)]
  };

  template <class Take>
  SUBSPACE_BOTH static Room place(Index m, Index n, Index count, Take take) {
    const std::int64_t ld = Machine::pad(n), narrow = Machine::pad(count);
    Room room;
    room.rest = take(m * ld);
    room.packed = take(Machine::kPacks ? m * ld : 0);
    room.gram = take(n * ld);
    room.reflectors = take(n * ld);
    room.panel = take(Machine::panel_doubles(n));
    room.diagonal = take(ld);
    room.below = take(ld);
    room.squares = take(ld);
    room.tau = take(ld);
    room.values = take(narrow);
    room.products = take(narrow);
    room.elimination = take(count * 3 * ld);
    room.columns = take(n * narrow);
    room.images = take(m * narrow);
    return room;
  }

  // x [count, pad(n)] receives orthonormal rows that span the leading right singular subspace of M [m, pad(n)]; zero
  // rows where the singular values are at rounding level. False when the vectors found do not have the eigenvalues'
  // sum, which is known independently of them, so that something was missed.
  //
  // The vectors are eigenvectors of M^T M, which keeps those to rounding whose singular value is not far below the
  // largest. What is left of M without them is taken in the same way, and so on.
  SUBSPACE_STEP SUBSPACE_FN static bool find(const Room& room, Index m, Index n, Index count, const double* matrix,
                                             double* x) {
    const Index ld = Machine::pad(n);
    Machine::each(count * ld, [&](Index i) { x[i] = 0.0; });
    double size = Machine::largest(m * ld, [&](Index i) { return std::fabs(matrix[i]); });
    if (size == 0.0) return true;
    double unit = power_of_two(size), relative = 1.0;
    Machine::each(m * ld, [&](Index i) { room.rest[i] = matrix[i] * unit; });
    const double first = size * unit, negligible = kEpsilon * static_cast<double>(m > n ? m : n);
    Index found = 0;
    for (int level = 0; level < kLevels; ++level) {
      Machine::gram(m, n, room.rest, ld, room.gram, room.packed);
      const Index kept = eigenvectors(room, n, count - found, x + found * ld);
      if (kept == 0) return false;
      if (found > 0) orthonormalise(room, n, found, found + kept, x);
      found += kept;
      if (found == count) return true;
      remove(room, m, n, found, x);
      size = Machine::largest(m * ld, [&](Index i) { return std::fabs(room.rest[i]); });
      if (!(size * relative > negligible * first)) return true;
      unit = power_of_two(size);
      relative /= unit;
      Machine::each(m * ld, [&](Index i) { room.rest[i] *= unit; });
    }
    return false;
  }

 private:
  // Eigenvalues of M^T M below this share of the largest are left for the next level: their vectors would keep
  // 2^-52 / kShare of their accuracy.
  static constexpr double kShare = 1e-4;
  static constexpr int kLevels = 12;
  static constexpr int kRounds = 3;
  static constexpr double kMissed = 1e-10;

  SUBSPACE_FN static double power_of_two(double size) {
    const int exponent = std::ilogb(size);
    return std::scalbn(1.0, exponent > -1000 ? -exponent : 1000);
  }

  // Rows of x for the eigenvalues of room.gram, which is destroyed; how many, at most `wanted`. 0 when they are wrong.
  SUBSPACE_STEP SUBSPACE_FN static Index eigenvectors(const Room& room, Index n, Index wanted, double* x) {
    const Index ld = Machine::pad(n);
    Machine::tridiagonalise(n, room.gram, ld, room.diagonal, room.below, room.reflectors, room.tau, room.panel);
    Machine::each(n, [&](Index i) { room.squares[i] = room.below[i] * room.below[i]; });
    const double bound = Machine::largest(n, [&](Index i) {
      return std::fabs(room.diagonal[i]) + std::fabs(room.below[i]) + (i + 1 < n ? std::fabs(room.below[i + 1]) : 0.0);
    });
    Machine::largest_eigenvalues(n, room.diagonal, room.squares, bound, wanted, room.values);
    Index kept = 0;
    while (kept < wanted && room.values[kept] > kShare * room.values[0]) ++kept;
    if (!(std::fabs(inverse_iteration(room, n, kept, bound, x)) <= kMissed * bound)) return 0;
    Machine::rows(kept, [&](Index j) {
      for (Index i = 1; i < n; ++i) {
        const double* reflector = room.reflectors + i * ld;
        if (room.tau[i] == 0.0) continue;
        Machine::add_scaled(i, -room.tau[i] * Machine::dot(i, reflector, x + j * ld), reflector, x + j * ld);
      }
    });
    return kept;
  }

  // Rows of x for the first `kept` eigenvalues of the tridiagonal matrix. Returns by how much their sum is missed.
  SUBSPACE_STEP SUBSPACE_FN static double inverse_iteration(const Room& room, Index n, Index kept, double bound,
                                                            double* x) {
    const Index ld = Machine::pad(n);
    // Fixed pseudo-random numbers to start from: a result must not depend on what ran before.
    Machine::each(kept * n, [&](Index i) {
      std::uint64_t z = (static_cast<std::uint64_t>(i) + 1) * 0x9E3779B97F4A7C15ull;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
      x[i / n * ld + i % n] = static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53 - 0.5;
    });
    for (int round = 0; round < kRounds; ++round) {
      Machine::each(kept, [&](Index j) {
        solve_shifted(n, room.diagonal, room.below, room.values[j], kEpsilon * bound, x + j * ld,
                      room.elimination + j * 3 * ld);
      });
      orthonormalise(room, n, 0, kept, x);
    }
    return Machine::sum(kept, [&](Index j) {
      double sum = 0.0;
      for (Index i = 0; i < n; ++i) {
        const double value = x[j * ld + i], before = i > 0 ? x[j * ld + i - 1] : 0.0;
        sum += value * (room.diagonal[i] * value + 2.0 * room.below[i] * before);
      }
      return room.values[j] - sum;
    });
  }

  // Rows first .. end - 1 of x, each against all before it, twice.
  SUBSPACE_STEP SUBSPACE_FN static void orthonormalise(const Room& room, Index n, Index first, Index end, double* x) {
    const Index ld = Machine::pad(n);
    for (Index j = first; j < end; ++j) {
      double* row = x + j * ld;
      normalise(room, n, row);
      for (int pass = 0; pass < 2; ++pass) {
        Machine::rows(j, [&](Index q) { room.products[q] = Machine::dot(n, x + q * ld, row); });
        Machine::subtract_rows(j, n, room.products, x, ld, row);
        normalise(room, n, row);
      }
    }
  }

  SUBSPACE_FN static void normalise(const Room& room, Index n, double* row) {
    Machine::rows(1, [&](Index) { room.products[0] = Machine::dot(n, row, row); });
    const double factor = 1.0 / std::sqrt(room.products[0]);
    Machine::each(n, [&](Index i) { row[i] *= factor; });
  }

  // rest -= (rest x^T) x over the first `found` rows of x
  SUBSPACE_STEP SUBSPACE_FN static void remove(const Room& room, Index m, Index n, Index found, const double* x) {
    const Index ld = Machine::pad(n), narrow = Machine::pad(found);
    Machine::transpose(found, n, x, ld, room.columns, narrow);
    Machine::multiply(m, found, n, room.rest, ld, 1, room.columns, narrow, room.images, narrow);
    Machine::each(m * narrow, [&](Index i) { room.images[i] = i % narrow < found ? -room.images[i] : 0.0; });
    Machine::add_product(m, n, found, room.images, narrow, x, ld, room.rest, ld);
  }
};

}  // namespace subspace
