// The gates of a routing, the same for every device: from logits to weights. No torch header.
#pragma once

#include <cmath>
#include <string>

#include "common/inline.h"

namespace moe {

struct Gate {
  bool sigmoid, ones, renormalize;  // ones: the forward weights are all equal
};

inline Gate read_gate(const std::string& name, bool renormalize) {
  return {name == "sigmoid", name == "hard" || name == "straight_through", renormalize};
}

template <class A>
MOE_INLINE A sigmoid(A x) {
  return 1 / (1 + std::exp(-x));
}

template <class A>
MOE_INLINE A log_sigmoid(A x) {
  return (x < 0 ? x : A(0)) - std::log1p(std::exp(-std::fabs(x)));
}

// One row's weights: sigmoid, or exp(score - shift) / total with the total over the chosen experts or over all.
template <class A>
struct GateWeight {
  Gate gate;
  A shift = 0, total = 0;

  MOE_INLINE bool has_total() const { return !gate.sigmoid || gate.renormalize; }
  MOE_INLINE A score(A logit) const { return gate.sigmoid ? log_sigmoid(logit) : logit; }
  MOE_INLINE A term(A logit) const { return std::exp(score(logit) - shift); }
  MOE_INLINE A operator()(A logit) const { return has_total() ? term(logit) / total : sigmoid(logit); }
};

}  // namespace moe
