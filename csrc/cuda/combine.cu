// Weighted sums of each row's k slots, and the two adjoints: checks and launches. It is not checked that position is a
// permutation, since the host would have to wait for the device: that is up to the caller.
#include "common/combine_arguments.h"
#include "cuda/combine.cuh"
#include "cuda/tensor.h"

namespace moe {
namespace {

// position: [T, k], row: [N, ...], any tensor with rows of the right width
Slots slots(const Tensor& position, const Tensor& row) {
  return {data<int32_t>(position), position.size(0), position.size(1), row_width(row)};
}

// out[t] = sum over i of weights[t, i] y[position[t, i]].
//   y: [T * k, ...], weights: [T, k], position: int32 [T, k]; returns [T, ...]
Tensor combine(const Tensor& y, const Tensor& weights, const Tensor& position) {
  check_device(y, {weights, position});
  const CudaStream stream(y);
  const Tensor place = dense_position(position, y.size(0)), dense = as_contiguous(y), scale = dense_weights(weights, y);
  Tensor out = new_tensor(y, with_rows(y, position.size(0)));
  dispatch_native(y.scalar_type(), "y", [&](auto zero) {
    using T = decltype(zero);
    launch_combine(slots(place, y), data<T>(dense), data<wide_t<T>>(scale), mutable_data<T>(out), stream);
  });
  return out;
}

// The gradient of y: dy[position[t, i]] = weights[t, i] grad[t].
//   grad: [T, ...], weights: [T, k], position: int32 [T, k]; returns [T * k, ...]
Tensor combine_input_grad(const Tensor& grad, const Tensor& weights, const Tensor& position) {
  check_device(grad, {weights, position});
  const CudaStream stream(grad);
  const Tensor place = dense_position(position, weights.numel()), dense = as_contiguous(grad),
               scale = dense_weights(weights, grad);
  Tensor out = new_tensor(grad, with_rows(grad, position.numel()));
  dispatch_native(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    launch_combine_input_grad(slots(place, grad), data<T>(dense), data<wide_t<T>>(scale), mutable_data<T>(out), stream);
  });
  return out;
}

// The gradient of the weights: dweights[t, i] = <grad[t], y[position[t, i]]>.
//   grad: [T, ...], y: [T * k, ...], position: int32 [T, k]; returns [T, k]
Tensor combine_weight_grad(const Tensor& grad, const Tensor& y, const Tensor& position) {
  check_device(grad, {y, position});
  check_weight_grad(grad, y);
  const CudaStream stream(grad);
  const Tensor place = dense_position(position, y.size(0)), dense = as_contiguous(y), dense_grad = as_contiguous(grad);
  Tensor out = new_tensor(y, shape(position), accumulate_type(y.scalar_type()));
  dispatch_native(y.scalar_type(), "y", [&](auto zero) {
    using T = decltype(zero);
    launch_combine_weight_grad(slots(place, y), data<T>(dense_grad), data<T>(dense), mutable_data<wide_t<T>>(out),
                               stream);
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) {
  m.impl("combine", TORCH_BOX(&moe::combine));
  m.impl("combine_input_grad", TORCH_BOX(&moe::combine_input_grad));
  m.impl("combine_weight_grad", TORCH_BOX(&moe::combine_weight_grad));
}
