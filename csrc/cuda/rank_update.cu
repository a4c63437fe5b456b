#include "rank_update.h"

#include <algorithm>
#include <type_traits>

#include "check.h"
#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "cuda/multiply.cuh"

namespace subspace {
namespace {

// A block of eight warps, two below and four beside each other, makes 64 x 128 tiles of the result, one after another
// along its rows. It is bound by reading base and writing out; the tensor cores have an order of magnitude to spare.
constexpr int kThreads = 256;
constexpr int kRows = 64;
constexpr int kColumns = 128;
constexpr int kDepth = 32;
constexpr int kWarpRows = 32;
constexpr int kWarpColumns = 32;
// Rows of a tile in shared memory start four banks apart: the eight rows and four columns that a warp reads at a time
// then lie in 32 different banks.
constexpr int kStride = kDepth + 4;

// Blocks that a multiprocessor holds at a time at K = 64, by its shared memory: 64 KB on Turing, 100 on Ampere's and
// Blackwell's smaller cards and on Ada, 163 or more on the others. Fewer registers than that leaves would be of no use.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocksPlaced = 1;
#else
constexpr int kBlocksPlaced = 2;
#endif

constexpr std::int64_t kBlocksWanted = 1024;  // two to three for each place on a large card

__host__ __device__ constexpr std::int64_t round_up(std::int64_t size, std::int64_t step) {
  return (size + step - 1) / step * step;
}

std::size_t shared_bytes(std::int64_t rank) {
  const std::int64_t stripe = kRows * (round_up(rank, kDepth) + 4);
  return static_cast<std::size_t>(stripe + kRows * kStride + 2 * kColumns * kStride) * sizeof(float);
}

// The column of a tile that its row `index` in shared memory holds. Within sixteen columns they are dealt out so that a
// thread's sums of two neighbouring 8-column tiles are four neighbouring columns.
__device__ int column_of(int index) {
  return (index & ~15) + ((index >> 1) & 3) * 4 + ((index >> 3) & 1) * 2 + (index & 1);
}

__device__ int job_of(const RankUpdate* jobs, int count, std::int64_t block) {
  int low = 0;
  for (int high = count; high - low > 1;) {
    const int middle = (low + high) / 2;
    if (jobs[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Parts of a factor that the products need for a result of this type: bfloat16 keeps 8 bits, float16 keeps 11.
template <class Out>
constexpr int kPartsOf = std::is_same_v<Out, bf16> ? 1 : std::is_same_v<Out, fp16> ? 2 : 3;

template <class Base, class Left, class Out>
class Block {
 public:
  using Tile = WarpTile<kWarpRows / 16, kWarpColumns / 8>;

  __device__ Block(const RankUpdate& job, std::int64_t first_row, Rounding rounding, std::int64_t seed)
      : job_(job),
        first_row_(first_row),
        rounding_(rounding),
        seed_(static_cast<std::uint64_t>(seed)),
        depth_(static_cast<int>(round_up(job.rank, kDepth))),
        stripe_stride_(depth_ + 4),
        stripe_(reinterpret_cast<float*>(dynamic_shared())),
        left_(stripe_ + kRows * stripe_stride_),
        right_(left_ + kRows * kStride),
        warp_row_(static_cast<int>(threadIdx.x) / 128 * kWarpRows),
        warp_column_(static_cast<int>(threadIdx.x) / 32 % 4 * kWarpColumns),
        g_(static_cast<int>(threadIdx.x) % 32 / 4),
        t_(static_cast<int>(threadIdx.x) % 4) {}

  // stripe [kRows, depth] = scale * left mid, zero outside the job.
  __device__ void make_stripe() {
    const float scale = static_cast<float>(job_.scale);
    for (int column = 0; column < depth_; column += kColumns) {
      Tile tile;
      for (int k = 0; k < depth_; k += kDepth) {
        __syncthreads();
        load_left(k);
        load_mid(column, k);
        __syncthreads();
        multiply(tile, left_ + warp_row_ * kStride, kStride, right_);
      }
      for_each_four([&](int i, int half, int j) {
        float* out = stripe_ + row_of(i, half) * stripe_stride_ + column;
        for (int q = 0; q < 4; ++q) {
          const int own = first_column_of(j) + q;
          if (column + own < depth_) out[own] = scale * tile.sum[i][2 * j + q / 2][2 * half + q % 2];
        }
      });
    }
    __syncthreads();
  }

  // The tiles of `count` x kColumns columns from `first` on.
  __device__ void make_tiles(std::int64_t first, int count) {
    const int steps = depth_ / kDepth;
    const bool vector_base = aligned(job_.base, job_.base_stride, sizeof(Base));
    const bool vector_out = aligned(job_.out, job_.out_stride, sizeof(Out));
    const bool vector_right = job_.right_stride % 4 == 0 && job_.rank % 4 == 0 && address(job_.right) % 16 == 0;
    int fetched = 0;
    const auto fetch = [&] {
      if (fetched < count * steps) {
        fetch_right(first + fetched / steps * kColumns, fetched % steps * kDepth, fetched % 2, vector_right);
      }
      commit_copies();
      ++fetched;
    };
    fetch();
    for (int number = 0; number < count; ++number) {
      const std::int64_t column = first + static_cast<std::int64_t>(number) * kColumns;
      Four<Base> base[kWarpRows / 16][2][kWarpColumns / 16];
      load_base(base, column, vector_base);
      Tile tile;
      for (int step = 0; step < steps; ++step) {
        const int buffer = (fetched + 1) % 2;
        fetch();
        wait_copies<1>();
        __syncthreads();
        multiply(tile, stripe_ + warp_row_ * stripe_stride_ + step * kDepth, stripe_stride_,
                 right_ + buffer * kColumns * kStride);
        __syncthreads();
      }
      store(tile, base, column, vector_out);
    }
  }

 private:
  static __device__ std::uint64_t address(const void* p) { return reinterpret_cast<std::uint64_t>(p); }

  // Whether four columns can be moved as one everywhere in the matrix.
  __device__ bool aligned(const void* start, std::int64_t stride, std::size_t size) const {
    return stride % 4 == 0 && job_.columns % 4 == 0 && address(start) % (4 * size) == 0;
  }

  __device__ void multiply(Tile& tile, const float* left, int left_stride, const float* right) {
    const float* own_right = right + warp_column_ * kStride;
    tile.template multiply<kPartsOf<Out>, kDepth>([&](int i, int k) { return left[i * left_stride + k]; },
                                           [&](int k, int j) { return own_right[j * kStride + k]; });
  }

  __device__ void load_left(int k) {
    const auto* left = static_cast<const Left*>(job_.left);
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kDepth; i += kThreads) {
      const int row = i / kDepth, column = k + i % kDepth;
      const bool inside = first_row_ + row < job_.rows && column < job_.rank;
      left_[row * kStride + i % kDepth] = inside ? load(left + (first_row_ + row) * job_.left_stride + column) : 0.0f;
    }
  }

  // Row i of the tile is column `column` + column_of(i) of mid.
  __device__ void load_mid(int column, int k) {
    for (int i = static_cast<int>(threadIdx.x); i < kColumns * kDepth; i += kThreads) {
      const int index = i % kColumns, row = k + i / kColumns;
      const int own = column + column_of(index);
      const bool inside = row < job_.rank && own < job_.rank;
      right_[index * kStride + i / kColumns] = inside ? job_.mid[row * job_.mid_row + own * job_.mid_column] : 0.0f;
    }
  }

  __device__ void fetch_right(std::int64_t column, int k, int buffer, bool vector) {
    float* out = right_ + buffer * kColumns * kStride;
    const int width = vector ? 4 : 1;
    const int per_row = kDepth / width;
    for (int i = static_cast<int>(threadIdx.x); i < kColumns * per_row; i += kThreads) {
      const int index = i / per_row, q = i % per_row * width;
      const std::int64_t own = column + column_of(index);
      const bool inside = own < job_.columns && k + q < job_.rank;
      const float* in = inside ? job_.right + own * job_.right_stride + k + q : job_.right;
      if (vector) {
        copy_async<16>(out + index * kStride + q, in, inside);
      } else {
        copy_async<4>(out + index * kStride + q, in, inside);
      }
    }
  }

  // A thread's sums are groups of four neighbouring columns: group (i, half, j) lies in row row_of(i, half) of the tile
  // from column first_column_of(j) on, element q at sum[i][2 j + q / 2][2 half + q % 2].
  __device__ int row_of(int i, int half) const { return warp_row_ + 16 * i + 8 * half + g_; }
  __device__ int first_column_of(int j) const { return warp_column_ + 16 * j + 4 * t_; }

  template <class Visit>
  static __device__ void for_each_four(Visit visit) {
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < kWarpColumns / 16; ++j) visit(i, half, j);
      }
    }
  }

  // What store() will need, asked for before the products so that they hide the wait.
  __device__ void load_base(Four<Base> (&base)[kWarpRows / 16][2][kWarpColumns / 16], std::int64_t column,
                            bool vector) {
    for_each_four([&](int i, int half, int j) {
      const std::int64_t row = first_row_ + row_of(i, half), own = column + first_column_of(j);
      const auto* in = static_cast<const Base*>(job_.base) + row * job_.base_stride + own;
      if (vector && row < job_.rows && own < job_.columns) {
        base[i][half][j] = *reinterpret_cast<const Four<Base>*>(in);
      } else {
        for (int q = 0; q < 4; ++q) {
          base[i][half][j].at[q] = row < job_.rows && own + q < job_.columns ? in[q] : Base{};
        }
      }
    });
  }

  __device__ void store(const Tile& tile, const Four<Base> (&base)[kWarpRows / 16][2][kWarpColumns / 16],
                        std::int64_t column, bool vector) {
    for_each_four([&](int i, int half, int j) {
      const std::int64_t row = first_row_ + row_of(i, half), own = column + first_column_of(j);
      Four<Out> values;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float value = load(&base[i][half][j].at[q]) + tile.sum[i][2 * j + q / 2][2 * half + q % 2];
        if (rounding_ == Rounding::kNearest) {
          round_nearest(value, &values.at[q]);
        } else {
          round_stochastic(value, seed_, static_cast<std::uint64_t>(row * job_.columns + own + q), &values.at[q]);
        }
      }
      auto* out = static_cast<Out*>(job_.out) + row * job_.out_stride + own;
      if (vector && row < job_.rows && own < job_.columns) {
        *reinterpret_cast<Four<Out>*>(out) = values;
      } else {
        for (int q = 0; q < 4; ++q) {
          if (row < job_.rows && own + q < job_.columns) out[q] = values.at[q];
        }
      }
    });
  }

  const RankUpdate& job_;
  const std::int64_t first_row_;
  const Rounding rounding_;
  const std::uint64_t seed_;
  const int depth_;          // K rounded up to whole steps
  const int stripe_stride_;
  float* const stripe_;      // [kRows, stripe_stride]
  float* const left_;        // [kRows, kStride]
  float* const right_;       // two of [kColumns, kStride]
  const int warp_row_, warp_column_, g_, t_;
};

template <class Base, class Left, class Out>
__global__ void __launch_bounds__(kThreads, kPartsOf<Out> == 3 ? 1 : kBlocksPlaced)
    rank_update_kernel(const RankUpdate single, const RankUpdate* jobs, int count, int tiles_per_block,
                       Rounding rounding, std::int64_t seed) {
  __shared__ RankUpdate job;
  if (threadIdx.x == 0) job = jobs ? jobs[job_of(jobs, count, blockIdx.x)] : single;
  __syncthreads();
  const std::int64_t stripes = (job.rows + kRows - 1) / kRows;
  const std::int64_t block = blockIdx.x - job.first_block;
  const std::int64_t first_tile = block / stripes * tiles_per_block;
  const std::int64_t tiles = (job.columns + kColumns - 1) / kColumns - first_tile;
  Block<Base, Left, Out> worker(job, block % stripes * kRows, rounding, seed);
  worker.make_stripe();
  worker.make_tiles(first_tile * kColumns, static_cast<int>(tiles < tiles_per_block ? tiles : tiles_per_block));
}

std::int64_t tiles_of(std::int64_t size, std::int64_t tile) { return (size + tile - 1) / tile; }

}  // namespace

std::int64_t rank_update_max_rank(std::int64_t bytes) {
  std::int64_t rank = kRankUpdateMaxRank;
  while (rank > 0 && shared_bytes(rank) > static_cast<std::size_t>(bytes)) rank -= kDepth;
  return rank;
}

RankUpdatePlan rank_update_plan(RankUpdate* jobs, std::int64_t count) {
  std::int64_t tiles = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    tiles += tiles_of(jobs[i].rows, kRows) * tiles_of(jobs[i].columns, kColumns);
  }
  // Longer rows of tiles use a stripe more often; short ones fill the card where there are few.
  RankUpdatePlan plan{0, std::clamp<std::int64_t>(tiles / kBlocksWanted, 1, 32)};
  for (std::int64_t i = 0; i < count; ++i) {
    jobs[i].first_block = plan.blocks;
    plan.blocks += tiles_of(jobs[i].rows, kRows) * tiles_of(tiles_of(jobs[i].columns, kColumns), plan.tiles_per_block);
  }
  return plan;
}

void rank_update_cuda(const RankUpdate* jobs, const RankUpdate* device_jobs, std::int64_t count,
                      const RankUpdatePlan& plan, const RankUpdateTypes& types, Rounding rounding, std::int64_t seed,
                      void* stream) {
  if (plan.blocks == 0) return;
  SUBSPACE_CHECK(plan.blocks < (std::int64_t{1} << 31), "rank_update: blocks must be below 2^31, got ", plan.blocks);
  SUBSPACE_CHECK(count == 1 || device_jobs, "rank_update: device_jobs must be given for more than one job, got null");
  std::int64_t rank = 0;
  for (std::int64_t i = 0; i < count; ++i) rank = std::max(rank, jobs[i].rank);
  SUBSPACE_CHECK(rank <= kRankUpdateMaxRank, "rank_update: rank must be at most ", kRankUpdateMaxRank, ", got ", rank);
  const auto queue = [&](auto base, auto left, auto out) {
    using Base = std::remove_pointer_t<decltype(base)>;
    using Left = std::remove_pointer_t<decltype(left)>;
    using Out = std::remove_pointer_t<decltype(out)>;
    launch("rank_update", rank_update_kernel<Base, Left, Out>, dim3(static_cast<unsigned>(plan.blocks)), kThreads,
           shared_bytes(rank), stream, jobs[0], count > 1 ? device_jobs : nullptr, static_cast<int>(count),
           static_cast<int>(plan.tiles_per_block), rounding, seed);
  };
  if (types.left == DType::kFloat32) {
    with_element(types.base, [&](auto base) {
      with_element(types.out, [&](auto out) { queue(base, static_cast<float*>(nullptr), out); });
    });
    return;
  }
  SUBSPACE_CHECK(types.base == types.left && types.out == types.left,
                 "rank_update: base and out must have the type of a left that is not float32, got codes ",
                 static_cast<int>(types.base), ", ", static_cast<int>(types.left), " and ",
                 static_cast<int>(types.out));
  if (types.left == DType::kBFloat16) {
    queue(static_cast<bf16*>(nullptr), static_cast<bf16*>(nullptr), static_cast<bf16*>(nullptr));
  } else {
    queue(static_cast<fp16*>(nullptr), static_cast<fp16*>(nullptr), static_cast<fp16*>(nullptr));
  }
}

}  // namespace subspace
