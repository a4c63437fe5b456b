#include "irls.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/dense.h"
#include "cpu/leading.h"
#include "irls_shape.h"

namespace subspace {
namespace {

struct Shape : IrlsShape {
  std::int64_t ldm, ldn;  // padded sm and sn
};

Shape shape_of(const IrlsSizes& sizes) {
  const IrlsShape shape = irls_shape(sizes);
  return {shape, padded(shape.sm), padded(shape.sn)};
}

struct Workspace {
  double *deltas, *right, *matrix, *transposed, *fit, *vectors, *vt, *yt, *zt, *values, *scratch, *norms, *share,
      *updated;
  std::int64_t* order;
  std::int64_t used;
};

// Places the arrays one after another from `base`; with a null base only `used` means anything.
Workspace place(const Shape& shape, double* base) {
  Workspace work;
  std::int64_t used = 0;
  const auto take = [&](std::int64_t size) {
    double* start = base ? base + used : nullptr;
    used += padded(size);
    return start;
  };
  work.deltas = take(shape.adapters * shape.sm * shape.ldn);
  work.right = take(shape.columns * shape.ldn);
  work.matrix = take(shape.sm * shape.ldn);
  work.transposed = take(shape.sn * shape.ldm);
  work.fit = take(shape.sm * shape.ldn);
  work.vectors = take(shape.sn * std::max(shape.ldn, shape.ldm));
  work.vt = take(shape.sn * shape.ldn);
  work.yt = take(shape.block * shape.ldm);
  work.zt = take(shape.block * shape.ldn);
  work.values = take(shape.sn);
  work.scratch = take(shape.ldm);
  work.norms = take(std::max(shape.adapters, shape.block));
  work.share = take(shape.adapters);
  work.updated = take(shape.adapters);
  static_assert(sizeof(std::int64_t) == sizeof(double), "indices share the workspace of doubles");
  work.order = reinterpret_cast<std::int64_t*>(take(shape.sn));
  work.used = used;
  return work;
}

// Median of the positive entries of norms [count], sorted in `scratch`; 0 when there is none.
double positive_median(const double* norms, std::int64_t count, double* scratch) {
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (norms[i] > 0.0) scratch[kept++] = norms[i];
  }
  if (kept == 0) return 0.0;
  std::sort(scratch, scratch + kept);
  return 0.5 * (scratch[(kept - 1) / 2] + scratch[kept / 2]);
}

class Layer {
 public:
  Layer(const Shape& shape, const IrlsSettings& settings, const Workspace& work)
      : shape_(shape), settings_(settings), work_(work), core_(shape.sm * shape.ldn) {}

  // left [sm, N r], right [sn, N r]; the outputs point at this layer's part, u [sm, k] and v [sn, k].
  void solve(const double* left, const double* right, std::int64_t max_iter, const IrlsOutputs& out) {
    form_deltas(left, right);
    if (unit_ == 0.0) return fill_zero(max_iter, out);
    const std::int64_t count = shape_.adapters;
    std::fill(work_.share, work_.share + count, 1.0 / static_cast<double>(count));
    std::fill(out.weights, out.weights + count, 1.0);
    std::fill(out.objective, out.objective + max_iter + 1, std::numeric_limits<double>::quiet_NaN());
    std::int64_t iteration = 0;
    bool converged = settings_.p == 2.0;  // the weights are one whatever the residuals
    for (;; ++iteration) {
      weighted_mean();
      const bool last = converged || iteration == max_iter;
      if (last || !warm_decomposition()) full_decomposition();
      fit();
      out.objective[iteration] = objective(out.residuals) * std::pow(unit_, settings_.p);
      if (last) break;
      const double moved = reweight(out.residuals, out.weights);
      converged = moved <= settings_.tol;
    }
    *out.n_iter = iteration;
    *out.converged = converged ? 1 : 0;
    write(out);
  }

 private:
  void form_deltas(const double* left, const double* right) {
    transpose(shape_.sn, shape_.columns, right, shape_.columns, work_.right, shape_.ldn);
    for (std::int64_t n = 0; n < shape_.adapters; ++n) {
      double* delta = work_.deltas + n * core_;
      multiply(shape_.sm, shape_.sn, shape_.rank, left + n * shape_.rank, shape_.columns, 1,
               work_.right + n * shape_.rank * shape_.ldn, shape_.ldn, delta, shape_.ldn);
      // The largest entry is taken out first, so that the squares can neither underflow nor overflow.
      double largest = 0.0;
      for (std::int64_t i = 0; i < core_; ++i) largest = std::max(largest, std::abs(delta[i]));
      double sum = 0.0;
      for (std::int64_t i = 0; largest > 0.0 && i < core_; ++i) sum += (delta[i] / largest) * (delta[i] / largest);
      work_.norms[n] = largest * std::sqrt(sum);
    }
    unit_ = positive_median(work_.norms, shape_.adapters, work_.updated);
    if (unit_ > 0.0) {
      for (std::int64_t i = 0; i < shape_.adapters * core_; ++i) work_.deltas[i] /= unit_;
    }
  }

  void weighted_mean() {
    std::fill(work_.matrix, work_.matrix + core_, 0.0);
    for (std::int64_t n = 0; n < shape_.adapters; ++n) {
      add_scaled(core_, work_.share[n], work_.deltas + n * core_, work_.matrix);
    }
    transpose(shape_.sm, shape_.sn, work_.matrix, shape_.ldn, work_.transposed, shape_.ldm);
  }

  bool warm_decomposition() {
    if (shape_.block == shape_.k) return false;
    const bool cold = !block_ready_;
    if (cold) start_block();
    const LeadingBlock block{shape_.block, work_.vt, work_.yt, work_.zt, work_.values, work_.norms};
    block_ready_ = leading_subspace(shape_.sm, shape_.sn, shape_.k, work_.matrix, shape_.ldn, work_.transposed,
                                    shape_.ldm, cold ? kColdSteps : kWarmSteps, block, work_.fit, work_.vectors);
    return block_ready_;
  }

  // Fixed pseudo-random rows: a result must not depend on which thread or call came before.
  void start_block() {
    std::uint64_t state = 0x9E3779B97F4A7C15ull;
    std::fill(work_.vt, work_.vt + shape_.block * shape_.ldn, 0.0);
    for (std::int64_t i = 0; i < shape_.block; ++i) {
      for (std::int64_t j = 0; j < shape_.sn; ++j) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        work_.vt[i * shape_.ldn + j] = static_cast<double>(state >> 11) * 0x1p-53 - 0.5;
      }
    }
    orthogonalise_rows(shape_.block, work_.vt, shape_.ldn, nullptr, 0, work_.norms);
    for (std::int64_t i = 0; i < shape_.block; ++i) {
      scale(shape_.ldn, 1.0 / work_.norms[i], work_.vt + i * shape_.ldn);
    }
  }

  void full_decomposition() {
    std::copy(work_.transposed, work_.transposed + shape_.sn * shape_.ldm, work_.vectors);
    right_singular_vectors(shape_.sm, shape_.sn, work_.vectors, shape_.ldm, work_.vt, shape_.ldn, work_.values,
                           work_.scratch, work_.order);
    // Hundreds of rotations leave a few digits of drift in the values; |M v| of a unit vector has none.
    multiply(shape_.sn, shape_.sm, shape_.sn, work_.vt, shape_.ldn, 1, work_.transposed, shape_.ldm, work_.vectors,
             shape_.ldm);
    for (std::int64_t i = 0; i < shape_.sn; ++i) {
      const double* image = work_.vectors + i * shape_.ldm;
      const double value = std::sqrt(dot(shape_.ldm, image, image));
      work_.values[i] = i == 0 ? value : std::min(value, work_.values[i - 1]);
    }
    block_ready_ = work_.values[shape_.block - 1] > kSmallestRatio * work_.values[0];
  }

  // yt = (M v_i) and fit = sum over the first k of (M v_i) v_i^T, the rank-k part of the mean.
  void fit() {
    multiply(shape_.k, shape_.sm, shape_.sn, work_.vt, shape_.ldn, 1, work_.transposed, shape_.ldm, work_.yt,
             shape_.ldm);
    multiply(shape_.sm, shape_.sn, shape_.k, work_.yt, 1, shape_.ldm, work_.vt, shape_.ldn, work_.fit, shape_.ldn);
  }

  // Residuals are differences of the matrices themselves: from Gram blocks, |d|^2 - 2 <d, f> + |f|^2, a residual
  // below 1e-8 of |d| would keep no digits. residuals [N] are in units of the median norm until write().
  double objective(double* residuals) {
    double sum = 0.0;
    for (std::int64_t n = 0; n < shape_.adapters; ++n) {
      const double squared = squared_distance(core_, work_.deltas + n * core_, work_.fit);
      residuals[n] = std::sqrt(squared);
      sum += std::pow(settings_.eps * settings_.eps + squared, settings_.p / 2);
    }
    return sum;
  }

  // New weights from the residuals; returns the largest relative move of a normalised weight.
  double reweight(const double* residuals, double* weights) {
    double total = 0.0;
    for (std::int64_t n = 0; n < shape_.adapters; ++n) {
      const double smoothed = settings_.eps * settings_.eps + residuals[n] * residuals[n];
      work_.updated[n] = std::pow(smoothed, -(2.0 - settings_.p) / 2);
      total += work_.updated[n];
    }
    double moved = 0.0;
    for (std::int64_t n = 0; n < shape_.adapters; ++n) {
      const double share = work_.updated[n] / total;
      moved = std::max(moved, std::abs(share - work_.share[n]) / work_.share[n]);
      work_.share[n] = share;
      weights[n] = work_.updated[n] * std::pow(unit_, settings_.p - 2.0);
    }
    return moved;
  }

  // u = M v / sqrt(s) and v sqrt(s), back in the units of the adapters.
  void write(const IrlsOutputs& out) {
    const double negligible = kEpsilon * static_cast<double>(shape_.sm) * work_.values[0];
    for (std::int64_t i = 0; i < shape_.k; ++i) {
      const double value = work_.values[i];
      const double left = value > negligible ? std::sqrt(unit_ / value) : 0.0;
      const double right = value > negligible ? std::sqrt(unit_ * value) : 0.0;
      for (std::int64_t j = 0; j < shape_.sm; ++j) out.u[j * shape_.k + i] = left * work_.yt[i * shape_.ldm + j];
      for (std::int64_t j = 0; j < shape_.sn; ++j) out.v[j * shape_.k + i] = right * work_.vt[i * shape_.ldn + j];
    }
    for (std::int64_t i = 0; i < shape_.sn; ++i) out.singular_values[i] = work_.values[i] * unit_;
    for (std::int64_t n = 0; n < shape_.adapters; ++n) out.residuals[n] *= unit_;
  }

  // All updates are zero: nothing to share, and every residual is zero.
  void fill_zero(std::int64_t max_iter, const IrlsOutputs& out) const {
    std::fill(out.u, out.u + shape_.sm * shape_.k, 0.0);
    std::fill(out.v, out.v + shape_.sn * shape_.k, 0.0);
    std::fill(out.singular_values, out.singular_values + shape_.sn, 0.0);
    std::fill(out.weights, out.weights + shape_.adapters, 1.0);
    std::fill(out.residuals, out.residuals + shape_.adapters, 0.0);
    std::fill(out.objective, out.objective + max_iter + 1, std::numeric_limits<double>::quiet_NaN());
    out.objective[0] = 0.0;
    *out.n_iter = 0;
    *out.converged = 1;
  }

  const Shape& shape_;
  const IrlsSettings& settings_;
  const Workspace& work_;
  const std::int64_t core_;  // doubles of one padded core
  double unit_ = 0.0;        // median norm of the updates
  bool block_ready_ = false;
};

}  // namespace

std::int64_t irls_workspace(const IrlsSizes& sizes) { return place(shape_of(sizes), nullptr).used; }

void irls_cpu(const IrlsInputs& inputs, const IrlsSizes& sizes, const IrlsSettings& settings,
              const IrlsOutputs& outputs, double* workspace, std::int64_t threads) {
  const Shape shape = shape_of(sizes);
  const std::int64_t per_thread = irls_workspace(sizes);
  const std::int64_t values = shape.sn;
  std::atomic<std::int64_t> next{0};
  const auto work_on_layers = [&](std::int64_t thread) {
    const Workspace work = place(shape, workspace + thread * per_thread);
    for (std::int64_t l = next.fetch_add(1); l < sizes.layers; l = next.fetch_add(1)) {
      const double* rb = inputs.rb + l * sizes.sb * shape.columns;
      const double* ra = inputs.ra + l * sizes.sa * shape.columns;
      double* u = outputs.u + l * sizes.sb * sizes.k;
      double* v = outputs.v + l * sizes.sa * sizes.k;
      const IrlsOutputs out{shape.swapped ? v : u,
                            shape.swapped ? u : v,
                            outputs.singular_values + l * values,
                            outputs.weights + l * sizes.adapters,
                            outputs.residuals + l * sizes.adapters,
                            outputs.objective + l * (sizes.max_iter + 1),
                            outputs.n_iter + l,
                            outputs.converged + l};
      Layer(shape, settings, work).solve(shape.swapped ? ra : rb, shape.swapped ? rb : ra, sizes.max_iter, out);
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (std::int64_t thread = 1; thread < std::min(threads, sizes.layers); ++thread) {
      helpers.emplace_back(work_on_layers, thread);
    }
  } catch (const std::system_error&) {
    // The system gives no more threads: those there are do all layers.
  }
  work_on_layers(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace subspace
