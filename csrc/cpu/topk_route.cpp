// Top-k routing: the k largest logits of each row, and their gate weights. Rows do not depend on one another.
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

#include "common/gate.h"
#include "common/tensor.h"

namespace moe {
namespace {

// Exponentials summed before they join the total, so that rounding errors grow with n / 16. Its speed is not measured.
constexpr int64_t kSummands = 16;
// Operations that a logit is counted as when rows are shared among threads. Not measured.
constexpr int64_t kWorkPerLogit = 8;

// The weights of one row: row[e] is expert e's; renormalised, those of the chosen experts sum to 1.
//   logits: [num_experts], experts: [k], the chosen ones, that of the largest logit first
template <class A>
struct Row : GateWeight<A> {
  const A* logits;

  Row(const A* logits, int64_t num_experts, const int32_t* experts, int64_t k, Gate gate)
      : GateWeight<A>{gate}, logits(logits) {
    if (!this->has_total()) return;
    this->shift = this->score(logits[experts[0]]);
    const int64_t count = gate.renormalize ? k : num_experts;
    for (int64_t i = 0; i < count; i += kSummands) {
      A part = 0;
      for (int64_t j = i; j < std::min(i + kSummands, count); ++j) {
        part += this->term(logits[gate.renormalize ? experts[j] : j]);
      }
      this->total += part;
    }
  }

  A operator[](int64_t e) const { return (*this)(logits[e]); }
};

// The largest element, or NaN if there is one.
//   x: [n]
template <class A>
A largest(const A* x, int64_t n) {
  A out = -std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < n; ++i) out = x[i] > out || std::isnan(x[i]) ? x[i] : out;
  return out;
}

// logits: [T, E]; returns weights [T, k] and experts, int32 [T, k], by falling logit; ties go to the lower index
std::tuple<Tensor, Tensor> topk_route(const Tensor& logits, int64_t k, StringHandle gate_name, bool renormalize) {
  const Gate gate = read_gate(take_string(gate_name), renormalize);
  const int64_t rows = logits.size(0), num_experts = logits.size(1);
  MOE_CHECK(k >= 1 && k <= num_experts, "k must be between 1 and the number of experts ", num_experts, ", got ", k);
  const Tensor dense = as_contiguous(logits);
  Tensor weights = new_tensor(logits, {rows, k}, accumulate_type(logits.scalar_type()));
  Tensor experts = new_tensor(logits, {rows, k}, ScalarType::Int);
  std::atomic<int64_t> first_bad{rows};
  dispatch_float(logits.scalar_type(), "logits", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* src = data<T>(dense);
    A* w = mutable_data<A>(weights);
    int32_t* chosen = mutable_data<int32_t>(experts);
    torch::stable::parallel_for(0, rows, grain(kWorkPerLogit * num_experts), [&](int64_t first, int64_t last) {
      std::vector<A> x(num_experts);
      std::vector<int32_t> order(num_experts);
      for (int64_t t = first; t < last; ++t) {
        std::copy_n(src + t * num_experts, num_experts, x.begin());
        if (!std::isfinite(largest(x.data(), num_experts))) {
          for (int64_t seen = first_bad; t < seen && !first_bad.compare_exchange_weak(seen, t);) continue;
          continue;
        }
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + k, order.end(),
                          [&](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
        std::copy_n(order.begin(), k, chosen + t * k);
        if (gate.ones) {
          std::fill_n(w + t * k, k, gate.renormalize ? A(1) / static_cast<A>(k) : A(1));
          continue;
        }
        const Row<A> p(x.data(), num_experts, order.data(), k, gate);
        for (int64_t i = 0; i < k; ++i) w[t * k + i] = p[order[i]];
      }
    });
  });
  MOE_CHECK(first_bad == rows, "logits must be free of NaN and +inf, with a finite entry in every row; row ",
            first_bad.load(), " is not");
  return {weights, experts};
}

// The gradient of the logits.
//   grad: [T, k], that of the weights; logits: [T, E], experts: int32 [T, k]; returns [T, E]
Tensor topk_route_backward(const Tensor& grad, const Tensor& logits, const Tensor& experts, StringHandle gate_name,
                           bool renormalize) {
  const Gate gate = read_gate(take_string(gate_name), renormalize);
  const int64_t rows = logits.size(0), num_experts = logits.size(1), k = experts.size(1);
  const Tensor dense_grad = as_contiguous(grad), dense = as_contiguous(logits), dense_experts = as_contiguous(experts);
  Tensor out = new_tensor(logits, {rows, num_experts});
  dispatch_float(logits.scalar_type(), "logits", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* src = data<T>(dense);
    const A* g = data<A>(dense_grad);
    const int32_t* all_chosen = data<int32_t>(dense_experts);
    T* dst = mutable_data<T>(out);
    torch::stable::parallel_for(0, rows, grain(kWorkPerLogit * num_experts), [&](int64_t first, int64_t last) {
      std::vector<A> x(num_experts), dx(num_experts), w(k);
      for (int64_t t = first; t < last; ++t) {
        std::copy_n(src + t * num_experts, num_experts, x.begin());
        const int32_t* chosen = all_chosen + t * k;
        const Row<A> p(x.data(), num_experts, chosen, k, gate);
        // Renormalised weights sum to 1, so a constant taken off the gradient changes nothing but the rounding.
        const A base = gate.renormalize ? g[t * k] : A(0);
        A mean = 0;  // of the gradient under the weights
        for (int64_t i = 0; i < k; ++i) mean += (w[i] = p[chosen[i]]) * (g[t * k + i] - base);
        for (int64_t e = 0; e < num_experts; ++e) dx[e] = gate.sigmoid || gate.renormalize ? 0 : -p[e] * mean;
        for (int64_t i = 0; i < k; ++i) {
          A ds = w[i] * (g[t * k + i] - base - (gate.renormalize ? mean : A(0)));
          if (gate.sigmoid) ds *= sigmoid(-x[chosen[i]]);
          dx[chosen[i]] += ds;
        }
        for (int64_t e = 0; e < num_experts; ++e) dst[t * num_experts + e] = static_cast<T>(dx[e]);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("topk_route", TORCH_BOX(&moe::topk_route));
  m.impl("topk_route_backward", TORCH_BOX(&moe::topk_route_backward));
}
