// ReLU, hardtanh and leaky ReLU, whose backward needs one bit per element. Element i, counted in storage order, has bit
// i % 8 of byte i / 8.
#include <algorithm>

#include "common/layout.h"
#include "common/rectifier.h"

namespace moe {
namespace {

// Elements whose flags are a byte each before they are packed, so that loops vectorise. 512 and 8192 take 1.15 and
// 1.07 of the time (tuned-constants.md).
constexpr int64_t kBlock = 2048;
// Fewest blocks of a task. For half a million elements 2 and 128 take 1.00 of the time (tuned-constants.md).
constexpr int64_t kGrain = 16;

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

// y = x within the bounds of the Rectifier, and bits of where its gradient passes.
//   x: any shape, dense; y: x itself, or of its shape and layout; returns bits: uint8 [ceil(numel / 8)]
Tensor rectify(const Tensor& x, double low, std::optional<double> high, std::optional<double> slope, Tensor& y) {
  const int64_t count = x.numel();
  Tensor bits = new_tensor(x, {(count + 7) / 8}, ScalarType::Byte);
  uint8_t* mask = mutable_data<uint8_t>(bits);
  dispatch_float(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    const T* src = data<T>(x);
    T* dst = mutable_data<T>(y);
    const Rectifier<acc_t<T>> rectifier(low, high, slope);
    for_each_block(count, [=](int64_t first, int64_t n, int64_t first_byte, int64_t num_bytes) {
      const auto own = rectifier;  // which no store can change
      uint64_t flags[kBlock / 8] = {};
      auto* pass = reinterpret_cast<uint8_t*>(flags);
      uint8_t* bytes = mask + first_byte;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const auto v = static_cast<acc_t<T>>(src[first + i]);
        pass[i] = own.passes(v);
        store(dst[first + i], pass[i] ? v : own.beyond(v));
      }
#pragma omp simd
      for (int64_t b = 0; b < num_bytes; ++b) {
        bytes[b] = static_cast<uint8_t>(flags[b] * 0x0102040810204080 >> 56);  // eight 0/1 bytes to one byte
      }
    });
  });
  return bits;
}

// x: any shape; returns y of the shape and layout of x, and bits: uint8 [ceil(numel / 8)]
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
  const Tensor dense = as_layout(grad, channels_last), dense_bits = as_contiguous(bits);
  const int64_t count = grad.numel();
  check_bits(bits, count);
  Tensor out = new_tensor(grad, shape(grad), channels_last);
  const uint8_t* mask = data<uint8_t>(dense_bits);
  dispatch_float(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    const T* src = data<T>(dense);
    T* dst = mutable_data<T>(out);
    const Rectifier<acc_t<T>> rectifier(0, std::nullopt, slope);
    for_each_block(count, [=](int64_t first, int64_t n, int64_t first_byte, int64_t num_bytes) {
      const auto own = rectifier;  // which no store can change
      uint64_t flags[kBlock / 8];
      const auto* pass = reinterpret_cast<const uint8_t*>(flags);
      const uint8_t* bytes = mask + first_byte;
#pragma omp simd
      for (int64_t b = 0; b < num_bytes; ++b) {
        flags[b] = bytes[b] * 0x0101010101010101 & 0x8040201008040201;  // bit i alone in byte i
      }
      for (int64_t i = 0; i < n; ++i) {
        const auto v = static_cast<acc_t<T>>(src[first + i]);  // loaded in any case, so that the loop vectorises
        store(dst[first + i], pass[i] ? v : own.remains(v));
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("mask_relu_forward", TORCH_BOX(&moe::mask_relu_forward));
  m.impl("mask_relu_forward_", TORCH_BOX(&moe::mask_relu_forward_));
  m.impl("mask_relu_backward", TORCH_BOX(&moe::mask_relu_backward));
}
