// Top-k routing: checks and launches. It is not checked that every row has a finite entry and neither NaN nor +inf,
// since the host would have to wait for the device: that is up to the caller. Other rows get NaN weights.
#include "cuda/tensor.h"
#include "cuda/topk_route.cuh"

namespace moe {
namespace {

// logits: [T, E]
Routing make_routing(const Tensor& logits, int64_t k, StringHandle gate, bool renormalize) {
  const Gate read = read_gate(take_string(gate), renormalize);
  const int64_t experts = logits.size(1);
  MOE_CHECK(k >= 1 && k <= experts, "k must be between 1 and the number of experts ", experts, ", got ", k);
  MOE_CHECK(experts <= INT32_MAX, "logits must have fewer than 2^31 columns, got ", experts);
  return {logits.size(0), static_cast<int>(experts), static_cast<int>(k), read};
}

// logits: [T, E]; returns weights [T, k] and experts, int32 [T, k], by falling logit; ties go to the lower index
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

// The gradient of the logits.
//   grad: [T, k], that of the weights; logits: [T, E], experts: int32 [T, k]; returns [T, E]
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
