// Grouped convolutions of a batch sorted by expert, each block of images one convolution of ATen's (oneDNN).
#include "common/layout.h"
#include "cpu/blocks.h"
#include "cpu/narrow.h"

namespace moe {
namespace {

// Images of a block. All but an expert's last block have one shape, which spares oneDNN new primitives for every batch.
constexpr int64_t kImages = 32;
const Shape kOnes{1, 1}, kZeros{0, 0};  // dilation and output padding

// ATen's gradients of one expert's convolution. Of x and weight only the one behind the other's gradient is read.
Tensor convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Shape& stride,
                            const Shape& padding, bool to_input) {
  const std::optional<Shape> no_bias;
  const bool wanted[] = {to_input, !to_input, false};
  const auto mask = torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3);
  const auto grads = call_aten<3>("aten::convolution_backward", "", grad, x, weight, no_bias, stride, padding, kOnes,
                                  false, kZeros, int64_t{1}, mask);
  return grads[to_input ? 0 : 1];
}

// x [N, C, H, W], weight [E, O, C, kh, kw], bias [E, O], offsets [E + 1] -> [N, O, H', W'] in the layout of x
Tensor expert_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
                     const Shape& stride, const Shape& padding) {
  const auto ranges = read_offsets(offsets, weight.size(0), x.size(0));
  const auto extent = [&](int i) { return (x.size(2 + i) + 2 * padding[i] - weight.size(3 + i)) / stride[i] + 1; };
  Tensor out = new_tensor(x, {x.size(0), weight.size(1), extent(0), extent(1)}, is_channels_last(x));
  for_each_block(row_blocks(ranges, kImages), [&](const Block& block) {
    Tensor target = rows_of(out, block.begin, block.count);
    torch::stable::copy_(
        target, call_aten("aten::convolution", "", computable(rows_of(x, block.begin, block.count)),
                          computable(item_of(weight, block.expert)), computable(item_of(bias, block.expert)), stride,
                          padding, kOnes, false, kZeros, int64_t{1}));
  });
  return out;
}

// grad [N, O, H', W'], weight [E, O, C, kh, kw] -> [N, C, height, width] in the layout of grad
Tensor expert_conv2d_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& offsets, int64_t height,
                                int64_t width, const Shape& stride, const Shape& padding) {
  const auto ranges = read_offsets(offsets, weight.size(0), grad.size(0));
  Tensor out = new_tensor(grad, {grad.size(0), weight.size(2), height, width}, is_channels_last(grad));
  for_each_block(row_blocks(ranges, kImages), [&](const Block& block) {
    Tensor target = rows_of(out, block.begin, block.count);
    const Tensor values = computable(rows_of(grad, block.begin, block.count));
    const Tensor like_x = new_tensor(values, shape(target), is_channels_last(grad));
    torch::stable::copy_(
        target, convolution_backward(values, like_x, computable(item_of(weight, block.expert)), stride, padding, true));
  });
  return out;
}

// grad [N, O, H', W'], x [N, C, H, W] -> [E, O, C, kh, kw]; an expert without rows gets zeros. One expert after the
// other, each on all threads: the only result here whose last bits may depend on the number of threads.
Tensor expert_conv2d_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& offsets, int64_t kernel_height,
                                 int64_t kernel_width, const Shape& stride, const Shape& padding) {
  const int64_t num_experts = offsets.size(0) - 1;
  const auto ranges = read_offsets(offsets, num_experts, grad.size(0));
  // oneDNN writes beyond its buffer for 1 x 1 kernels, channels-last images and channels that are no multiple of 8.
  const bool one = kernel_height * kernel_width == 1;
  const Tensor grads = one ? as_layout(grad, false) : grad, images = one ? as_layout(x, false) : x;
  Tensor out = new_tensor(grad, {num_experts, grad.size(1), x.size(1), kernel_height, kernel_width});
  for (int64_t e = 0; e < num_experts; ++e) {
    Tensor out_e = item_of(out, e);
    const int64_t begin = ranges[e], count = ranges[e + 1] - begin;
    if (count == 0) {
      torch::stable::zero_(out_e);
    } else {
      const Tensor values = computable(rows_of(grads, begin, count));
      torch::stable::copy_(out_e, convolution_backward(values, computable(rows_of(images, begin, count)),
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
