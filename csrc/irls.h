// Batched iteratively reweighted least squares in the core space of stacked adapters, float64.
//
// Layer l has N updates delta_n = rb_n ra_n^T, rb_n = rb[l][:, n r : (n+1) r]. Minimised over u, v:
//   sum_n (e^2 + |delta_n - u v^T|_F^2)^(p/2),   e = eps * median of the positive |delta_n|_F.
#pragma once

#include <cstdint>

namespace subspace {

struct IrlsSizes {
  std::int64_t layers;    // L
  std::int64_t adapters;  // N
  std::int64_t rank;      // r
  std::int64_t sb;        // rows of rb
  std::int64_t sa;        // rows of ra
  std::int64_t k;         // columns of u and v
  std::int64_t max_iter;  // re-weightings at most
};

struct IrlsSettings {
  double p;    // exponent, (0, 2]
  double eps;  // smoothing in units of the median norm
  double tol;  // largest relative move of a normalised weight at which to stop
};

struct IrlsInputs {
  const double* rb;  // [L, sb, N r] contiguous
  const double* ra;  // [L, sa, N r] contiguous
};

struct IrlsOutputs {
  double* u;                // [L, sb, k]
  double* v;                // [L, sa, k]
  double* singular_values;  // [L, min(sb, sa)] descending
  double* weights;          // [L, N] those the decomposed mean was made with
  double* residuals;        // [L, N]
  double* objective;        // [L, max_iter + 1], NaN past n_iter
  std::int64_t* n_iter;     // [L]
  std::uint8_t* converged;  // [L]
};

// Doubles of workspace that one thread needs.
std::int64_t irls_workspace(const IrlsSizes& sizes);

// workspace [threads, irls_workspace(sizes)]. Layers are dealt out to the threads; the result of a layer does not
// depend on their number.
void irls_cpu(const IrlsInputs& inputs, const IrlsSizes& sizes, const IrlsSettings& settings,
              const IrlsOutputs& outputs, double* workspace, std::int64_t threads);

#ifdef SUBSPACE_HAS_CUDA
// Doubles of workspace that one block of the kernel needs.
std::int64_t irls_cuda_workspace(const IrlsSizes& sizes);

// The same on a GPU, as one kernel queued on `stream` of the current device; all addresses are device memory.
// workspace [blocks, irls_cuda_workspace(sizes)]; a block works through layers b, b + blocks, ... The result of a layer
// does not depend on their number. Neither allocates nor waits; throws std::runtime_error when the launch is refused.
void irls_cuda(const IrlsInputs& inputs, const IrlsSizes& sizes, const IrlsSettings& settings,
               const IrlsOutputs& outputs, double* workspace, std::int64_t blocks, void* stream);
#endif

}  // namespace subspace
