// Stable sort of the slots by expert: checks and launches. It is not checked that experts lie in [0, num_experts),
// since the host would have to wait for the device: that is up to the caller.
#include "cuda/group_by_expert.cuh"
#include "cuda/tensor.h"

namespace moe {
namespace {

// experts: int32 or int64 [T, k] or [T]; returns int32 order [T * k], position like experts, offsets [num_experts + 1]
std::tuple<Tensor, Tensor, Tensor> group_by_expert(const Tensor& experts, int64_t num_experts) {
  const int64_t slots = experts.numel();
  MOE_CHECK(slots <= INT32_MAX, "experts must have fewer than 2^31 elements, got ", slots);
  const CudaStream stream(experts);
  const Tensor dense = as_contiguous(experts);
  Tensor order = new_tensor(experts, {slots}, ScalarType::Int);
  Tensor position = new_tensor(experts, shape(experts), ScalarType::Int);
  Tensor offsets = new_tensor(experts, {num_experts + 1}, ScalarType::Int);
  Tensor scratch = new_tensor(experts, {sort_scratch(slots, num_experts)}, ScalarType::Int);
  const auto sort = [&](auto id) {
    launch_group_by_expert(data<decltype(id)>(dense), slots, num_experts, mutable_data<int32_t>(scratch),
                           mutable_data<int32_t>(order), mutable_data<int32_t>(position),
                           mutable_data<int32_t>(offsets), stream);
  };
  experts.scalar_type() == ScalarType::Long ? sort(int64_t{}) : sort(int32_t{});
  return {order, position, offsets};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) { m.impl("group_by_expert", TORCH_BOX(&moe::group_by_expert)); }
