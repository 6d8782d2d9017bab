// Grouped convolutions of a batch sorted by expert. Each block of images is one convolution of ATen's (oneDNN's).
#include "common/layout.h"
#include "cpu/blocks.h"
#include "cpu/narrow.h"

namespace moe {
namespace {

// Images of a block. All blocks but an expert's last have one shape, for which oneDNN then need not build new
// primitives in every batch. A training step of RT-ER on the digits took 112 ms with blocks of 32, 174 with 16, which
// cost more calls, 131 with 64, which leave a thread idle, and 145 without blocks (AVX2, two threads, docs/facts.md).
constexpr int64_t kImages = 32;
const Shape kOnes{1, 1}, kZeros{0, 0};  // dilation and output padding

// One expert's gradient of x if to_input, else of the weight. The other is all that is read of the two: for the one
// whose gradient is wanted an empty tensor of its shape will do.
//   grad: [n, O, H', W'], x: [n, C, H, W], weight: [O, C, kh, kw], stride and padding: (vertical, horizontal)
//   returns [n, C, H, W] or [O, C, kh, kw]
Tensor convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Shape& stride,
                            const Shape& padding, bool to_input) {
  const std::optional<Shape> no_bias;
  const bool wanted[] = {to_input, !to_input, false};
  const auto mask = torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3);
  const auto grads = call_aten<3>("aten::convolution_backward", "", grad, x, weight, no_bias, stride, padding, kOnes,
                                  false, kZeros, int64_t{1}, mask);
  return grads[to_input ? 0 : 1];
}

// The grouped convolution.
//   x: [N, C, H, W], weight: [E, O, C, kh, kw], bias: [E, O] or none, offsets: [E + 1]
//   stride, padding: (vertical, horizontal)
//   returns [N, O, H', W'] in the layout of x
Tensor expert_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
                     const Shape& stride, const Shape& padding) {
  const auto ranges = read_offsets(offsets, weight.size(0), x.size(0));
  const auto extent = [&](int i) { return (x.size(2 + i) + 2 * padding[i] - weight.size(3 + i)) / stride[i] + 1; };
  Tensor out = new_tensor(x, {x.size(0), weight.size(1), extent(0), extent(1)}, is_channels_last(x));
  for_each_block(row_blocks(ranges, kImages), [&](const Block& block) {
    Tensor target = rows_of(out, block.begin, block.count);
    torch::stable::copy_(
        target, call_aten("aten::convolution", "", to_native_type(rows_of(x, block.begin, block.count)),
                          to_native_type(item_of(weight, block.expert)), to_native_type(item_of(bias, block.expert)),
                          stride, padding, kOnes, false, kZeros, int64_t{1}));
  });
  return out;
}

// The gradient of x.
//   grad: [N, O, H', W'], weight: [E, O, C, kh, kw], offsets: [E + 1], stride, padding: (vertical, horizontal)
//   returns [N, C, height, width] in the layout of grad
Tensor expert_conv2d_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& offsets, int64_t height,
                                int64_t width, const Shape& stride, const Shape& padding) {
  const auto ranges = read_offsets(offsets, weight.size(0), grad.size(0));
  Tensor out = new_tensor(grad, {grad.size(0), weight.size(2), height, width}, is_channels_last(grad));
  for_each_block(row_blocks(ranges, kImages), [&](const Block& block) {
    Tensor target = rows_of(out, block.begin, block.count);
    const Tensor values = to_native_type(rows_of(grad, block.begin, block.count));
    const Tensor like_x = new_tensor(values, shape(target), is_channels_last(grad));
    torch::stable::copy_(target, convolution_backward(values, like_x, to_native_type(item_of(weight, block.expert)),
                                                      stride, padding, true));
  });
  return out;
}

// The gradient of the weight; an expert without images gets zeros. One expert after the other, each on all threads, so
// that this is the only result in this file whose last bits may depend on the number of threads.
//   grad: [N, O, H', W'], x: [N, C, H, W], offsets: [E + 1], stride, padding: (vertical, horizontal)
//   returns [E, O, C, kernel_height, kernel_width]
Tensor expert_conv2d_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& offsets, int64_t kernel_height,
                                 int64_t kernel_width, const Shape& stride, const Shape& padding) {
  const int64_t num_experts = offsets.size(0) - 1;
  const auto ranges = read_offsets(offsets, num_experts, grad.size(0));
  // For 1 x 1 kernels the images are made contiguous: channels-last, with a number of channels that is no multiple of
  // 8, oneDNN writes beyond its buffer.
  const bool pointwise = kernel_height * kernel_width == 1;
  const Tensor grads = pointwise ? as_layout(grad, false) : grad, images = pointwise ? as_layout(x, false) : x;
  Tensor out = new_tensor(grad, {num_experts, grad.size(1), x.size(1), kernel_height, kernel_width});
  for (int64_t e = 0; e < num_experts; ++e) {
    Tensor out_e = item_of(out, e);
    const int64_t begin = ranges[e], count = ranges[e + 1] - begin;
    if (count == 0) {
      torch::stable::zero_(out_e);
    } else {
      const Tensor values = to_native_type(rows_of(grads, begin, count));
      torch::stable::copy_(out_e, convolution_backward(values, to_native_type(rows_of(images, begin, count)),
                                                       new_tensor(values, shape(out_e)), stride, padding, false));
    }
  }
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("expert_conv2d", TORCH_BOX(&moe::expert_conv2d));
  m.impl("expert_conv2d_input_grad", TORCH_BOX(&moe::expert_conv2d_input_grad));
  m.impl("expert_conv2d_weight_grad", TORCH_BOX(&moe::expert_conv2d_weight_grad));
}
