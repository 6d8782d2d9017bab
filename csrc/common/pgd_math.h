// The arithmetic of one PGD step on one element, the same on every device. No torch header: device code includes it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define MOE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace moe {

// max(value, low) and min(value, high), except that a NaN value stays NaN.
template <class T>
MOE_HOST_DEVICE T clamp(T value, T low, T high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// y, or its neighbour towards x where rounding took y further than `radius` from x.
template <class T>
MOE_HOST_DEVICE T inside(T y, T x, T radius) {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Bits bits;
  std::memcpy(&bits, &y, sizeof(T));
  const Bits inward = (y > x) == (y > 0) ? -1 : 1;
  bits += std::fabs(y - x) > radius ? inward : 0;
  std::memcpy(&y, &bits, sizeof(T));
  return y;
}

// A step along the sign of the gradient, inside [x - eps, x + eps] and the bounds. A NaN gradient makes no step.
template <class T, class G>
MOE_HOST_DEVICE T linf_step(T x_adv, G g, T x, T eps, T alpha, T low, T high) {
  const T step = g > 0 ? alpha : g < 0 ? -alpha : T(0);
  return clamp(inside(clamp(x_adv + step, x - eps, x + eps), x, eps), low, high);
}

// x plus a projected perturbation, inside the bounds.
template <class T>
MOE_HOST_DEVICE T perturbed(T x, T delta, T low, T high) {
  return clamp(inside(x + delta, x, std::fabs(delta)), low, high);
}

// The factor that gives a gradient of this norm the length alpha; 0 for a gradient that is zero or infinite.
MOE_HOST_DEVICE double step_factor(double alpha, double norm) {
  const double factor = norm > 0 ? alpha / norm : 0;
  return factor < 1.7976931348623157e308 ? factor : 1.7976931348623157e308;
}

// The perturbation after a step of factor * g, before its projection.
template <class T, class G>
MOE_HOST_DEVICE double stepped_delta(T x_adv, G g, T x, double factor) {
  const double step = static_cast<double>(g) * factor;
  return static_cast<double>(x_adv) + (step == step ? step : 0) - static_cast<double>(x);
}

// Moves |delta| towards zero by tau: the soft threshold that projects onto an L1 ball.
MOE_HOST_DEVICE double shrink(double delta, double tau) {
  const double rest = std::fabs(delta) - tau;
  const double kept = rest < 0 ? 0 : rest;
  return std::copysign(kept, delta);
}

}  // namespace moe
