// combine and its adjoints on the GPU: each thread sums a pack of columns over a row's slots, in their order.
#pragma once

#include "cuda/rows.cuh"

namespace moe {

// position [rows, k] and weights [rows, k]; the arrays' other sizes follow from `width`, the elements of a row.
struct Slots {
  const int32_t* position;
  int64_t rows, k, width;
};

// y [rows * k, width] -> out [rows, width]
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads)
    combine_kernel(Slots s, const T* y, const wide_t<T>* weights, T* out, RowTiles tiles) {
  const int64_t t = tiles.row(), column = tiles.pack() * V;
  if (t >= s.rows || column >= s.width) return;
  wide_t<T> sum[V] = {};
#pragma unroll 4
  for (int64_t slot = t * s.k; slot < (t + 1) * s.k; ++slot) {
    const auto part = load<V>(y + s.position[slot] * s.width + column);
    for (int v = 0; v < V; ++v) sum[v] += weights[slot] * widen(part.at[v]);
  }
  Pack<T, V> result;
  for (int v = 0; v < V; ++v) result.at[v] = narrow<T>(sum[v]);
  store(out + t * s.width + column, result);
}

// grad [rows, width] -> out [rows * k, width]
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads)
    combine_input_grad_kernel(Slots s, const T* grad, const wide_t<T>* weights, T* out, RowTiles tiles) {
  const int64_t t = tiles.row(), column = tiles.pack() * V;
  if (t >= s.rows || column >= s.width) return;
  const auto part = load<V>(grad + t * s.width + column);
#pragma unroll 4
  for (int64_t slot = t * s.k; slot < (t + 1) * s.k; ++slot) {
    Pack<T, V> result;
    for (int v = 0; v < V; ++v) result.at[v] = narrow<T>(weights[slot] * widen(part.at[v]));
    store(out + s.position[slot] * s.width + column, result);
  }
}

// grad [rows, width], y [rows * k, width] -> out [rows, k]: one warp per slot, the slots of a row side by side.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads)
    combine_weight_grad_kernel(Slots s, const T* grad, const T* y, wide_t<T>* out) {
  const int64_t slot = warp_row();
  if (slot >= s.rows * s.k) return;
  const T *a = grad + slot / s.k * s.width, *b = y + s.position[slot] * s.width;
  const int lane = threadIdx.x % kWarp;
  wide_t<T> sum = 0;
#pragma unroll 2
  for (int64_t column = lane * V; column < s.width; column += kWarp * V) {
    const auto left = load<V>(a + column), right = load<V>(b + column);
    wide_t<T> part = 0;
    for (int v = 0; v < V; ++v) part += widen(left.at[v]) * widen(right.at[v]);
    sum += part;
  }
  sum = warp_sum(sum);
  if (lane == 0) out[slot] = sum;
}

template <class T>
bool rows_are_packs(int64_t width, const T* a, const T* b) {
  return width % kPack<T> == 0 && is_aligned<T, kPack<T>>(a) && is_aligned<T, kPack<T>>(b);
}

template <class T>
void launch_combine(Slots s, const T* y, const wide_t<T>* weights, T* out, cudaStream_t stream) {
  const bool packed = rows_are_packs(s.width, y, out);
  const RowTiles tiles(s.rows, packed ? s.width / kPack<T> : s.width);
  cuda_launch("combine", packed ? combine_kernel<T, kPack<T>> : combine_kernel<T, 1>, tiles.blocks, kRowThreads, stream,
              s, y, weights, out, tiles);
}

template <class T>
void launch_combine_input_grad(Slots s, const T* grad, const wide_t<T>* weights, T* out, cudaStream_t stream) {
  const bool packed = rows_are_packs(s.width, grad, out);
  const RowTiles tiles(s.rows, packed ? s.width / kPack<T> : s.width);
  cuda_launch("combine_input_grad", packed ? combine_input_grad_kernel<T, kPack<T>> : combine_input_grad_kernel<T, 1>,
              tiles.blocks, kRowThreads, stream, s, grad, weights, out, tiles);
}

template <class T>
void launch_combine_weight_grad(Slots s, const T* grad, const T* y, wide_t<T>* out, cudaStream_t stream) {
  const bool packed = rows_are_packs(s.width, grad, y);
  cuda_launch("combine_weight_grad",
              packed ? combine_weight_grad_kernel<T, kPack<T>> : combine_weight_grad_kernel<T, 1>,
              warp_row_blocks(s.rows * s.k), kRowThreads, stream, s, grad, y, out);
}

}  // namespace moe
