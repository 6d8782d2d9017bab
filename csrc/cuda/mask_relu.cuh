// ReLU, hardtanh and leaky ReLU that keep one bit per element, on a GPU. A thread has a pack; neighbouring threads join
// their bits into bytes.
#pragma once

#include "common/rectifier.h"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"

namespace moe {

constexpr int kReluThreads = 256;  // of a block; not measured

//   x: [count] -> y: [count], which may be x itself, bits: [ceil(count / 8)]
template <class T, int V>
__global__ void __launch_bounds__(kReluThreads)
    mask_relu_kernel(const T* x, T* y, uint8_t* bits, int64_t count, Rectifier<wide_t<T>> rectifier) {
  const int64_t i = (int64_t{blockIdx.x} * kReluThreads + threadIdx.x) * V;
  const bool whole = i + V <= count;
  Pack<T, V> pack = {};
  if (whole) {
    pack = load<V>(x + i);
  } else {
    for (int v = 0; v < V; ++v) pack.at[v] = i + v < count ? x[i + v] : narrow<T>(0);
  }
  unsigned passed = 0;
  for (int v = 0; v < V; ++v) {
    const auto value = widen(pack.at[v]);
    const bool passes = rectifier.passes(value);
    passed |= unsigned{passes && i + v < count} << v;
    if (!passes) pack.at[v] = narrow<T>(rectifier.beyond(value));
  }
  if (whole) {
    store(y + i, pack);
  } else {
    for (int v = 0; v < V && i + v < count; ++v) y[i + v] = pack.at[v];
  }
  passed <<= i % 8;
  for (int neighbour = 1; neighbour < 8 / V; neighbour *= 2) {
    passed |= __shfl_xor_sync(kAllLanes, passed, neighbour);
  }
  if (i % 8 == 0 && i < count) bits[i / 8] = static_cast<uint8_t>(passed);
}

// out is grad where the bit is set, else what remains of it.
//   grad: [count], bits: [ceil(count / 8)] -> out: [count]
template <class T, int V>
__global__ void __launch_bounds__(kReluThreads)
    mask_relu_backward_kernel(const T* grad, const uint8_t* bits, T* out, int64_t count,
                              Rectifier<wide_t<T>> rectifier) {
  const int64_t i = (int64_t{blockIdx.x} * kReluThreads + threadIdx.x) * V;
  if (i >= count) return;
  const unsigned passed = bits[i / 8] >> i % 8;
  const auto of_x = [&](T of_y, int v) { return passed >> v & 1 ? of_y : narrow<T>(rectifier.remains(widen(of_y))); };
  if (i + V <= count) {
    auto pack = load<V>(grad + i);
    for (int v = 0; v < V; ++v) pack.at[v] = of_x(pack.at[v], v);
    store(out + i, pack);
  } else {
    for (int v = 0; v < V && i + v < count; ++v) out[i + v] = of_x(grad[i + v], v);
  }
}

// Blocks for `count` elements, `pack` to a thread.
inline int64_t relu_blocks(int64_t count, int pack) {
  const int64_t width = int64_t{kReluThreads} * pack;
  return (count + width - 1) / width;
}

// x: [count] -> y: [count], bits: [ceil(count / 8)]
template <class T>
void launch_mask_relu(const T* x, T* y, uint8_t* bits, int64_t count, Rectifier<wide_t<T>> rectifier,
                      cudaStream_t stream) {
  constexpr int V = kPack<T>;
  const bool aligned = is_aligned<T, V>(x) && is_aligned<T, V>(y);
  cuda_launch("mask_relu_forward", aligned ? mask_relu_kernel<T, V> : mask_relu_kernel<T, 1>,
              relu_blocks(count, aligned ? V : 1), kReluThreads, stream, x, y, bits, count, rectifier);
}

// grad: [count], bits: [ceil(count / 8)] -> out: [count]
template <class T>
void launch_mask_relu_backward(const T* grad, const uint8_t* bits, T* out, int64_t count,
                               Rectifier<wide_t<T>> rectifier, cudaStream_t stream) {
  constexpr int V = kPack<T>;
  const bool aligned = is_aligned<T, V>(grad) && is_aligned<T, V>(out);
  cuda_launch("mask_relu_backward", aligned ? mask_relu_backward_kernel<T, V> : mask_relu_backward_kernel<T, 1>,
              relu_blocks(count, aligned ? V : 1), kReluThreads, stream, grad, bits, out, count, rectifier);
}

}  // namespace moe
