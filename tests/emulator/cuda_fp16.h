// float16 of the emulated toolkit, on the compiler's own half type.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half value) {
  _Float16 half;
  std::memcpy(&half, &value.bits, sizeof(half));
  return static_cast<float>(half);
}

inline __half __float2half_rn(float value) {
  const auto half = static_cast<_Float16>(value);
  __half result;
  std::memcpy(&result.bits, &half, sizeof(half));
  return result;
}

inline __half __float2half_rz(float value) {
  __half result = __float2half_rn(value);
  if (std::fabs(__half2float(result)) > std::fabs(value)) --result.bits;
  return result;
}
