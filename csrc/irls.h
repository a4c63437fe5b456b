// Batched iteratively reweighted least squares in the core space of stacked adapters, float64.
//
// Layer l has N updates delta_n = rb_n ra_n^T, rb_n = rb[l][:, n r : (n+1) r]. Minimised over the fits f_n:
//   sum_n (e^2 + |delta_n - f_n|_F^2)^(p/2),   e = eps * median of the positive |delta_n|_F,
//   kMean: f_n = u v^T, one matrix of rank k;   kShared: f_n = u c_n v^T with orthonormal u, v and any c_n [k, k], and
//   every delta_n is first brought to the median norm: c_n takes its scale.
#pragma once

#include <cstdint>

namespace subspace {

enum class IrlsModel : std::int64_t { kMean = 0, kShared = 1 };

enum class IrlsStatus : std::int64_t {
  kDone = 0,
  kUncertain = 1,  // a decomposition could not be certified; no other output means anything
  kApart = 2,      // an update is more than kIrlsSpread times the median; likewise
};

// Squares of residuals relative to the median norm stay finite.
constexpr double kIrlsSpread = 1e150;

// Words of eight bytes, filled in Python (subspace_ext/ops/irls.py).
struct IrlsJob {
  const double* rb;         // [L, sb, N r] contiguous, as is everything here
  const double* ra;         // [L, sa, N r]
  const double* start;      // [L, sa, k], kShared: orthonormal columns that v starts from; unused by kMean
  double* u;                // [L, sb, k]   kMean: u v^T is the rank-k part of the weighted mean
  double* v;                // [L, sa, k]   kShared: orthonormal columns, zero ones where the rank ends
  double* weights;          // [L, N] those of the last fit
  double* residuals;        // [L, N] |delta_n - f_n|_F
  double* norms;            // [L, N] |delta_n|_F
  double* objective;        // [L, max_iter + 1], NaN past n_iter
  std::int64_t* n_iter;     // [L] re-weightings done
  std::int64_t* converged;  // [L] 0 or 1
  std::int64_t* status;     // [L] IrlsStatus
  double* workspace;        // [workers, irls_workspace(job)]; workers: threads of a CPU, blocks of a GPU
  std::int64_t workers;
  std::int64_t layers;      // L
  std::int64_t adapters;    // N
  std::int64_t rank;        // r
  std::int64_t sb;          // rows of rb
  std::int64_t sa;          // rows of ra
  std::int64_t k;           // columns of u and v
  std::int64_t max_iter;    // re-weightings at most
  IrlsModel model;
  double p;                 // exponent, (0, 2]
  double eps;               // smoothing in units of the median norm
  double tol;               // relative move at which to stop: kMean, of a normalised weight; kShared, of an e^2 + res^2
};
static_assert(sizeof(IrlsJob) == 25 * 8, "Python packs twenty-five words");

// Doubles of workspace that one worker needs; reads sizes and model.
std::int64_t irls_workspace(const IrlsJob& job);

// All addresses are host memory. The result of a layer does not depend on the number of workers.
void irls_cpu(const IrlsJob& job);

#ifdef SUBSPACE_HAS_CUDA
std::int64_t irls_cuda_workspace(const IrlsJob& job);

// One kernel queued on `stream` of the current device; all addresses are device memory. Neither allocates nor waits;
// throws std::runtime_error when the launch is refused.
void irls_cuda(const IrlsJob& job, void* stream);
#endif

}  // namespace subspace
