// Element types of activations and weights: conversion to and from float32, alone and four at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace subspace {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ inline float load(const float* p) { return *p; }
__device__ inline float load(const bf16* p) { return __bfloat162float(*p); }
__device__ inline float load(const fp16* p) { return __half2float(*p); }

__device__ inline void round_nearest(float value, float* out) { *out = value; }
__device__ inline void round_nearest(float value, bf16* out) { *out = __float2bfloat16_rn(value); }
__device__ inline void round_nearest(float value, fp16* out) { *out = __float2half_rn(value); }

__device__ inline void round_toward_zero(float value, bf16* out) { *out = __float2bfloat16_rz(value); }
__device__ inline void round_toward_zero(float value, fp16* out) { *out = __float2half_rz(value); }

// The neighbour of a finite value, one step further from zero.
template <class Half>
__device__ inline Half away_from_zero(Half value) {
  std::uint16_t bits;
  memcpy(&bits, &value, sizeof(bits));
  ++bits;
  memcpy(&value, &bits, sizeof(bits));
  return value;
}

// 24 bits in [0, 1) from a seed and a counter: Murmur3's finaliser.
__device__ inline float uniform(std::uint64_t seed, std::uint64_t counter) {
  const std::uint64_t mixed = counter + seed * 0x9E3779B97F4A7C15ull;
  std::uint32_t h = static_cast<std::uint32_t>(mixed) ^ static_cast<std::uint32_t>(mixed >> 32);
  h ^= h >> 16;
  h *= 0x85EBCA6Bu;
  h ^= h >> 13;
  h *= 0xC2B2AE35u;
  h ^= h >> 16;
  return static_cast<float>(h >> 8) * 0x1p-24f;
}

// One of the two neighbours of `value`, the further one with the probability of the distance to the nearer.
template <class Half>
__device__ inline void round_stochastic(float value, std::uint64_t seed, std::uint64_t counter, Half* out) {
  if (!isfinite(value)) return round_nearest(value, out);
  round_toward_zero(value, out);
  const Half further = away_from_zero(*out);
  const float nearer = fabsf(load(out));
  if (fabsf(value) - nearer > uniform(seed, counter) * (fabsf(load(&further)) - nearer)) *out = further;
}
__device__ inline void round_stochastic(float value, std::uint64_t, std::uint64_t, float* out) { *out = value; }

// Four neighbouring elements moved as one.
template <class Element>
struct alignas(4 * sizeof(Element)) Four {
  Element at[4];
};

// Calls visit with a null pointer of the type that `dtype` names.
template <class Visit>
void with_element(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat32: return visit(static_cast<float*>(nullptr));
    case DType::kBFloat16: return visit(static_cast<bf16*>(nullptr));
    case DType::kFloat16: return visit(static_cast<fp16*>(nullptr));
  }
}

}  // namespace subspace
