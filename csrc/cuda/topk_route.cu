// Top-k routing: checks and launches. That a row holds no NaN, no +inf and a finite entry is the caller's to see to,
// because looking would halt the stream: such a row gets weights of NaN, and experts within range.
#include "cuda/tensor.h"
#include "cuda/topk_route.cuh"

namespace moe {
namespace {

Routing make_routing(const Tensor& logits, int64_t k, StringHandle gate, bool renormalize) {
  const Gate read = read_gate(take_string(gate), renormalize);
  const int64_t experts = logits.size(1);
  MOE_CHECK(k >= 1 && k <= experts, "k must be between 1 and the number of experts ", experts, ", got ", k);
  MOE_CHECK(experts <= INT32_MAX, "logits must have fewer than 2^31 columns, got ", experts);
  return {logits.size(0), static_cast<int>(experts), static_cast<int>(k), read};
}

// logits [T, E] -> weights [T, k], experts [T, k]
std::tuple<Tensor, Tensor> topk_route(const Tensor& logits, int64_t k, StringHandle gate, bool renormalize) {
  const Routing routing = make_routing(logits, k, gate, renormalize);
  const CudaStream stream(logits);
  const Tensor dense = as_contiguous(logits);
  Tensor weights = new_tensor(logits, {logits.size(0), k}, accumulate_type(logits.scalar_type()));
  Tensor experts = new_tensor(logits, {logits.size(0), k}, ScalarType::Int);
  dispatch_native(logits.scalar_type(), "logits", [&](auto zero) {
    using T = decltype(zero);
    launch_topk_route(routing, data<T>(dense), mutable_data<wide_t<T>>(weights), mutable_data<int32_t>(experts),
                      stream);
  });
  return {weights, experts};
}

// grad [T, k], logits [T, E], experts [T, k] -> [T, E]
Tensor topk_route_backward(const Tensor& grad, const Tensor& logits, const Tensor& experts, StringHandle gate,
                           bool renormalize) {
  const Routing routing = make_routing(logits, experts.size(1), gate, renormalize);
  check_device(grad, {logits, experts});
  const CudaStream stream(logits);
  const Tensor dense_grad = as_contiguous(grad), dense = as_contiguous(logits), dense_experts = as_contiguous(experts);
  Tensor out = new_tensor(logits, shape(logits));
  dispatch_native(logits.scalar_type(), "logits", [&](auto zero) {
    using T = decltype(zero);
    launch_topk_route_backward(routing, data<wide_t<T>>(dense_grad), data<T>(dense), data<int32_t>(dense_experts),
                               mutable_data<T>(out), stream);
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) {
  m.impl("topk_route", TORCH_BOX(&moe::topk_route));
  m.impl("topk_route_backward", TORCH_BOX(&moe::topk_route_backward));
}
