// The loop of cpu/irls.cpp with a block of threads for each layer: the same steps in the same order, float64
// throughout, so that weights, subspace and objective agree with it to rounding. Work is shared out inside a step: a
// warp takes a pair of rows, a thread a tile of a product.
#include "irls.h"

#include <algorithm>

#include "check.h"
#include "cuda/dense.cuh"
#include "cuda/launch.h"
#include "irls_shape.h"

namespace subspace {
namespace {

// In 32 bits, which the kernel counts in.
struct Shape {
  int adapters, rank, columns, sm, sn, k, block;
  bool swapped;
};

Shape shape_of(const IrlsSizes& sizes) {
  const IrlsShape shape = irls_shape(sizes);
  const auto narrow = [](std::int64_t size) { return static_cast<int>(size); };
  return {narrow(shape.adapters), narrow(shape.rank), narrow(shape.columns), narrow(shape.sm),
          narrow(shape.sn),       narrow(shape.k),    narrow(shape.block),   shape.swapped};
}

// One block's scratch memory, arrays one after another.
struct Workspace {
  double *deltas, *right, *matrix, *transposed, *fit, *vectors, *sorted, *vt, *yt, *zt, *values, *temporary, *share,
      *updated;
  std::int64_t used;
};

__host__ __device__ inline Workspace place(const Shape& shape, double* base) {
  Workspace work;
  work.used = 0;
  const auto take = [&](std::int64_t rows, std::int64_t columns) {
    double* start = base + work.used;
    work.used += rows * columns;
    return start;
  };
  work.deltas = take(static_cast<std::int64_t>(shape.adapters) * shape.sm, shape.sn);
  work.right = take(shape.columns, shape.sn);
  work.matrix = take(shape.sm, shape.sn);
  work.transposed = take(shape.sn, shape.sm);
  work.fit = take(shape.sm, shape.sn);
  work.vectors = take(shape.sn, shape.sm);
  work.sorted = take(shape.sn, shape.sm);
  work.vt = take(shape.sn, shape.sn);
  work.yt = take(shape.block, shape.sm);
  work.zt = take(shape.sn, shape.sn);
  work.values = take(1, shape.sn);
  work.temporary = take(1, shape.sn + shape.adapters);
  work.share = take(1, shape.adapters);
  work.updated = take(1, shape.adapters);
  return work;
}

class Layer {
 public:
  __device__ Layer(const Shape& shape, const IrlsSettings& settings, const Workspace& work)
      : shape_(shape), settings_(settings), work_(work), core_(shape.sm * shape.sn) {}

  // left [sm, N r], right [sn, N r]; the outputs point at this layer's part, u [sm, k] and v [sn, k].
  __device__ void solve(const double* left, const double* right, std::int64_t max_iter, const IrlsOutputs& out) {
    form_deltas(left, right);
    if (unit_ == 0.0) return fill_zero(max_iter, out);
    const int count = shape_.adapters;
    for_each(count, [&](int n) {
      work_.share[n] = 1.0 / count;
      out.weights[n] = 1.0;
    });
    for_each(static_cast<int>(max_iter) + 1, [&](int i) { out.objective[i] = nan(""); });
    std::int64_t iteration = 0;
    bool converged = settings_.p == 2.0;  // the weights are one whatever the residuals
    for (;; ++iteration) {
      weighted_mean();
      const bool last = converged || iteration == max_iter;
      if (last || !warm_decomposition()) full_decomposition();
      fit();
      const double objective = measure(out.residuals) * power(unit_, settings_.p);
      if (thread_id() == 0) out.objective[iteration] = objective;
      if (last) break;
      converged = reweight(out.residuals, out.weights) <= settings_.tol;
    }
    if (thread_id() == 0) {
      *out.n_iter = iteration;
      *out.converged = converged ? 1 : 0;
    }
    write(out);
  }

 private:
  __device__ void form_deltas(const double* left, const double* right) {
    transpose(shape_.sn, shape_.columns, right, work_.right);
    for (int n = 0; n < shape_.adapters; ++n) {
      double* delta = work_.deltas + static_cast<std::int64_t>(n) * core_;
      multiply(shape_.sm, shape_.sn, shape_.rank, left + n * shape_.rank, shape_.columns, 1,
               work_.right + n * shape_.rank * shape_.sn, shape_.sn, delta, shape_.sn);
      // The largest entry is taken out first, so that the squares can neither underflow nor overflow.
      double own = 0.0;
      for_each(core_, [&](int i) { own = fmax(own, fabs(delta[i])); });
      const double largest = block_max(own);
      double sum = 0.0;
      if (largest > 0.0) for_each(core_, [&](int i) { sum += (delta[i] / largest) * (delta[i] / largest); });
      const double norm = largest * sqrt(block_sum(sum));
      if (thread_id() == 0) work_.temporary[n] = norm;
    }
    __syncthreads();
    unit_ = positive_median(work_.temporary);
    if (unit_ > 0.0) {
      for (int n = 0; n < shape_.adapters; ++n) {
        double* delta = work_.deltas + static_cast<std::int64_t>(n) * core_;
        for_each(core_, [&](int i) { delta[i] /= unit_; });
      }
    }
    __syncthreads();
  }

  // Median of the positive norms (mean of the middle two for an even count); 0 when there is none.
  __device__ double positive_median(const double* norms) {
    int kept = 0;
    for (int i = 0; i < shape_.adapters; ++i) kept += norms[i] > 0.0;
    if (kept == 0) return 0.0;
    double lower = 0.0, upper = 0.0;
    for (int i = 0; i < shape_.adapters; ++i) {
      if (!(norms[i] > 0.0)) continue;
      int place = 0;
      for (int j = 0; j < shape_.adapters; ++j) {
        place += norms[j] > 0.0 && (norms[j] < norms[i] || (norms[j] == norms[i] && j < i));
      }
      if (place == (kept - 1) / 2) lower = norms[i];
      if (place == kept / 2) upper = norms[i];
    }
    return 0.5 * (lower + upper);
  }

  __device__ void weighted_mean() {
    __syncthreads();
    for_each(core_, [&](int i) {
      double sum = 0.0;
      for (int n = 0; n < shape_.adapters; ++n) {
        sum += work_.share[n] * work_.deltas[static_cast<std::int64_t>(n) * core_ + i];
      }
      work_.matrix[i] = sum;
    });
    transpose(shape_.sm, shape_.sn, work_.matrix, work_.transposed);
  }

  __device__ bool warm_decomposition() {
    if (shape_.block == shape_.k) return false;
    const bool cold = !block_ready_;
    if (cold) start_block();
    block_ready_ = leading_subspace(cold ? kColdSteps : kWarmSteps);
    return block_ready_;
  }

  // Fixed pseudo-random rows (SplitMix64 of their index): a result must not depend on what ran before.
  __device__ void start_block() {
    for_each(shape_.block * shape_.sn, [&](int i) {
      std::uint64_t z = (static_cast<std::uint64_t>(i) + 1) * 0x9E3779B97F4A7C15ull;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
      work_.vt[i] = static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53 - 0.5;
    });
    orthonormalise_block();
  }

  __device__ void orthonormalise_block() {
    orthogonalise_rows(shape_.block, work_.vt, shape_.sn, nullptr, 0, work_.temporary, work_.sorted, work_.values);
    for_each(shape_.block * shape_.sn, [&](int i) { work_.vt[i] /= work_.temporary[i / shape_.sn]; });
    __syncthreads();
  }

  // Block subspace iteration with Rayleigh-Ritz; see cpu/leading.h. True when the first k rows of vt span the leading
  // right singular subspace, to rounding and with a bound that nothing larger was missed.
  __device__ bool leading_subspace(int max_steps) {
    const int block = shape_.block, sm = shape_.sm, sn = shape_.sn;
    double previous = 0.0;
    for (int step = 0; step < max_steps; ++step) {
      multiply(block, sm, sn, work_.vt, sn, 1, work_.transposed, sm, work_.yt, sm);
      orthogonalise_rows(block, work_.yt, sm, work_.vt, sn, work_.values, work_.sorted, work_.temporary);
      if (!(work_.values[block - 1] > kSmallestRatio * work_.values[0])) return false;
      const auto [residual, coupling] = pair_residuals();
      const double target = kConverged * work_.values[0];
      if (residual <= target) return is_leading(coupling);
      if (step >= 2) {
        const double rate = residual / previous;
        const double steps_left = log(target / residual) / log(rate);
        if (!(rate < 1.0) || steps_left > max_steps - step) return false;
      }
      previous = residual;
      for_each(block * sn, [&](int i) { work_.vt[i] = work_.zt[i]; });
      orthonormalise_block();
    }
    return false;
  }

  struct Residuals {
    double largest;   // |M^T u_i - s_i v_i| over the first k pairs
    double coupling;  // sqrt(sum of s_i^2 |M^T u_i - s_i v_i|^2) over the rest of the block
  };

  // Leaves u_i in yt and M^T u_i in zt, for the whole block.
  __device__ Residuals pair_residuals() {
    const int block = shape_.block, sm = shape_.sm, sn = shape_.sn;
    for_each(block * sm, [&](int i) { work_.yt[i] /= work_.values[i / sm]; });
    multiply(block, sn, sm, work_.yt, sm, 1, work_.matrix, sn, work_.zt, sn);
    for (int i = warp_id(); i < block; i += kWarps) {
      double sum = 0.0;
      for (int j = lane_id(); j < sn; j += 32) {
        const double difference = work_.zt[i * sn + j] - work_.values[i] * work_.vt[i * sn + j];
        sum += difference * difference;
      }
      sum = warp_sum(sum);
      if (lane_id() == 0) work_.temporary[i] = sum;
    }
    __syncthreads();
    double largest = 0.0, coupling = 0.0;
    for (int i = 0; i < shape_.k; ++i) largest = fmax(largest, work_.temporary[i]);
    for (int i = shape_.k; i < block; ++i) coupling += work_.values[i] * work_.values[i] * work_.temporary[i];
    return {sqrt(largest), sqrt(coupling)};
  }

  // True when no singular value outside the first k can exceed the k-th; the bound of cpu/leading.cpp.
  __device__ bool is_leading(double coupling) {
    const int block = shape_.block, sm = shape_.sm, sn = shape_.sn;
    const double* values = work_.values;
    const double room = values[shape_.k - 1] * values[shape_.k - 1] - coupling;
    if (values[shape_.k] * values[shape_.k] > room) return false;
    double own = 0.0;
    for_each(core_, [&](int i) { own += work_.matrix[i] * work_.matrix[i]; });
    double outside = block_sum(own);
    for (int i = 0; i < block; ++i) outside -= values[i] * values[i];
    if (outside <= room) return true;
    if (!(sqrt(outside * outside / sn) <= room)) return false;
    for_each(block * sn, [&](int i) { work_.zt[i] = work_.vt[i] * values[i / sn]; });
    multiply(sm, sn, block, work_.yt, 1, sm, work_.zt, sn, work_.fit, sn);
    for_each(core_, [&](int i) { work_.fit[i] = work_.matrix[i] - work_.fit[i]; });
    multiply(sn, sn, sm, work_.fit, 1, sn, work_.fit, sn, work_.vectors, sn);
    own = 0.0;
    for_each(sn * sn, [&](int i) { own += work_.vectors[i] * work_.vectors[i]; });
    return sqrt(block_sum(own)) <= room;
  }

  __device__ void full_decomposition() {
    const int sm = shape_.sm, sn = shape_.sn;
    __syncthreads();
    for_each(sn * sm, [&](int i) { work_.vectors[i] = work_.transposed[i]; });
    for_each(sn * sn, [&](int i) { work_.vt[i] = i / sn == i % sn ? 1.0 : 0.0; });
    // Orthogonal columns M J leave the right singular vectors in J.
    orthogonalise_rows(sn, work_.vectors, sm, work_.vt, sn, work_.values, work_.sorted, work_.temporary);
    const double negligible = kEpsilon * sm * work_.values[0];
    for_each(sn * sn, [&](int i) {
      if (!(work_.values[i / sn] > negligible)) work_.vt[i] = 0.0;
    });
    // Hundreds of rotations leave a few digits of drift in the values; |M v| of a unit vector has none.
    multiply(sn, sm, sn, work_.vt, sn, 1, work_.transposed, sm, work_.vectors, sm);
    for (int i = warp_id(); i < sn; i += kWarps) {
      const double value = sqrt(warp_dot(sm, work_.vectors + i * sm, work_.vectors + i * sm));
      if (lane_id() == 0) work_.temporary[i] = value;
    }
    __syncthreads();
    for_each(sn, [&](int i) {
      double smallest = work_.temporary[0];
      for (int j = 1; j <= i; ++j) smallest = fmin(smallest, work_.temporary[j]);
      work_.values[i] = smallest;
    });
    __syncthreads();
    block_ready_ = work_.values[shape_.block - 1] > kSmallestRatio * work_.values[0];
  }

  // yt = (M v_i) and fit = sum over the first k of (M v_i) v_i^T, the rank-k part of the mean.
  __device__ void fit() {
    const int sm = shape_.sm, sn = shape_.sn;
    multiply(shape_.k, sm, sn, work_.vt, sn, 1, work_.transposed, sm, work_.yt, sm);
    multiply(sm, sn, shape_.k, work_.yt, 1, sm, work_.vt, sn, work_.fit, sn);
  }

  // residuals [N] in units of the median norm (until write()); returns the smoothed objective in those units.
  __device__ double measure(double* residuals) {
    double sum = 0.0;
    for (int n = 0; n < shape_.adapters; ++n) {
      const double* delta = work_.deltas + static_cast<std::int64_t>(n) * core_;
      double own = 0.0;
      for_each(core_, [&](int i) { own += (delta[i] - work_.fit[i]) * (delta[i] - work_.fit[i]); });
      const double squared = block_sum(own);
      if (thread_id() == 0) residuals[n] = sqrt(squared);
      sum += power(settings_.eps * settings_.eps + squared, settings_.p / 2);
    }
    __syncthreads();
    return sum;
  }

  // New weights from the residuals; returns the largest relative move of a normalised weight.
  __device__ double reweight(const double* residuals, double* weights) {
    const int count = shape_.adapters;
    for_each(count, [&](int n) {
      work_.updated[n] = power(settings_.eps * settings_.eps + residuals[n] * residuals[n], -(2.0 - settings_.p) / 2);
    });
    __syncthreads();
    double total = 0.0;
    for (int n = 0; n < count; ++n) total += work_.updated[n];
    double moved = 0.0;
    for_each(count, [&](int n) {
      const double share = work_.updated[n] / total;
      moved = fmax(moved, fabs(share - work_.share[n]) / work_.share[n]);
      work_.share[n] = share;
      weights[n] = work_.updated[n] * power(unit_, settings_.p - 2.0);
    });
    return block_max(moved);
  }

  // u = M v / sqrt(s) and v sqrt(s), back in the units of the adapters.
  __device__ void write(const IrlsOutputs& out) {
    const int sm = shape_.sm, sn = shape_.sn, k = shape_.k;
    const double negligible = kEpsilon * sm * work_.values[0];
    for_each(k * sm, [&](int i) {
      const double value = work_.values[i % k];
      out.u[i] = value > negligible ? sqrt(unit_ / value) * work_.yt[i % k * sm + i / k] : 0.0;
    });
    for_each(k * sn, [&](int i) {
      const double value = work_.values[i % k];
      out.v[i] = value > negligible ? sqrt(unit_ * value) * work_.vt[i % k * sn + i / k] : 0.0;
    });
    for_each(sn, [&](int i) { out.singular_values[i] = work_.values[i] * unit_; });
    for_each(shape_.adapters, [&](int n) { out.residuals[n] *= unit_; });
  }

  // All updates are zero: nothing to share, and every residual is zero.
  __device__ void fill_zero(std::int64_t max_iter, const IrlsOutputs& out) {
    for_each(shape_.k * shape_.sm, [&](int i) { out.u[i] = 0.0; });
    for_each(shape_.k * shape_.sn, [&](int i) { out.v[i] = 0.0; });
    for_each(shape_.sn, [&](int i) { out.singular_values[i] = 0.0; });
    for_each(shape_.adapters, [&](int n) {
      out.weights[n] = 1.0;
      out.residuals[n] = 0.0;
    });
    for_each(static_cast<int>(max_iter) + 1, [&](int i) { out.objective[i] = i == 0 ? 0.0 : nan(""); });
    if (thread_id() == 0) {
      *out.n_iter = 0;
      *out.converged = 1;
    }
  }

  const Shape& shape_;
  const IrlsSettings& settings_;
  const Workspace& work_;
  const int core_;      // elements of one core
  double unit_ = 0.0;   // median norm of the updates
  bool block_ready_ = false;
};

__global__ void __launch_bounds__(kThreads, 2)
    irls_kernel(const IrlsInputs inputs, const IrlsSizes sizes, const Shape shape, const IrlsSettings settings,
                const IrlsOutputs outputs, double* workspace, std::int64_t doubles_per_block) {
  // Addresses are kept in shared memory: there are too many for the registers.
  __shared__ Workspace work;
  __shared__ IrlsOutputs out;
  if (thread_id() == 0) work = place(shape, workspace + blockIdx.x * doubles_per_block);
  for (std::int64_t l = blockIdx.x; l < sizes.layers; l += gridDim.x) {
    const double* rb = inputs.rb + l * sizes.sb * shape.columns;
    const double* ra = inputs.ra + l * sizes.sa * shape.columns;
    if (thread_id() == 0) {
      double* u = outputs.u + l * sizes.sb * sizes.k;
      double* v = outputs.v + l * sizes.sa * sizes.k;
      out = {shape.swapped ? v : u,
             shape.swapped ? u : v,
             outputs.singular_values + l * shape.sn,
             outputs.weights + l * sizes.adapters,
             outputs.residuals + l * sizes.adapters,
             outputs.objective + l * (sizes.max_iter + 1),
             outputs.n_iter + l,
             outputs.converged + l};
    }
    __syncthreads();
    Layer(shape, settings, work).solve(shape.swapped ? ra : rb, shape.swapped ? rb : ra, sizes.max_iter, out);
    __syncthreads();
  }
}

}  // namespace

std::int64_t irls_cuda_workspace(const IrlsSizes& sizes) {
  double origin = 0.0;
  return place(shape_of(sizes), &origin).used;
}

void irls_cuda(const IrlsInputs& inputs, const IrlsSizes& sizes, const IrlsSettings& settings,
               const IrlsOutputs& outputs, double* workspace, std::int64_t blocks, void* stream) {
  if (sizes.layers == 0) return;
  SUBSPACE_CHECK(blocks >= 1, "irls: blocks must be at least 1, got ", blocks);
  const Shape shape = shape_of(sizes);
  const auto grid = static_cast<unsigned>(std::min(blocks, sizes.layers));
  launch("irls", irls_kernel, dim3(grid), kThreads, 0, stream, inputs, sizes, shape, settings, outputs, workspace,
         irls_cuda_workspace(sizes));
}

}  // namespace subspace
