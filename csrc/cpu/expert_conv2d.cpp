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

// One expert's gradient of a weight of 1 x 1 kernels, a matrix product over the pixels that are not in the padding. It
// is for images that are channels-last: with a number of channels that is no multiple of 8 oneDNN writes beyond its
// buffer, and to change their layout takes 9 ms where this takes 0.7 (128 images of 16 x 32 x 32, stride 2, one thread,
// Zen 5).
//   grad: [n, O, H', W'], x: [n, C, H, W], stride and padding: (vertical, horizontal); returns [O, C, 1, 1]
Tensor pointwise_weight_grad(const Tensor& grad, const Tensor& x, const Shape& stride, const Shape& padding) {
  const int64_t O = grad.size(1), C = x.size(1);
  const auto first = [&](int i) { return (padding[i] + stride[i] - 1) / stride[i]; };  // output pixel
  const auto count = [&](int i) {
    return std::max<int64_t>(0, (x.size(2 + i) - 1 + padding[i]) / stride[i] + 1 - first(i));
  };
  // Every step-th pixel of t from the one at (top, left) on: [n, count(0), count(1), channels], contiguous.
  const auto pixels = [&](const Tensor& t, int64_t top, int64_t left, const Shape& step) {
    const Shape sizes{t.size(0), count(0), count(1), t.size(1)};
    const Shape steps{t.stride(0), t.stride(2) * step[0], t.stride(3) * step[1], t.stride(1)};
    return as_contiguous(view_at(t, top * t.stride(2) + left * t.stride(3), sizes, steps));
  };
  const Tensor grads = pixels(grad, first(0), first(1), kOnes);
  const Tensor images = pixels(x, first(0) * stride[0] - padding[0], first(1) * stride[1] - padding[1], stride);
  const int64_t rows = x.size(0) * count(0) * count(1);
  Tensor out = new_tensor(x, {O, C, 1, 1});
  call_aten("aten::mm", "out", view_at(grads, 0, {O, rows}, {1, O}), view_at(images, 0, {rows, C}, {C, 1}),
            view_at(out, 0, {O, C}, {C, 1}));
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
  Tensor out = new_tensor(grad, {num_experts, grad.size(1), x.size(1), kernel_height, kernel_width});
  for (int64_t e = 0; e < num_experts; ++e) {
    Tensor out_e = item_of(out, e);
    const int64_t begin = ranges[e], count = ranges[e + 1] - begin;
    if (count == 0) {
      torch::stable::zero_(out_e);
      continue;
    }
    const Tensor values = to_native_type(rows_of(grad, begin, count)),
                 images = to_native_type(rows_of(x, begin, count));
    const bool pointwise = kernel_height * kernel_width == 1 && !(values.is_contiguous() && images.is_contiguous());
    torch::stable::copy_(out_e, pointwise ? pointwise_weight_grad(values, images, stride, padding)
                                          : convolution_backward(values, images, new_tensor(values, shape(out_e)),
                                                                 stride, padding, false));
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
