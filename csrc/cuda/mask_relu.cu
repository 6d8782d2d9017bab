// ReLU, hardtanh and leaky ReLU, whose backward needs one bit per element: checks and launches.
#include "common/layout.h"
#include "cuda/mask_relu.cuh"
#include "cuda/tensor.h"

namespace moe {
namespace {

// y = x within the bounds of the Rectifier, and bits of where its gradient passes.
//   x: any shape, dense; y: x itself, or of its shape and layout; returns bits: uint8 [ceil(numel / 8)]
Tensor rectify(const Tensor& x, double low, std::optional<double> high, std::optional<double> slope, Tensor& y) {
  const CudaStream stream(x);
  Tensor bits = new_tensor(x, {(x.numel() + 7) / 8}, ScalarType::Byte);
  dispatch_native(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    launch_mask_relu(data<T>(x), mutable_data<T>(y), mutable_data<uint8_t>(bits), x.numel(),
                     Rectifier<wide_t<T>>(low, high, slope), stream);
  });
  return bits;
}

// x: any shape; returns y of the shape and layout of x, and bits: uint8 [ceil(numel / 8)] in the order of memory
std::tuple<Tensor, Tensor> mask_relu_forward(const Tensor& x, double low, std::optional<double> high,
                                             std::optional<double> slope) {
  const bool channels_last = is_channels_last(x);
  Tensor y = new_tensor(x, shape(x), channels_last);
  const Tensor bits = rectify(as_layout(x, channels_last), low, high, slope, y);
  return {y, bits};
}

// The same in place.
//   x: any shape, contiguous or channels-last; returns bits
Tensor mask_relu_forward_(Tensor x, double low, std::optional<double> high, std::optional<double> slope) {
  check_dense(x);
  return rectify(x, low, high, slope, x);
}

// The gradient of x: grad where the bit is set, else slope * grad, or 0 without a slope.
//   grad: the shape of x, bits: uint8 [ceil(numel / 8)] in the storage order of the given layout
//   returns the shape of grad, in the given layout
Tensor mask_relu_backward(const Tensor& grad, const Tensor& bits, bool channels_last, std::optional<double> slope) {
  check_device(grad, {bits});
  check_bits(bits, grad.numel());
  const CudaStream stream(grad);
  const Tensor dense = as_layout(grad, channels_last), dense_bits = as_contiguous(bits);
  Tensor out = new_tensor(grad, shape(grad), channels_last);
  dispatch_native(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    launch_mask_relu_backward(data<T>(dense), data<uint8_t>(dense_bits), mutable_data<T>(out), grad.numel(),
                              Rectifier<wide_t<T>>(0, std::nullopt, slope), stream);
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) {
  m.impl("mask_relu_forward", TORCH_BOX(&moe::mask_relu_forward));
  m.impl("mask_relu_forward_", TORCH_BOX(&moe::mask_relu_forward_));
  m.impl("mask_relu_backward", TORCH_BOX(&moe::mask_relu_backward));
}
