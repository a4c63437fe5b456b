// out = cast(base + scale * (left mid) right^T): a low-rank update added to a matrix in one pass, rounded once.
//
// The effective weight of a layer is one job (base = w, left = U, mid = c, right = V). So is the low-rank part of the
// plan beside it, forward (base = out = y, left = p, mid = c^T, right = U) and backward (dx, g, c, V).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace subspace {

// Sixteen words of eight bytes; arrays of jobs are filled in Python (subspace_ext/ops/rank_update.py).
struct RankUpdate {
  const void* base;          // [rows, columns], columns of stride 1
  std::int64_t base_stride;  // from row to row, in elements, here and below
  const void* left;          // [rows, K], columns of stride 1
  std::int64_t left_stride;
  const float* mid;          // [K, K], element (i, j) at mid[i * mid_row + j * mid_column]
  std::int64_t mid_row;
  std::int64_t mid_column;
  const float* right;        // [columns, K], columns of stride 1
  std::int64_t right_stride;
  void* out;                 // [rows, columns], columns of stride 1; may be base itself where the dtypes agree
  std::int64_t out_stride;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t rank;         // K, at most kRankUpdateMaxRank
  double scale;
  std::int64_t first_block;  // blocks of the jobs before this one; set by rank_update_plan
};
static_assert(sizeof(RankUpdate) == 16 * 8, "Python fills an array of sixteen words a job");

// The left factor of a block's rows stays in shared memory, so a card sets a limit of its own too.
constexpr std::int64_t kRankUpdateMaxRank = 384;

// The largest K whose blocks need at most `shared_bytes` of shared memory; 0 where none does.
std::int64_t rank_update_max_rank(std::int64_t shared_bytes);

struct RankUpdateTypes {
  DType base;
  DType left;
  DType out;
};

enum class Rounding : int { kNearest = 0, kStochastic = 1 };

struct RankUpdatePlan {
  std::int64_t blocks;           // of the whole launch
  std::int64_t tiles_per_block;  // column tiles that one block works through
};

// Sets first_block of every job [count]; host memory.
RankUpdatePlan rank_update_plan(RankUpdate* jobs, std::int64_t count);

// Queues all jobs as one kernel on `stream` of the current device; neither allocates nor waits.
//   jobs [count] planned, host memory;  device_jobs: the same array in device memory, needed for count > 1
// Types: any base and out with a float32 left; else base, left and out alike. Element (i, j) is rounded stochastically
// by a hash of `seed` and i * columns + j; float32 results are always rounded to nearest.
// Throws std::invalid_argument for a rank or types outside these rules, std::runtime_error when the launch is refused.
void rank_update_cuda(const RankUpdate* jobs, const RankUpdate* device_jobs, std::int64_t count,
                      const RankUpdatePlan& plan, const RankUpdateTypes& types, Rounding rounding, std::int64_t seed,
                      void* stream);

// Does all jobs on up to `threads` threads of the CPU, a stripe of rows at a time; every element is summed in one order.
//   jobs [count], first_block not used; base and left float32, any K; out: float32, or bfloat16 rounded to nearest
// Throws std::invalid_argument for another type.
void rank_update_cpu(const RankUpdate* jobs, std::int64_t count, DType out, std::int64_t threads);

}  // namespace subspace
