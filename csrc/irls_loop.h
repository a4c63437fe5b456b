// The loop of IRLS over one layer, written once for a CPU core and for a block of a GPU's threads; see leading.h for
// what a Machine is. It has besides:
//   combine(size, N, shares, matrices, out)    out = sum_n shares[n] matrices[n] over `size` elements
//   squared_distance(size, a, b)               the same number for every thread
//   leader()                                   true for one thread
//   barrier()
#pragma once

#include "irls.h"
#include "leading.h"

namespace subspace {

// kMean turns a layer so that its cores are tall, sm >= sn. kShared takes it as it is.
template <class Index>
struct IrlsShape {
  Index adapters, rank, columns, sm, sn, k;
  bool shared, turned;

  IrlsShape() = default;

  explicit IrlsShape(const IrlsJob& job) {
    shared = job.model == IrlsModel::kShared;
    turned = !shared && job.sb < job.sa;
    adapters = static_cast<Index>(job.adapters);
    rank = static_cast<Index>(job.rank);
    columns = adapters * rank;
    sm = static_cast<Index>(turned ? job.sa : job.sb);
    sn = static_cast<Index>(turned ? job.sb : job.sa);
    k = static_cast<Index>(job.k);
  }
};

template <class Machine>
struct IrlsRoom {
  using Index = typename Machine::Index;

  double* deltas;           // [N, sm, pad(sn)]; kMean: in units of the median norm; kShared: each of norm one
  double* right;            // [N r, pad(sn)]
  double* matrix;           // what is decomposed: [sm, pad(sn)], or the stacked projections as rows
  double* fit;              // [sm, pad(sn)]
  double *rows_u, *rows_v;  // u^T [k, pad(sm)] and v^T [k, pad(sn)]
  double *u, *v;            // [sm, block], [sn, block]
  double* projected;        // kShared: [max(sm, sn), N block], delta_n v or delta_n^T u side by side
  double* core;             // [k, block]
  double* mixed;            // [sm, block]
  double *shares, *smoothed, *sorted;  // [N]
  typename LeadingVectors<Machine>::Room leading;
  Index block;  // length of a row of k in u, v and projected
  std::int64_t used;

  IrlsRoom() = default;

  // Places the arrays one after another from `base`; with a null base only `used` means anything.
  SUBSPACE_BOTH IrlsRoom(const IrlsShape<Index>& shape, double* base) {
    used = 0;
    const auto take = [&](std::int64_t size) {
      double* start = base ? base + used : nullptr;
      used += size;
      return start;
    };
    const std::int64_t sm = shape.sm, sn = shape.sn, ldm = Machine::pad(shape.sm), ldn = Machine::pad(shape.sn);
    block = Machine::width(shape.k);
    const std::int64_t stacked = shape.adapters * block, taller = sm > sn ? sm : sn;
    deltas = take(shape.adapters * sm * ldn);
    right = take(shape.columns * ldn);
    matrix = take(shape.shared ? stacked * (ldm > ldn ? ldm : ldn) : sm * ldn);
    fit = take(sm * ldn);
    rows_u = take(shape.k * ldm);
    rows_v = take(shape.k * ldn);
    u = take(sm * block);
    v = take(sn * block);
    projected = take(shape.shared ? taller * stacked : 0);
    core = take(shape.k * block);
    mixed = take(sm * block);
    shares = take(Machine::pad(shape.adapters));
    smoothed = take(Machine::pad(shape.adapters));
    sorted = take(Machine::pad(shape.adapters));
    const Index rows = static_cast<Index>(shape.shared ? stacked : sm), columns = static_cast<Index>(shape.shared ? taller : sn);
    leading = LeadingVectors<Machine>::place(rows, columns, shape.k, take);
  }
};

// One layer's part of the job's outputs, turned as the shape says.
struct IrlsOutputs {
  const double *left, *right, *start;  // [sm, N r], [sn, N r], [sn, k]
  double *u, *v, *weights, *residuals, *norms, *objective;
  std::int64_t *n_iter, *converged, *status;

  IrlsOutputs() = default;

  template <class Index>
  SUBSPACE_FN IrlsOutputs(const IrlsJob& job, const IrlsShape<Index>& shape, std::int64_t layer) {
    const double* rb = job.rb + layer * job.sb * shape.columns;
    const double* ra = job.ra + layer * job.sa * shape.columns;
    double* of_b = job.u + layer * job.sb * job.k;
    double* of_a = job.v + layer * job.sa * job.k;
    left = shape.turned ? ra : rb;
    right = shape.turned ? rb : ra;
    u = shape.turned ? of_a : of_b;
    v = shape.turned ? of_b : of_a;
    start = shape.shared ? job.start + layer * job.sa * job.k : nullptr;
    weights = job.weights + layer * job.adapters;
    residuals = job.residuals + layer * job.adapters;
    norms = job.norms + layer * job.adapters;
    objective = job.objective + layer * (job.max_iter + 1);
    n_iter = job.n_iter + layer;
    converged = job.converged + layer;
    status = job.status + layer;
  }
};

template <class Machine>
class IrlsLayer {
 public:
  using Index = typename Machine::Index;
  using Vectors = LeadingVectors<Machine>;

  SUBSPACE_FN IrlsLayer(const IrlsShape<Index>& shape, const IrlsJob& job, const IrlsRoom<Machine>& room,
                        const IrlsOutputs& out)
      : shape_(shape), job_(job), room_(room), out_(out) {}

  SUBSPACE_FN void solve() {
    const Index count = shape_.adapters, trace = static_cast<Index>(job_.max_iter) + 1;
    Machine::each(trace, [&](Index i) { out_.objective[i] = kNaN; });
    form_deltas();
    unit_ = positive_median();
    if (unit_ == 0.0) return fill_zero();
    if (Machine::largest(count, [&](Index n) { return out_.norms[n]; }) > kIrlsSpread * unit_) {
      return finish(IrlsStatus::kApart, 0, false);
    }
    for (Index n = 0; n < count; ++n) {
      double* entries = delta(n);
      const double size = !shape_.shared || out_.norms[n] == 0.0 ? unit_ : out_.norms[n];
      Machine::each(core_size(), [&](Index i) { entries[i] /= size; });
    }
    start_weights();
    Index iteration = 0;
    bool converged = !shape_.shared && job_.p == 2.0;  // the weights are one whatever the residuals
    for (;; ++iteration) {
      if (!(shape_.shared ? fit_shared(iteration) : fit_mean())) return finish(IrlsStatus::kUncertain, 0, false);
      const double moved = measure(iteration);
      if (shape_.shared) converged = moved <= job_.tol;
      if (converged || iteration == job_.max_iter) break;
      const double shifted = reweight();
      if (!shape_.shared) converged = shifted <= job_.tol;
    }
    write();
    finish(IrlsStatus::kDone, iteration, converged);
  }

 private:
  SUBSPACE_FN Index core_size() const { return shape_.sm * Machine::pad(shape_.sn); }
  SUBSPACE_FN double* delta(Index n) const { return room_.deltas + static_cast<std::int64_t>(n) * core_size(); }

  SUBSPACE_FN void form_deltas() {
    const Index ldn = Machine::pad(shape_.sn), size = core_size();
    Machine::transpose(shape_.sn, shape_.columns, out_.right, shape_.columns, room_.right, ldn);
    for (Index n = 0; n < shape_.adapters; ++n) {
      const double* entries = delta(n);
      Machine::multiply(shape_.sm, shape_.sn, shape_.rank, out_.left + n * shape_.rank, shape_.columns, 1,
                        room_.right + n * shape_.rank * ldn, ldn, delta(n), ldn);
      // The largest entry is taken out first, so that the squares can neither underflow nor overflow.
      const double peak = Machine::largest(size, [&](Index i) { return std::fabs(entries[i]); });
      const double sum = peak > 0.0 ? Machine::sum(size, [&](Index i) {
        const double share = entries[i] / peak;
        return share * share;
      }) : 0.0;
      if (Machine::leader()) out_.norms[n] = peak * std::sqrt(sum);
    }
    Machine::barrier();
  }

  // Median of the positive norms (mean of the middle two for an even count); 0 when there is none.
  SUBSPACE_FN double positive_median() const {
    const Index count = shape_.adapters;
    Machine::each(count, [&](Index i) {
      const double norm = out_.norms[i];
      Index place = 0;
      for (Index j = 0; j < count; ++j) place += out_.norms[j] > norm || (out_.norms[j] == norm && j < i);
      room_.sorted[place] = norm;
    });
    Index kept = 0;
    while (kept < count && room_.sorted[kept] > 0.0) ++kept;
    return kept ? 0.5 * (room_.sorted[(kept - 1) / 2] + room_.sorted[kept / 2]) : 0.0;
  }

  // Equal weights, and for kShared the given v.
  SUBSPACE_FN void start_weights() {
    const Index count = shape_.adapters, k = shape_.k, block = room_.block;
    Machine::each(count, [&](Index n) {
      room_.shares[n] = 1.0 / count;
      out_.weights[n] = 1.0;
    });
    if (!shape_.shared) return;
    Machine::each(shape_.sn * block, [&](Index i) {
      room_.v[i] = i % block < k ? out_.start[i / block * k + i % block] : 0.0;
    });
    Machine::transpose(shape_.sn, k, room_.v, block, room_.rows_v, Machine::pad(shape_.sn));
  }

  // The rank-k part of M = sum_n share_n delta_n is (M v) v^T, v its leading right singular vectors.
  SUBSPACE_FN bool fit_mean() {
    const Index sm = shape_.sm, sn = shape_.sn, k = shape_.k, ldn = Machine::pad(sn), block = room_.block;
    Machine::combine(core_size(), shape_.adapters, room_.shares, room_.deltas, room_.matrix);
    if (!Vectors::find(room_.leading, sm, sn, k, room_.matrix, room_.rows_v)) return false;
    Machine::transpose(k, sn, room_.rows_v, ldn, room_.v, block);
    Machine::multiply(sm, k, sn, room_.matrix, ldn, 1, room_.v, block, room_.u, block);
    Machine::multiply(sm, sn, k, room_.u, block, 1, room_.rows_v, ldn, room_.fit, ldn);
    return true;
  }

  // One sweep: v for the u of before, except at the start, then u for that v. Each lowers sum_n w_n |delta_n - f_n|^2.
  SUBSPACE_FN bool fit_shared(Index iteration) {
    const Index sm = shape_.sm, sn = shape_.sn, ldn = Machine::pad(sn);
    if (iteration > 0 && !lead(sn, sm, 1, ldn, room_.u, room_.rows_v, room_.v)) return false;
    return lead(sm, sn, ldn, 1, room_.v, room_.rows_u, room_.u);
  }

  // The leading left singular vectors of [w_1^(1/2) D_1 x, w_2^(1/2) D_2 x, ..]: D_n [size, depth] is delta_n, or its
  // transpose by the strides, x [depth, block]. They go to rows and, transposed, to y.
  SUBSPACE_FN bool lead(Index size, Index depth, Index row_stride, Index column_stride, const double* x, double* rows,
                        double* y) {
    const Index block = room_.block, stacked = shape_.adapters * block, ld = Machine::pad(size);
    for (Index n = 0; n < shape_.adapters; ++n) {
      Machine::multiply(size, shape_.k, depth, delta(n), row_stride, column_stride, x, block,
                        room_.projected + n * block, stacked);
    }
    Machine::transpose(size, stacked, room_.projected, stacked, room_.matrix, ld);
    Machine::rows(stacked, [&](Index row) {
      Machine::scale(size, std::sqrt(room_.shares[row / block]), room_.matrix + row * ld);
    });
    if (!Vectors::find(room_.leading, stacked, size, shape_.k, room_.matrix, rows)) return false;
    Machine::transpose(shape_.k, size, rows, ld, y, block);
    return true;
  }

  // residuals [N], in the units of deltas until write(), and the objective. Returns the largest relative move of
  // a smoothed residual, which means nothing at the first fit.
  SUBSPACE_FN double measure(Index iteration) {
    double sum = 0.0, moved = iteration == 0 ? kInfinity : 0.0;
    for (Index n = 0; n < shape_.adapters; ++n) {
      const double squared = shape_.shared ? squared_residual(n) : Machine::squared_distance(core_size(), delta(n), room_.fit);
      const double smoothed = job_.eps * job_.eps + squared;
      sum += Machine::power(smoothed, job_.p / 2);
      if (iteration > 0) moved = std::fmax(moved, std::fabs(smoothed - room_.smoothed[n]) / room_.smoothed[n]);
      Machine::barrier();
      if (Machine::leader()) {
        room_.smoothed[n] = smoothed;
        out_.residuals[n] = std::sqrt(squared);
      }
    }
    if (Machine::leader()) out_.objective[iteration] = sum * Machine::power(unit_, job_.p);
    Machine::barrier();
    return moved;
  }

  // |delta_n - u c_n v^T|^2 with c_n = u^T delta_n v, for a delta_n of norm one: 1 - |c_n|^2, but of the matrices themselves where that
  // would cancel.
  SUBSPACE_FN double squared_residual(Index n) {
    constexpr double kCancelled = 1e-3;
    const Index sm = shape_.sm, sn = shape_.sn, k = shape_.k, ldm = Machine::pad(sm), ldn = Machine::pad(sn);
    const Index block = room_.block;
    Machine::multiply(k, k, sm, room_.rows_u, ldm, 1, room_.projected + n * block, shape_.adapters * block, room_.core,
                      block);
    const double held = Machine::sum(k * block, [&](Index i) { return room_.core[i] * room_.core[i]; });
    const double rest = (out_.norms[n] > 0.0 ? 1.0 : 0.0) - held;
    if (rest > kCancelled) return rest;
    Machine::multiply(sm, k, k, room_.u, block, 1, room_.core, block, room_.mixed, block);
    Machine::multiply(sm, sn, k, room_.mixed, block, 1, room_.rows_v, ldn, room_.fit, ldn);
    return Machine::squared_distance(core_size(), delta(n), room_.fit);
  }

  // New weights from the residuals; returns the largest relative move of a normalised weight.
  SUBSPACE_FN double reweight() {
    const Index count = shape_.adapters;
    const double exponent = -(2.0 - job_.p) / 2, factor = Machine::power(unit_, job_.p - 2.0);
    Machine::each(count, [&](Index n) {
      room_.sorted[n] = Machine::power(room_.smoothed[n], exponent);
      out_.weights[n] = room_.sorted[n] * factor;
    });
    if (shape_.shared) {
      Machine::each(count, [&](Index n) { room_.shares[n] = room_.sorted[n]; });
      return 0.0;
    }
    const double total = Machine::sum(count, [&](Index n) { return room_.sorted[n]; });
    const double moved = Machine::largest(count, [&](Index n) {
      return std::fabs(room_.sorted[n] / total - room_.shares[n]) / room_.shares[n];
    });
    Machine::each(count, [&](Index n) { room_.shares[n] = room_.sorted[n] / total; });
    return moved;
  }

  // Back in the units of the adapters.
  SUBSPACE_FN void write() {
    const Index k = shape_.k, block = room_.block;
    const double unit = shape_.shared ? 1.0 : unit_;
    Machine::each(shape_.sm * k, [&](Index i) { out_.u[i] = unit * room_.u[i / k * block + i % k]; });
    Machine::each(shape_.sn * k, [&](Index i) { out_.v[i] = room_.v[i / k * block + i % k]; });
    Machine::each(shape_.adapters, [&](Index n) { out_.residuals[n] *= shape_.shared ? out_.norms[n] : unit_; });
  }

  SUBSPACE_FN void finish(IrlsStatus status, Index iterations, bool converged) {
    if (Machine::leader()) {
      *out_.n_iter = iterations;
      *out_.converged = converged ? 1 : 0;
      *out_.status = static_cast<std::int64_t>(status);
    }
    Machine::barrier();
  }

  // All updates are zero: nothing to share, and every residual is zero.
  SUBSPACE_FN void fill_zero() {
    Machine::each(shape_.sm * shape_.k, [&](Index i) { out_.u[i] = 0.0; });
    Machine::each(shape_.sn * shape_.k, [&](Index i) { out_.v[i] = 0.0; });
    Machine::each(shape_.adapters, [&](Index n) {
      out_.weights[n] = 1.0;
      out_.residuals[n] = 0.0;
    });
    if (Machine::leader()) out_.objective[0] = 0.0;
    finish(IrlsStatus::kDone, 0, true);
  }

  const IrlsShape<Index>& shape_;
  const IrlsJob& job_;
  const IrlsRoom<Machine>& room_;
  const IrlsOutputs& out_;
  double unit_ = 0.0;  // median norm of the updates
};

}  // namespace subspace
