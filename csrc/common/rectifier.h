// The activations of which one bit per element says where their gradient passes, the same for every device: ReLU, and
// those with other bounds or a slope. No torch header: device code includes this.
#pragma once

#include <limits>
#include <optional>

#include "common/inline.h"

namespace moe {

// y = x where low < x < high, and beyond the nearer bound, with low <= high; or, if it leaks, y = x where low < x, and
// slope * x beyond.
template <class A>
struct Rectifier {
  A low, high, slope;
  bool leaks;

  Rectifier(double low, std::optional<double> high, std::optional<double> slope)
      : low(static_cast<A>(low)),
        high(static_cast<A>(high.value_or(std::numeric_limits<double>::quiet_NaN()))),  // which nothing exceeds
        slope(static_cast<A>(slope.value_or(0))),
        leaks(slope.has_value()) {}

  // Whether the gradient passes: that of a NaN does, as in torch's ReLU, unless it leaks.
  MOE_INLINE bool passes(A x) const { return leaks ? x > low : !(x <= low || x >= high); }
  MOE_INLINE A beyond(A x) const { return leaks ? slope * x : x <= low ? low : high; }
  // The gradient of x where it does not pass, of that of y.
  MOE_INLINE A remains(A grad) const { return leaks ? slope * grad : 0; }
};

}  // namespace moe
