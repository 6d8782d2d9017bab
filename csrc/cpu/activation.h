// Activations of an MLP, each with its slope, as arithmetic that a compiler vectorises: in double libm's functions, in
// float polynomials.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/inline.h"

namespace moe {

template <class T>
struct Point {
  T value, slope;
};

// exp(x) for x <= 0.
MOE_INLINE double exp_of_negative(double x) { return std::exp(x); }
MOE_INLINE float exp_of_negative(float x) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the lowest bits
  const float shifted = x * 1.442695041f + kRound, k = shifted - kRound;
  const float r = x - k * 0.693359375f + k * 2.12194440e-4f;  // x - k ln 2, where |r| <= ln 2 / 2
  float p = 1 / 5040.f;
  p = p * r + 1 / 720.f;
  p = p * r + 1 / 120.f;
  p = p * r + 1 / 24.f;
  p = p * r + 1 / 6.f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = static_cast<int32_t>(static_cast<uint32_t>(bits + 127) << 23);  // 2^k
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87 ? 0 : p * power;
}

// The upper tail of the standard normal distribution at z >= 0, where exp(-z^2 / 2) is known.
MOE_INLINE double normal_tail(double z, double) { return 0.5 * std::erfc(z * 0.70710678118654752); }
MOE_INLINE float normal_tail(float z, float density) {
  const float t = 1 / (1 + 0.231641888f * z);  // Abramowitz and Stegun 7.1.26
  const float p =
      t * (0.127414796f + t * (-0.142248368f + t * (0.710706871f + t * (-0.726576013f + t * 0.530702714f))));
  return p * density;
}

struct Relu {
  template <class T>
  static MOE_INLINE Point<T> at(T z) {
    return {z <= 0 ? T(0) : z, z <= 0 ? T(0) : T(1)};
  }
};

struct SquaredRelu {
  template <class T>
  static MOE_INLINE Point<T> at(T z) {
    const T positive = z <= 0 ? T(0) : z;
    return {positive * positive, 2 * positive};
  }
};

// z times the normal distribution function.
struct Gelu {
  template <class T>
  static MOE_INLINE Point<T> at(T z) {
    const T density = exp_of_negative(T(-0.5) * z * z), tail = normal_tail(std::fabs(z), density);
    const T below = z < 0 ? tail : 1 - tail;
    return {z * below, below + z * density * T(0.39894228040143268)};
  }
};

// z times the logistic function.
struct Silu {
  template <class T>
  static MOE_INLINE Point<T> at(T z) {
    const T e = exp_of_negative(-std::fabs(z)), rest = 1 / (1 + e);
    const T sigmoid = z < 0 ? e * rest : rest;
    return {z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))};
  }
};

}  // namespace moe
