// The 16-bit IEEE float as the CUDA toolkit names it: storage and conversion.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  float size = exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(1024 + fraction), exponent - 25);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return v.bits >> 15 ? -size : size;
}

inline __half __float2half(float v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const float size = std::fabs(v);
  if (v != v) return {0x7fff};
  if (size >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  std::frexp(size, &exponent);
  exponent = size == 0 || exponent < -13 ? -13 : exponent;
  const int fraction = std::nearbyint(std::ldexp(size, 11 - exponent));  // may carry into the exponent
  return {static_cast<uint16_t>(sign | ((exponent + 13) * 1024 + fraction))};
}
