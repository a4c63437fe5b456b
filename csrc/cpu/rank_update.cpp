#include "rank_update.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/lane.h"
#include "cpu/threads.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define SUBSPACE_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SUBSPACE_MULTIVERSION
#endif

namespace subspace {
namespace {

// Sixteen floats: one AVX-512 register or two of AVX2.
SUBSPACE_LANE(Lane, float, 16);
constexpr std::int64_t kLane = 16;
constexpr std::int64_t kRows = 6;      // of a tile: its sums fill the registers of AVX2
constexpr std::int64_t kStripe = 96;   // rows that share the transposed columns of the right factor

SUBSPACE_INLINE const Lane& lane(const float* p) { return *reinterpret_cast<const Lane*>(p); }

std::int64_t round_up(std::int64_t size, std::int64_t step) { return (size + step - 1) / step * step; }

// sums [Rows, 16] = a [Rows, depth] b [depth, 16], both contiguous in their rows.
template <int Rows>
SUBSPACE_INLINE void multiply(std::int64_t depth, const float* a, std::int64_t a_stride, const float* b,
                              Lane (&sums)[kRows]) {
  for (int i = 0; i < Rows; ++i) sums[i] = Lane{};
  for (std::int64_t k = 0; k < depth; ++k) {
    const Lane right = lane(b + k * kLane);
    for (int i = 0; i < Rows; ++i) sums[i] += a[i * a_stride + k] * right;
  }
}

SUBSPACE_INLINE void store(const Lane& value, float* out) { *reinterpret_cast<Lane*>(out) = value; }

// To the nearest bfloat16, ties to even; NaN stays NaN.
SUBSPACE_INLINE void store(const Lane& value, std::uint16_t* out) {
  std::uint32_t bits[kLane];
  std::memcpy(bits, &value, sizeof bits);
  for (int i = 0; i < kLane; ++i) {
    const std::uint32_t rounded = bits[i] + 0x7fff + ((bits[i] >> 16) & 1);
    const bool is_nan = (bits[i] & 0x7fffffff) > 0x7f800000;
    out[i] = static_cast<std::uint16_t>((is_nan ? bits[i] | 0x400000 : rounded) >> 16);
  }
}

// Rows x 16 elements of out = base + sums, of which `width` columns exist.
template <int Rows, class Out>
SUBSPACE_INLINE void finish(const Lane (&sums)[kRows], const float* base, std::int64_t base_stride, Out* out,
                            std::int64_t out_stride, std::int64_t width) {
  for (int i = 0; i < Rows; ++i) {
    const float* in = base + i * base_stride;
    Out* result = out + i * out_stride;
    if (width == kLane) {
      store(lane(in) + sums[i], result);
    } else {
      float whole_in[kLane] = {};
      Out whole_out[kLane];
      std::copy(in, in + width, whole_in);
      store(lane(whole_in) + sums[i], whole_out);
      std::copy(whole_out, whole_out + width, result);
    }
  }
}

struct Scratch {
  std::vector<float> stripe, tile;
};

// One stripe of rows of one job. Everything is inlined into its clones, or the clones would gain nothing.
template <class Out>
SUBSPACE_INLINE void work(const RankUpdate& job, std::int64_t first, Scratch& scratch) {
  const std::int64_t rank = job.rank, depth = round_up(rank, kLane);
  const std::int64_t rows = std::min(kStripe, job.rows - first);
  const float scale = static_cast<float>(job.scale);
  scratch.stripe.resize(kStripe * depth);
  scratch.tile.resize(std::max<std::int64_t>(1, rank) * kLane);
  float* stripe = scratch.stripe.data();
  float* tile = scratch.tile.data();
  const float* left = static_cast<const float*>(job.left) + first * job.left_stride;
  Lane sums[kRows];
  // stripe = scale * left mid
  for (std::int64_t column = 0; column < depth; column += kLane) {
    for (std::int64_t k = 0; k < rank; ++k) {
      for (std::int64_t j = 0; j < kLane; ++j) {
        tile[k * kLane + j] =
            column + j < rank ? scale * job.mid[k * job.mid_row + (column + j) * job.mid_column] : 0.0f;
      }
    }
    std::int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      multiply<kRows>(rank, left + i * job.left_stride, job.left_stride, tile, sums);
      for (int r = 0; r < kRows; ++r) std::memcpy(stripe + (i + r) * depth + column, &sums[r], sizeof(Lane));
    }
    for (; i < rows; ++i) {
      multiply<1>(rank, left + i * job.left_stride, job.left_stride, tile, sums);
      std::memcpy(stripe + i * depth + column, &sums[0], sizeof(Lane));
    }
  }
  for (std::int64_t column = 0; column < job.columns; column += kLane) {
    const std::int64_t width = std::min(kLane, job.columns - column);
    for (std::int64_t j = 0; j < kLane; ++j) {
      const float* right = job.right + (column + j) * job.right_stride;
      for (std::int64_t k = 0; k < rank; ++k) tile[k * kLane + j] = j < width ? right[k] : 0.0f;
    }
    const float* base = static_cast<const float*>(job.base) + first * job.base_stride + column;
    Out* out = static_cast<Out*>(job.out) + first * job.out_stride + column;
    std::int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      multiply<kRows>(rank, stripe + i * depth, depth, tile, sums);
      finish<kRows>(sums, base + i * job.base_stride, job.base_stride, out + i * job.out_stride, job.out_stride, width);
    }
    for (; i < rows; ++i) {
      multiply<1>(rank, stripe + i * depth, depth, tile, sums);
      finish<1>(sums, base + i * job.base_stride, job.base_stride, out + i * job.out_stride, job.out_stride, width);
    }
  }
}

SUBSPACE_MULTIVERSION
void stripe_to_float(const RankUpdate& job, std::int64_t first, Scratch& scratch) { work<float>(job, first, scratch); }

SUBSPACE_MULTIVERSION
void stripe_to_bfloat16(const RankUpdate& job, std::int64_t first, Scratch& scratch) {
  work<std::uint16_t>(job, first, scratch);
}

}  // namespace

void rank_update_cpu(const RankUpdate* jobs, std::int64_t count, DType out, std::int64_t threads) {
  SUBSPACE_CHECK(out == DType::kFloat32 || out == DType::kBFloat16,
                 "rank_update: out must be float32 or bfloat16 on a CPU, got code ", static_cast<int>(out));
  std::vector<std::int64_t> first_stripe(1, 0);
  for (std::int64_t i = 0; i < count; ++i) {
    first_stripe.push_back(first_stripe.back() + (jobs[i].rows + kStripe - 1) / kStripe);
  }
  const std::int64_t stripes = first_stripe.back();
  std::atomic<std::int64_t> next{0};
  run_on_threads(std::min(threads, stripes), [&](std::int64_t) {
    Scratch scratch;
    for (std::int64_t s = next.fetch_add(1); s < stripes; s = next.fetch_add(1)) {
      const std::int64_t i = std::upper_bound(first_stripe.begin(), first_stripe.end(), s) - first_stripe.begin() - 1;
      (out == DType::kFloat32 ? stripe_to_float : stripe_to_bfloat16)(jobs[i], (s - first_stripe[i]) * kStripe,
                                                                      scratch);
    }
  });
}

}  // namespace subspace
