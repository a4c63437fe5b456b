// The leading singular subspace of a matrix that has moved little since it was last decomposed.
#pragma once

#include <cstdint>

namespace subspace {

// Room for the block of right vectors and its images, each padded and row-major.
struct LeadingBlock {
  std::int64_t rows;  // m, vectors in the block
  double* vt;         // [m, ldn] right vectors as rows, orthonormal; the start, and then the result
  double* yt;         // [m, ldm] images M v
  double* zt;         // [m, ldn] images M^T u
  double* values;     // [m] Ritz values, descending
  double* norms;      // [m]
};

// Block subspace iteration with Rayleigh-Ritz for M [sm, sn], given with its transpose.
//   matrix [sm, ldn], transposed [sn, ldm], remainder [sm, ldn] (overwritten), gram [sn, ldn] (overwritten)
// Returns true when the first k rows of block.vt span the leading right singular subspace: each is a singular vector
// to rounding, and a bound on everything outside them shows that no larger singular value was missed. Returns false,
// with block.vt of no use, when that cannot be had in `max_steps`; the caller then takes the full decomposition.
bool leading_subspace(std::int64_t sm, std::int64_t sn, std::int64_t k, const double* matrix, std::int64_t ldn,
                      const double* transposed, std::int64_t ldm, int max_steps, const LeadingBlock& block,
                      double* remainder, double* gram);

}  // namespace subspace
