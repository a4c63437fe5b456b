#include "cpu/leading.h"

#include <algorithm>
#include <cmath>

#include "cpu/dense.h"
#include "irls_shape.h"

namespace subspace {
namespace {

struct Residuals {
  double largest;   // |M^T u_i - s_i v_i|, u_i = y_i / s_i, over the first k pairs
  double coupling;  // sqrt(sum of s_i^2 |M^T u_i - s_i v_i|^2) over the rest of the block
};

// Fills zt with M^T u_i for the whole block.
Residuals pair_residuals(std::int64_t sm, std::int64_t sn, std::int64_t k, const double* matrix, std::int64_t ldn,
                         std::int64_t ldm, const LeadingBlock& block) {
  for (std::int64_t i = 0; i < block.rows; ++i) scale(ldm, 1.0 / block.values[i], block.yt + i * ldm);
  multiply(block.rows, sn, sm, block.yt, ldm, 1, matrix, ldn, block.zt, ldn);
  double largest = 0.0, coupling = 0.0;
  for (std::int64_t i = 0; i < block.rows; ++i) {
    const double* z = block.zt + i * ldn;
    const double* v = block.vt + i * ldn;
    double sum = 0.0;
    for (std::int64_t j = 0; j < sn; ++j) {
      const double difference = z[j] - block.values[i] * v[j];
      sum += difference * difference;
    }
    if (i < k) {
      largest = std::max(largest, sum);
    } else {
      coupling += block.values[i] * block.values[i] * sum;
    }
  }
  return {std::sqrt(largest), std::sqrt(coupling)};
}

// True when no singular value outside the first k can exceed the k-th. Outside them M is B + E: B the rest of the
// block, E = M - Y V^T what lies outside the block. Then M M^T is B B^T + E E^T there, and as a sum of two positive
// semidefinite matrices P + Q it has norm at most max(|P|, |Q|) + |P^(1/2) Q^(1/2)| <= max(s[k+1]^2, |E|^2) + coupling.
// |E|^2 is at most |E|_F^2 and, more sharply, at most |E^T E|_F.
bool is_leading(std::int64_t sm, std::int64_t sn, std::int64_t k, const double* matrix, std::int64_t ldn,
                std::int64_t ldm, const LeadingBlock& block, double coupling, double* remainder, double* gram) {
  const double next = block.rows > k ? block.values[k] * block.values[k] : 0.0;
  const double room = block.values[k - 1] * block.values[k - 1] - coupling;
  if (next > room) return false;
  double outside = dot(sm * ldn, matrix, matrix);
  for (std::int64_t i = 0; i < block.rows; ++i) outside -= block.values[i] * block.values[i];
  if (outside <= room) return true;
  if (!(std::sqrt(outside * outside / static_cast<double>(sn)) <= room)) return false;
  // yt holds unit vectors u here, so the part of M inside the block is sum_i s_i u_i v_i^T.
  for (std::int64_t i = 0; i < block.rows; ++i) {
    std::copy(block.vt + i * ldn, block.vt + (i + 1) * ldn, block.zt + i * ldn);
    scale(ldn, block.values[i], block.zt + i * ldn);
  }
  multiply(sm, sn, block.rows, block.yt, 1, ldm, block.zt, ldn, remainder, ldn);
  for (std::int64_t i = 0; i < sm * ldn; ++i) remainder[i] = matrix[i] - remainder[i];
  multiply(sn, sn, sm, remainder, 1, ldn, remainder, ldn, gram, ldn);
  return std::sqrt(dot(sn * ldn, gram, gram)) <= room;
}

}  // namespace

bool leading_subspace(std::int64_t sm, std::int64_t sn, std::int64_t k, const double* matrix, std::int64_t ldn,
                      const double* transposed, std::int64_t ldm, int max_steps, const LeadingBlock& block,
                      double* remainder, double* gram) {
  double previous = 0.0;
  for (int step = 0; step < max_steps; ++step) {
    multiply(block.rows, sm, sn, block.vt, ldn, 1, transposed, ldm, block.yt, ldm);
    orthogonalise_rows(block.rows, block.yt, ldm, block.vt, ldn, block.values);
    // A block wider than the rank has no meaningful last vectors, and the full decomposition is then cheap.
    if (!(block.values[block.rows - 1] > kSmallestRatio * block.values[0])) return false;
    const auto [residual, coupling] = pair_residuals(sm, sn, k, matrix, ldn, ldm, block);
    const double target = kConverged * block.values[0];
    if (residual <= target) return is_leading(sm, sn, k, matrix, ldn, ldm, block, coupling, remainder, gram);
    if (step >= 2) {
      const double rate = residual / previous;
      const double steps_left = std::log(target / residual) / std::log(rate);
      if (!(rate < 1.0) || steps_left > max_steps - step) return false;
    }
    previous = residual;
    std::swap_ranges(block.vt, block.vt + block.rows * ldn, block.zt);
    orthogonalise_rows(block.rows, block.vt, ldn, nullptr, 0, block.norms);
    for (std::int64_t i = 0; i < block.rows; ++i) scale(ldn, 1.0 / block.norms[i], block.vt + i * ldn);
  }
  return false;
}

}  // namespace subspace
