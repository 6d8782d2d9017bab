// ReLU whose backward needs one bit per element: bit i % 8 of byte i / 8, i counted in storage order.
#include <algorithm>
#include <cstring>

#include "common/layout.h"

namespace moe {
namespace {

constexpr int64_t kBytes = 4096;  // bytes of bits, 8 elements each, that a task handles at least

// x any shape -> y in the layout of x, bits [ceil(numel / 8)]; a NaN stays NaN and passes its gradient.
std::tuple<Tensor, Tensor> mask_relu_forward(const Tensor& x) {
  const bool channels_last = is_channels_last(x);
  const Tensor dense = as_layout(x, channels_last);
  const int64_t count = x.numel(), bytes = (count + 7) / 8;
  Tensor y = new_tensor(x, shape(x), channels_last);
  Tensor bits = new_tensor(x, {bytes}, ScalarType::Byte);
  uint8_t* mask = mutable_data<uint8_t>(bits);
  dispatch_float(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    const T* src = data<T>(dense);
    T* dst = mutable_data<T>(y);
    torch::stable::parallel_for(0, bytes, kBytes, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        uint8_t pass[8] = {};
        const int64_t n = std::min<int64_t>(8, count - 8 * b);
        for (int64_t i = 0; i < n; ++i) {
          const T v = src[8 * b + i];
          pass[i] = !(static_cast<acc_t<T>>(v) <= 0);
          dst[8 * b + i] = pass[i] ? v : T(0);
        }
        uint64_t word;
        std::memcpy(&word, pass, 8);
        mask[b] = static_cast<uint8_t>(word * 0x0102040810204080 >> 56);  // gathers eight 0/1 bytes into one
      }
    });
  });
  return {y, bits};
}

// grad any shape, bits [ceil(numel / 8)] in the storage order of the given layout -> grad where the bit is set, else 0
Tensor mask_relu_backward(const Tensor& grad, const Tensor& bits, bool channels_last) {
  const Tensor dense = as_layout(grad, channels_last), dense_bits = as_contiguous(bits);
  const int64_t count = grad.numel(), bytes = (count + 7) / 8;
  MOE_CHECK(bits.scalar_type() == ScalarType::Byte && bits.numel() == bytes, "bits must be uint8 of shape [", bytes,
            "], got ", torch::headeronly::toString(bits.scalar_type()), " with ", bits.numel(), " elements");
  Tensor out = new_tensor(grad, shape(grad), channels_last);
  const uint8_t* mask = data<uint8_t>(dense_bits);
  dispatch_float(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    const T* src = data<T>(dense);
    T* dst = mutable_data<T>(out);
    torch::stable::parallel_for(0, bytes, kBytes, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const int64_t n = std::min<int64_t>(8, count - 8 * b);
        for (int64_t i = 0; i < n; ++i) dst[8 * b + i] = mask[b] >> i & 1 ? src[8 * b + i] : T(0);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("mask_relu_forward", TORCH_BOX(&moe::mask_relu_forward));
  m.impl("mask_relu_backward", TORCH_BOX(&moe::mask_relu_backward));
}
