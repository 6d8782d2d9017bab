// Activations of an MLP and their derivatives, element by element, in a form that the compiler vectorises: in double
// with libm's functions, in float with polynomials.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/inline.h"

namespace moe {

// An activation at one point, and its derivative there.
template <class T>
struct Point {
  T value, slope;
};

// exp(x) for x <= 0. In float x is k ln 2 + r with an integer k, and exp(x) is 2^k times the Taylor polynomial of
// degree 7 at r, whose relative error for |r| <= ln 2 / 2 is below 2^-27.
MOE_INLINE double exp_of_negative(double x) { return std::exp(x); }
MOE_INLINE float exp_of_negative(float x) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, held in the lowest mantissa bits
  const float shifted = x * 1.442695041f + kRound, k = shifted - kRound;
  const float r = x - k * 0.693359375f + k * 2.12194440e-4f;  // x - k ln 2, with ln 2 in two parts
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

// The probability that a standard normal variable exceeds z >= 0, given density = exp(-z^2 / 2). In float by formula
// 7.1.26 of Abramowitz and Stegun, whose absolute error is at most 7.5e-8.
MOE_INLINE double normal_tail(double z, double) { return 0.5 * std::erfc(z * 0.70710678118654752); }
MOE_INLINE float normal_tail(float z, float density) {
  const float t = 1 / (1 + 0.231641888f * z);
  const float p =
      t * (0.127414796f + t * (-0.142248368f + t * (0.710706871f + t * (-0.726576013f + t * 0.530702714f))));
  return p * density;
}

// max(z, 0); a NaN stays NaN.
struct Relu {
  template <class T>
  static MOE_INLINE Point<T> at(T z) {
    return {z <= 0 ? T(0) : z, z <= 0 ? T(0) : T(1)};
  }
};

// max(z, 0)^2; a NaN stays NaN.
struct SquaredRelu {
  template <class T>
  static MOE_INLINE Point<T> at(T z) {
    const T positive = z <= 0 ? T(0) : z;
    return {positive * positive, 2 * positive};
  }
};

// z times the standard normal distribution function at z.
struct Gelu {
  template <class T>
  static MOE_INLINE Point<T> at(T z) {
    const T density = exp_of_negative(T(-0.5) * z * z), tail = normal_tail(std::fabs(z), density);
    const T below = z < 0 ? tail : 1 - tail;
    return {z * below, below + z * density * T(0.39894228040143268)};
  }
};

// z times the logistic function of z.
struct Silu {
  template <class T>
  static MOE_INLINE Point<T> at(T z) {
    const T e = exp_of_negative(-std::fabs(z)), rest = 1 / (1 + e);
    const T sigmoid = z < 0 ? e * rest : rest;
    return {z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))};
  }
};

}  // namespace moe
