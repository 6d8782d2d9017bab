// combine and its adjoints on a GPU. A thread sums a pack of columns over a row's slots, in the order of the slots.
#pragma once

#include "cuda/rows.cuh"

namespace moe {

// Where the k slots of each row are: slot i of row t is row position[t, i] of y.
//   position: [rows, k]; rows of y, grad and out have `width` elements
struct Slots {
  const int32_t* position;
  int64_t rows, k, width;
};

// out[t] = sum over i of weights[t, i] y[position[t, i]]. Unrolled by 4 so that four loads are under way; not measured.
//   y: [rows * k, width], weights: [rows, k] -> out: [rows, width]
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

// out[position[t, i]] = weights[t, i] grad[t]. Unrolled by 4: not measured.
//   grad: [rows, width], weights: [rows, k] -> out: [rows * k, width]
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

// out[t, i] = <grad[t], y[position[t, i]]>, by one warp per slot, those of a row side by side. Unrolled by 2: not
// measured.
//   grad: [rows, width], y: [rows * k, width] -> out: [rows, k]
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

// Whether rows of `width` elements that begin at a and at b can be moved in packs.
template <class T>
bool rows_are_packs(int64_t width, const T* a, const T* b) {
  return width % kPack<T> == 0 && is_aligned<T, kPack<T>>(a) && is_aligned<T, kPack<T>>(b);
}

// y: [rows * k, width], weights: [rows, k] -> out: [rows, width]
template <class T>
void launch_combine(Slots s, const T* y, const wide_t<T>* weights, T* out, cudaStream_t stream) {
  const bool packed = rows_are_packs(s.width, y, out);
  const RowTiles tiles(s.rows, packed ? s.width / kPack<T> : s.width);
  cuda_launch("combine", packed ? combine_kernel<T, kPack<T>> : combine_kernel<T, 1>, tiles.blocks, kRowThreads, stream,
              s, y, weights, out, tiles);
}

// grad: [rows, width], weights: [rows, k] -> out: [rows * k, width]
template <class T>
void launch_combine_input_grad(Slots s, const T* grad, const wide_t<T>* weights, T* out, cudaStream_t stream) {
  const bool packed = rows_are_packs(s.width, grad, out);
  const RowTiles tiles(s.rows, packed ? s.width / kPack<T> : s.width);
  cuda_launch("combine_input_grad", packed ? combine_input_grad_kernel<T, kPack<T>> : combine_input_grad_kernel<T, 1>,
              tiles.blocks, kRowThreads, stream, s, grad, weights, out, tiles);
}

// grad: [rows, width], y: [rows * k, width] -> out: [rows, k]
template <class T>
void launch_combine_weight_grad(Slots s, const T* grad, const T* y, wide_t<T>* out, cudaStream_t stream) {
  const bool packed = rows_are_packs(s.width, grad, y);
  cuda_launch("combine_weight_grad",
              packed ? combine_weight_grad_kernel<T, kPack<T>> : combine_weight_grad_kernel<T, 1>,
              warp_row_blocks(s.rows * s.k), kRowThreads, stream, s, grad, y, out);
}

}  // namespace moe
