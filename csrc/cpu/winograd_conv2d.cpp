// Grouped 3 x 3 convolutions of a batch sorted by expert, by Winograd's algorithm.
#include "common/blocks.h"
#include "common/layout.h"
#include "common/winograd.h"

namespace moe {
namespace {

template <class T>
void convolve(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
              const Shape& padding, bool turned, Tensor& out) {
  const auto *kernels = weight.const_data_ptr<T>(), *shifts = bias ? bias->const_data_ptr<T>() : nullptr;
  const int64_t depth = x.size(1), width = out.size(1), bands = (width + kFilterBand - 1) / kFilterBand;
  const Winograd<T> convolution({x.const_data_ptr<T>(), depth, x.size(2), x.size(3), is_channels_last(x)},
                                {out.mutable_data_ptr<T>(), width, out.size(2), out.size(3), is_channels_last(out)},
                                padding[0], padding[1]);
  auto rows = read_offsets(offsets, weight.size(0), x.size(0));
  for (int64_t& row : rows) row *= convolution.rows_per_image();
  const auto blocks = row_blocks(rows, convolution.rows_per_block());
  int64_t most = 0;
  for (const Block& block : blocks) most = std::max(most, block.count);
  torch::stable::parallel_for(0, static_cast<int64_t>(blocks.size()) * bands, 1, [&](int64_t first, int64_t last) {
    typename Winograd<T>::Scratch scratch(convolution, most);
    for (int64_t i = first; i < last; ++i) {
      const Block& block = blocks[i / bands];
      const Kernels<T> own{kernels + block.expert * 9 * depth * width, 9 * (turned ? 1 : depth),
                           9 * (turned ? width : 1), turned};
      const int64_t begin = i % bands * kFilterBand;
      convolution.run(block.begin, block.count, own, bias ? shifts + block.expert * width : nullptr, begin,
                      std::min(begin + kFilterBand, width), scratch);
    }
  });
}

// x [N, C, H, W], weight [E, O, C, 3, 3], bias [E, O], offsets [E + 1] -> [N, O, H', W'] in the layout of x;
// turned: O and C exchanged, and the kernels turned round.
Tensor winograd_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
                       const Shape& padding, bool turned) {
  const Tensor source = as_layout(x, is_channels_last(x)), kernels = as_contiguous(weight);
  const OptionalTensor shifts = bias ? OptionalTensor(as_contiguous(*bias)) : std::nullopt;
  Tensor out = new_tensor(
      x, {x.size(0), weight.size(turned ? 2 : 1), x.size(2) + 2 * padding[0] - 2, x.size(3) + 2 * padding[1] - 2},
      is_channels_last(x));
  switch (x.scalar_type()) {
    case ScalarType::Float:
      convolve<float>(source, kernels, shifts, offsets, padding, turned, out);
      break;
    case ScalarType::BFloat16:
      convolve<torch::headeronly::BFloat16>(source, kernels, shifts, offsets, padding, turned, out);
      break;
    case ScalarType::Half:
      convolve<torch::headeronly::Half>(source, kernels, shifts, offsets, padding, turned, out);
      break;
    default:
      fail("x must be float32, bfloat16 or float16, got ", torch::headeronly::toString(x.scalar_type()));
  }
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("winograd_conv2d", TORCH_BOX(&moe::winograd_conv2d)); }
