// The gates of a router, from logits to weights, the same for every device. No torch header: device code includes this.
#pragma once

#include <cmath>
#include <string>

#include "common/inline.h"

namespace moe {

struct Gate {
  bool sigmoid;      // else softmax
  bool ones;         // all weights of a row are equal in the forward (hard, straight_through)
  bool renormalize;  // the weights of a row sum to 1
};

// The gate that `name` names: softmax, soft, sigmoid, hard or straight_through.
inline Gate read_gate(const std::string& name, bool renormalize) {
  return {name == "sigmoid", name == "hard" || name == "straight_through", renormalize};
}

// 1 / (1 + exp(-x))
template <class A>
MOE_INLINE A sigmoid(A x) {
  return 1 / (1 + std::exp(-x));
}

// log(sigmoid(x)), without overflow and without cancellation
template <class A>
MOE_INLINE A log_sigmoid(A x) {
  return (x < 0 ? x : A(0)) - std::log1p(std::exp(-std::fabs(x)));
}

// The weight of one logit of a row: its sigmoid, or exp(score - shift) / total, where the total is over the chosen
// experts if renormalised and over all experts otherwise, and the shift is the largest score.
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
