// What both loops of IRLS, on CPU and GPU, decide by the sizes alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "irls.h"

namespace subspace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();

// Vectors carried beyond k, and beyond r where that is more: M's values drop after the r-th if adapters share their
// subspace, and a block of m makes the subspace iteration converge by (s[m+1] / s[k])^2 a step.
constexpr std::int64_t kGuard = 8;
// A step costs about a twelfth of a full decomposition at the sizes of interest.
constexpr int kWarmSteps = 8;
constexpr int kColdSteps = 12;
// Residual of a singular pair, relative to the largest value, at which it counts as exact.
constexpr double kConverged = 256 * kEpsilon;
// Of a block's last value to its first, for its last vectors to mean anything.
constexpr double kSmallestRatio = 1e-10;

// A layer is turned so that its cores are tall, sm >= sn.
struct IrlsShape {
  std::int64_t adapters, rank, columns, sm, sn, k, block;
  bool swapped;
};

inline IrlsShape irls_shape(const IrlsSizes& sizes) {
  IrlsShape shape;
  shape.adapters = sizes.adapters;
  shape.rank = sizes.rank;
  shape.columns = sizes.adapters * sizes.rank;
  shape.swapped = sizes.sb < sizes.sa;
  shape.sm = std::max(sizes.sb, sizes.sa);
  shape.sn = std::min(sizes.sb, sizes.sa);
  shape.k = sizes.k;
  // Beyond a third of the core the full decomposition is the cheaper one.
  shape.block = sizes.k;
  for (const std::int64_t wanted : {sizes.k, sizes.rank}) {
    const std::int64_t block = std::max(sizes.k, wanted) + kGuard;
    if (3 * block <= shape.sn) shape.block = block;
  }
  return shape;
}

}  // namespace subspace
