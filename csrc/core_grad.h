// dc = scale * g^T p: the gradient of the core, a product that is short in both results and long in the sum.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace subspace {

struct CoreGrad {
  const void* g;          // [T, K], columns of stride 1
  std::int64_t g_stride;  // from row to row, in elements
  const void* p;          // [T, K], columns of stride 1
  std::int64_t p_stride;
  DType dtype;            // of g and p
  float* partial;         // [splits, K, K], scratch
  float* dc;              // [K, K] contiguous
  std::int64_t tokens;    // T
  std::int64_t rank;      // K
  std::int64_t splits;
  float scale;
};

// Into how many runs of tokens the sum is best cut; the result depends on nothing else.
std::int64_t core_grad_splits(std::int64_t tokens, std::int64_t rank);

// Queues two kernels on `stream` of the current device; neither allocates nor waits. The runs are added in a fixed
// order, so equal inputs give equal bits. Throws std::runtime_error when a launch is refused.
void core_grad_cuda(const CoreGrad& arguments, void* stream);

}  // namespace subspace
