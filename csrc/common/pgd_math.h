// One PGD step, the same for every device: the arithmetic of an element, and that of a sample, whose loops over
// elements each device has its own way to run. No torch header: device code includes this.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/inline.h"

namespace moe {

enum class Norm { Linf, L2, L1 };

// Where the model's input (x_adv - mean[c]) / std[c] is written. The channel of element i is c = i / inner % channels.
//   to: like x_adv, or null for no model input; mean, std: [channels]
template <class T, class G>
struct ModelInput {
  G* to;
  const T *mean, *std;
  int64_t channels, inner;
};

// max(value, low) and min(value, high), except that a NaN value stays NaN.
template <class T>
MOE_INLINE T clamp(T value, T low, T high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// y, or the next number towards x where rounding has put y further than `radius` from x. By integer arithmetic on the
// bits: with comparisons, whose masks gcc packs into bytes, an element took 0.48 ns instead of 0.29 (AVX2,
// docs/facts.md).
template <class T>
MOE_INLINE T inside(T y, T x, T radius) {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const T delta = y - x;
  Bits bits, sign;
  std::memcpy(&bits, &y, sizeof(T));
  std::memcpy(&sign, &delta, sizeof(T));
  const Bits outward = ((bits ^ sign) >> (8 * sizeof(T) - 1)) | 1;  // 1 where y, which is not 0, grows away from x
  bits -= std::fabs(delta) > radius ? outward : 0;
  std::memcpy(&y, &bits, sizeof(T));
  return y;
}

// x_adv after a step of alpha along the sign of the gradient g, clamped to [x - eps, x + eps] and to [low, high]. Where
// the gradient is NaN there is no step.
template <class T, class G>
MOE_INLINE T linf_step(T x_adv, G g, T x, T eps, T alpha, T low, T high) {
  const T step = std::fabs(g) > 0 ? std::copysign(alpha, static_cast<T>(g)) : T(0);
  return clamp(inside(clamp(x_adv + step, x - eps, x + eps), x, eps), low, high);
}

// The perturbation x_adv - x after a step of factor * g, before its projection. Where g is NaN there is no step.
template <class T, class G>
MOE_INLINE double stepped(T x_adv, G g, T x, double factor) {
  const double step = static_cast<double>(g) * factor;
  return static_cast<double>(x_adv) + (step == step ? step : 0) - static_cast<double>(x);
}

// Two sums over the elements of a sample.
struct Sums {
  double first, second;
};

// The threshold tau of the projection onto the L1 ball, with sum(max(|delta| - tau, 0)) = eps, or 0 inside the ball, by
// Michelot's active-set algorithm (JOTA 1986). excess(tau) returns the sum of |delta| - tau over the elements with
// |delta| > tau, and their number, which falls from call to call until the set is found.
template <class Excess>
MOE_INLINE double l1_threshold(double eps, Excess excess) {
  double tau = 0, active = INFINITY;
  for (;;) {
    const Sums above = excess(tau);
    const double rest = above.first - eps;
    if (above.second == 0 || (tau == 0 && rest <= 0)) return tau;
    tau += rest / above.second;
    if (above.second >= active) return tau;
    active = above.second;
  }
}

// A step of one sample of length alpha along grad / ||grad||, projected onto the L2 or L1 ball of radius eps around x
// and clamped to [low, high].
//   Loop::sum(f): the sum of f(x_adv, g, x) -> Sums over the sample's elements, in a fixed order
//   Loop::update(f): x_adv = f(x_adv, g, x) for every element
template <class T, class Loop>
MOE_INLINE void sample_step(Loop& loop, Norm norm, T eps, T alpha, T low, T high) {
  const bool l2 = norm == Norm::L2;
  const double total = loop.sum([=](T, auto g, T) {
                             const double v = static_cast<double>(g), m = l2 ? v * v : std::fabs(v);
                             return Sums{m == m ? m : 0, 0};
                           })
                           .first;
  const double length = l2 ? std::sqrt(total) : total;
  const double factor = length > 0 ? std::fmin(static_cast<double>(alpha) / length, 1.7976931348623157e308) : 0;
  double scale = 1, tau = 0;
  if (l2) {
    const double distance = std::sqrt(loop.sum([=](T x_adv, auto g, T x) {
                                            const double delta = stepped(x_adv, g, x, factor);
                                            return Sums{delta * delta, 0};
                                          })
                                          .first);
    if (distance > eps) scale = eps / distance;
  } else {
    tau = l1_threshold(eps, [&](double threshold) {
      return loop.sum([=](T x_adv, auto g, T x) {
        const double rest = std::fabs(stepped(x_adv, g, x, factor)) - threshold;
        return rest > 0 ? Sums{rest, 1} : Sums{0, 0};
      });
    });
  }
  loop.update([=](T x_adv, auto g, T x) {
    const double delta = stepped(x_adv, g, x, factor), rest = std::fabs(delta) - tau;
    const T projected = static_cast<T>(scale * std::copysign(rest < 0 ? 0 : rest, delta));
    return clamp(inside(x + projected, x, std::fabs(projected)), low, high);
  });
}

}  // namespace moe
