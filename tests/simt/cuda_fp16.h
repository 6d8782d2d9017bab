// The 16-bit IEEE float as the CUDA toolkit names it: storage and widening.
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
