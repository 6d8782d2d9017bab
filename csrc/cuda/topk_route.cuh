// Top-k routing on a GPU: one warp per row, whose logits are in registers if there are at most 512 of them.
#pragma once

#include "common/gate.h"
#include "cuda/rows.cuh"

namespace moe {

// What is routed: `rows` rows of `experts` logits, k of which are chosen.
struct Routing {
  int64_t rows;
  int experts, k;
  Gate gate;
};

// A row's logits: R of them in each lane's registers, or, where R is 0, read from memory every time.
//   row: [experts]
template <class T, int R>
struct RowLogits {
  const T* row;
  int experts, lane;
  wide_t<T> in_registers[R > 0 ? R : 1];

  __device__ __forceinline__ RowLogits(const T* row, int experts, int lane) : row(row), experts(experts), lane(lane) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int e = r * kWarp + lane;
      in_registers[r] = e < experts ? widen(row[e]) : wide_t<T>(-INFINITY);
    }
  }

  // Calls f(logit, expert) for each of the lane's experts.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    if constexpr (R > 0) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r * kWarp + lane < experts) f(in_registers[r], r * kWarp + lane);
      }
    } else {
      for (int e = lane; e < experts; e += kWarp) f(widen(row[e]), e);
    }
  }
};

// An expert in the order of choice: by falling logit, then by rising index.
template <class A>
struct Choice {
  A key;
  int expert;

  __device__ __forceinline__ bool before(const Choice& other) const {
    return key > other.key || (key == other.key && expert < other.expert);
  }
};

// The first choice of the row after `last`, where a NaN ranks as +inf. Every lane receives it, and all must call.
template <class A, class Logits>
__device__ __forceinline__ Choice<A> next_choice(const Logits& logits, const Choice<A>& last) {
  Choice<A> best{A(-INFINITY), INT32_MAX};
  logits.each([&](A logit, int e) {
    const Choice<A> choice{logit == logit ? logit : A(INFINITY), e};
    if (last.before(choice) && choice.before(best)) best = choice;
  });
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Choice<A> other{__shfl_xor_sync(kAllLanes, best.key, offset),
                          __shfl_xor_sync(kAllLanes, best.expert, offset)};
    if (other.before(best)) best = other;
  }
  return best;
}

// The weights of a row.
//   chosen: [k], the chosen experts; largest: the largest logit
template <class T, int R>
__device__ __forceinline__ GateWeight<wide_t<T>> gate_weight(const RowLogits<T, R>& logits, const int32_t* chosen,
                                                             int k, Gate gate, wide_t<T> largest) {
  using A = wide_t<T>;
  GateWeight<A> weight{gate, 0, 0};
  if (!weight.has_total()) return weight;
  weight.shift = weight.score(largest);
  A total = 0;
  if (gate.renormalize) {
    for (int i = logits.lane; i < k; i += kWarp) total += weight.term(widen(logits.row[chosen[i]]));
  } else {
    logits.each([&](A logit, int) { total += weight.term(logit); });
  }
  weight.total = warp_sum(total);
  return weight;
}

// logits: [rows, experts] -> weights, chosen: [rows, k], by falling logit
template <class T, int R>
__global__ void __launch_bounds__(kRowThreads, 1)
    topk_route_kernel(Routing routing, const T* logits, wide_t<T>* weights, int32_t* chosen) {
  using A = wide_t<T>;
  const int64_t t = warp_row();
  if (t >= routing.rows) return;
  const int lane = threadIdx.x % kWarp, k = routing.k;
  const RowLogits<T, R> row(logits + t * routing.experts, routing.experts, lane);
  weights += t * k;
  chosen += t * k;
  Choice<A> choice{A(INFINITY), -1};
  A largest = 0;
  for (int i = 0; i < k; ++i) {
    choice = next_choice<A>(row, choice);
    if (i == 0) largest = widen(row.row[choice.expert]);
    if (i % kWarp == lane) chosen[i] = choice.expert;  // by the lane that reads it below
  }
  if (routing.gate.ones) {
    for (int i = lane; i < k; i += kWarp) weights[i] = routing.gate.renormalize ? A(1) / static_cast<A>(k) : A(1);
    return;
  }
  const auto weight = gate_weight(row, chosen, k, routing.gate, largest);
  for (int i = lane; i < k; i += kWarp) weights[i] = weight(widen(row.row[chosen[i]]));
}

// out is the gradient of the logits.
//   grad: [rows, k], that of the weights; logits: [rows, experts], chosen: [rows, k] -> out: [rows, experts]
template <class T, int R>
__global__ void __launch_bounds__(kRowThreads, 1)
    topk_route_backward_kernel(Routing routing, const wide_t<T>* grad, const T* logits, const int32_t* chosen, T* out) {
  using A = wide_t<T>;
  const int64_t t = warp_row();
  if (t >= routing.rows) return;
  const int lane = threadIdx.x % kWarp, k = routing.k;
  const Gate gate = routing.gate;
  const RowLogits<T, R> row(logits + t * routing.experts, routing.experts, lane);
  grad += t * k;
  chosen += t * k;
  out += t * routing.experts;
  const auto weight = gate_weight(row, chosen, k, gate, widen(row.row[chosen[0]]));
  // Renormalised weights sum to 1, so a constant taken off the gradient changes nothing but the rounding.
  const A base = gate.renormalize ? grad[0] : A(0);
  A mean = 0;  // of the gradient under the weights
  for (int i = lane; i < k; i += kWarp) mean += weight(widen(row.row[chosen[i]])) * (grad[i] - base);
  mean = warp_sum(mean);
  const auto dense = [&](A logit) { return gate.sigmoid || gate.renormalize ? A(0) : -weight(logit) * mean; };
  row.each([&](A logit, int e) { out[e] = narrow<T>(dense(logit)); });
  __syncwarp();
  for (int i = lane; i < k; i += kWarp) {
    const A logit = widen(row.row[chosen[i]]);
    A ds = weight(logit) * (grad[i] - base - (gate.renormalize ? mean : A(0)));
    if (gate.sigmoid) ds *= sigmoid(-logit);
    out[chosen[i]] = narrow<T>(ds + dense(logit));
  }
}

// Calls f with the number of logits in a lane's registers, 1, 4, 16 or 0 for none, as a constant. Not measured.
template <class F>
void with_logits_per_lane(int experts, F f) {
  if (experts <= kWarp) return f(std::integral_constant<int, 1>());
  if (experts <= 4 * kWarp) return f(std::integral_constant<int, 4>());
  if (experts <= 16 * kWarp) return f(std::integral_constant<int, 16>());
  f(std::integral_constant<int, 0>());
}

// logits: [rows, experts] -> weights, chosen: [rows, k]
template <class T>
void launch_topk_route(Routing routing, const T* logits, wide_t<T>* weights, int32_t* chosen, cudaStream_t stream) {
  with_logits_per_lane(routing.experts, [&](auto logits_per_lane) {
    cuda_launch("topk_route", topk_route_kernel<T, decltype(logits_per_lane)::value>, warp_row_blocks(routing.rows),
                kRowThreads, stream, routing, logits, weights, chosen);
  });
}

// grad: [rows, k], logits: [rows, experts], chosen: [rows, k] -> out: [rows, experts]
template <class T>
void launch_topk_route_backward(Routing routing, const wide_t<T>* grad, const T* logits, const int32_t* chosen, T* out,
                                cudaStream_t stream) {
  with_logits_per_lane(routing.experts, [&](auto logits_per_lane) {
    cuda_launch("topk_route_backward", topk_route_backward_kernel<T, decltype(logits_per_lane)::value>,
                warp_row_blocks(routing.rows), kRowThreads, stream, routing, grad, logits, chosen, out);
  });
}

}  // namespace moe
