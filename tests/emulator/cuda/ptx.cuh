// csrc/cuda/ptx.cuh for the emulator: the same functions from the documented meaning of the instructions, or, with
// SUBSPACE_EMULATED_TURING, those that Turing runs.
#pragma once

#include <cuda_runtime.h>

#include "cuda/plain.cuh"

namespace subspace {

inline unsigned char* dynamic_shared() { return emulator::block.shared.data(); }

#ifdef SUBSPACE_EMULATED_TURING

using namespace plain;

#else

template <int kWanted>
constexpr int kParts = kWanted;
constexpr int kUnrolledSteps = 4;

// Clears the 13 bits that TF32 lacks, as the matrix unit does with operands that were not rounded before.
inline float truncate_to_tf32(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits &= ~0x1FFFu;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

inline float to_tf32(float value) {
  if (!std::isfinite(value)) return value;
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits += 0x1000u;
  std::memcpy(&value, &bits, sizeof(bits));
  return truncate_to_tf32(value);
}

// Lane (g, t) shows a(g, t), a(g + 8, t), a(g, t + 4), a(g + 8, t + 4), b(t, g), b(t + 4, g).
inline void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  const double own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  emulator::exchange(own, 6, [&d](const double(*shown)[6]) {
    const unsigned lane = emulator::block.current % emulator::kWarp;
    for (unsigned q = 0; q < 4; ++q) {
      const unsigned row = lane / 4 + q / 2 * 8, column = lane % 4 * 2 + q % 2;
      for (unsigned k = 0; k < 8; ++k) {
        const double left = shown[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2];
        const double right = shown[column * 4 + k % 4][4 + k / 4];
        d[q] += truncate_to_tf32(static_cast<float>(left)) * truncate_to_tf32(static_cast<float>(right));
      }
    }
    return 0.0;
  });
}

template <int kBytes>
void copy_async(float* out, const float* in, bool inside) {
  if (inside) {
    std::memcpy(out, in, kBytes);
  } else {
    std::memset(out, 0, kBytes);
  }
}

inline void commit_copies() {}

template <int kPending>
void wait_copies() {}

#endif

}  // namespace subspace
