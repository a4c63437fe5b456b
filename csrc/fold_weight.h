// w_eff = cast(w + scale * left right^T): a frozen weight with its low-rank update, rounded once.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace subspace {

struct FoldWeight {
  const void* w;             // [out, in], rows of stride w_stride, columns of stride 1
  DType w_dtype;
  std::int64_t w_stride;     // elements
  const float* left;         // [out, K], the product u c, rows of stride left_stride
  std::int64_t left_stride;
  const float* right;        // [in, K], v, rows of stride right_stride
  std::int64_t right_stride;
  void* w_eff;               // [out, in], rows of stride w_eff_stride; may be w itself where the dtypes agree
  DType w_eff_dtype;
  std::int64_t w_eff_stride;
  std::int64_t out;
  std::int64_t in;
  std::int64_t rank;         // K
  float scale;
};

// Queues the kernel on `stream` (a cudaStream_t) of the current device; neither allocates nor waits.
// Throws std::runtime_error when the launch is refused.
void fold_weight_cuda(const FoldWeight& arguments, void* stream);

}  // namespace subspace
