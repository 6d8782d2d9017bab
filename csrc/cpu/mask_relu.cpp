// ReLU whose backward needs one bit per element. Element i, counted in storage order, has bit i % 8 of byte i / 8.
#include <algorithm>
#include <cstring>

#include "common/layout.h"

namespace moe {
namespace {

// Elements whose flags are a byte each before they are packed, so that loops vectorise. 128 and 2048 take 0.96 and 1.07
// of the time (tuned-constants.md).
constexpr int64_t kBlock = 512;
// Fewest blocks of a task. For half a million elements 8 and 512 take 1.00 of the time (tuned-constants.md).
constexpr int64_t kGrain = 64;

// Calls f(first_element, elements, first_byte, bytes) for every block, in parallel.
template <class F>
void for_each_block(int64_t count, const F& f) {
  torch::stable::parallel_for(0, (count + kBlock - 1) / kBlock, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t n = std::min(kBlock, count - block * kBlock);
      f(block * kBlock, n, block * (kBlock / 8), (n + 7) / 8);
    }
  });
}

// A NaN stays NaN and passes its gradient.
//   x: any shape; returns y of the shape and layout of x, and bits: uint8 [ceil(numel / 8)]
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
    for_each_block(count, [=](int64_t first, int64_t n, int64_t first_byte, int64_t num_bytes) {
      uint8_t pass[kBlock] = {};
      for (int64_t i = 0; i < n; ++i) {
        const T v = src[first + i];
        const bool positive = !(static_cast<acc_t<T>>(v) <= 0);
        pass[i] = positive;
        dst[first + i] = positive ? v : T(0);
      }
      for (int64_t b = 0; b < num_bytes; ++b) {
        uint64_t word;
        std::memcpy(&word, pass + 8 * b, 8);
        mask[first_byte + b] = static_cast<uint8_t>(word * 0x0102040810204080 >> 56);  // eight 0/1 bytes to one byte
      }
    });
  });
  return {y, bits};
}

// The gradient of x: grad where the bit is set, else 0.
//   grad: the shape of x, bits: uint8 [ceil(numel / 8)] in the storage order of the given layout
//   returns the shape of grad, in the given layout
Tensor mask_relu_backward(const Tensor& grad, const Tensor& bits, bool channels_last) {
  const Tensor dense = as_layout(grad, channels_last), dense_bits = as_contiguous(bits);
  const int64_t count = grad.numel();
  check_bits(bits, count);
  Tensor out = new_tensor(grad, shape(grad), channels_last);
  const uint8_t* mask = data<uint8_t>(dense_bits);
  dispatch_float(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    const T* src = data<T>(dense);
    T* dst = mutable_data<T>(out);
    for_each_block(count, [=](int64_t first, int64_t n, int64_t first_byte, int64_t num_bytes) {
      uint8_t pass[kBlock];
      for (int64_t b = 0; b < num_bytes; ++b) {
        const uint64_t word = mask[first_byte + b] * 0x0101010101010101 & 0x8040201008040201;  // bit i alone in byte i
        std::memcpy(pass + 8 * b, &word, 8);
      }
      for (int64_t i = 0; i < n; ++i) {
        const T v = src[first + i];  // loaded in any case, so that the loop vectorises
        dst[first + i] = pass[i] ? v : T(0);
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
