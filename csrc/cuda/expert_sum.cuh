// Sums of the rows of each expert, and of rows that share an index, on a GPU: in a fixed order, without atomics.
#pragma once

#include "cuda/group_by_expert.cuh"
#include "cuda/rows.cuh"

namespace moe {

// A block sums kSumRows rows of kSumLanes columns, kSumHeight of the rows at a time. Not measured.
constexpr int kSumRows = 128, kSumLanes = 32, kSumThreads = 256, kSumHeight = kSumThreads / kSumLanes;

// The partial sums [partial_rows, width] of an expert_sum: that over the rows of expert e in block b is row b + e. From
// one such pair (b, e) to the next either b or e grows, so that no two share a row.
inline int64_t row_blocks(int64_t rows) { return (rows + kSumRows - 1) / kSumRows; }
inline int64_t partial_rows(int64_t rows, int64_t experts) { return row_blocks(rows) + experts; }

// The first pass: sums of the rows of each expert within a block.
//   x: [rows, width], offsets: [experts + 1] -> partial: [partial_rows, width], of which some rows stay unwritten
//   bands: blocks along a row
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    expert_sum_partial_kernel(const T* x, const int32_t* offsets, wide_t<T>* partial, int64_t rows, int64_t experts,
                              int64_t width, unsigned bands) {
  using A = wide_t<T>;
  __shared__ A sums[kSumHeight][kSumLanes];
  const int lane = threadIdx.x % kSumLanes, y = threadIdx.x / kSumLanes;
  const int64_t b = blockIdx.x / bands, column = int64_t{blockIdx.x % bands} * kSumLanes + lane;
  const int64_t begin = b * kSumRows, end = begin + kSumRows < rows ? begin + kSumRows : rows;
  for (int64_t e = expert_of(begin, offsets, experts); e < experts && offsets[e] < end; ++e) {
    const int64_t first = offsets[e] > begin ? offsets[e] : begin, last = offsets[e + 1] < end ? offsets[e + 1] : end;
    if (first >= last) continue;
    A sum = 0;
    if (column < width) {
      for (int64_t j = first + y; j < last; j += kSumHeight) sum += widen(x[j * width + column]);
    }
    sums[y][lane] = sum;
    __syncthreads();
    for (int height = kSumHeight / 2; height > 0; height /= 2) {
      if (y < height) sums[y][lane] += sums[y + height][lane];
      __syncthreads();
    }
    if (y == 0 && column < width) partial[(b + e) * width + column] = sums[0][lane];
    __syncthreads();
  }
}

// The second pass: sums of an expert's partial sums, in double.
//   partial: [partial_rows, width], offsets: [experts + 1] -> out: [experts, width]
template <class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    expert_sum_kernel(const wide_t<T>* partial, const int32_t* offsets, T* out, int64_t experts, int64_t width,
                      RowTiles tiles) {
  const int64_t e = tiles.row(), column = tiles.pack();
  if (e >= experts || column >= width) return;
  const int64_t first = offsets[e], last = offsets[e + 1];
  double sum = 0;
  for (int64_t b = first / kSumRows; first < last && b <= (last - 1) / kSumRows; ++b) {
    sum += partial[(b + e) * width + column];
  }
  out[e * width + column] = narrow<T>(static_cast<wide_t<T>>(sum));
}

// x: [rows, width], offsets: [experts + 1], partial: [partial_rows, width], scratch -> out: [experts, width]
template <class T>
void launch_expert_sum(const T* x, const int32_t* offsets, wide_t<T>* partial, T* out, int64_t rows, int64_t experts,
                       int64_t width, cudaStream_t stream) {
  const int64_t bands = (width + kSumLanes - 1) / kSumLanes;
  cuda_launch("expert_sum", expert_sum_partial_kernel<T>, row_blocks(rows) * bands, kSumThreads, stream, x, offsets,
              partial, rows, experts, width, static_cast<unsigned>(bands));
  const RowTiles tiles(experts, width);
  cuda_launch("expert_sum", expert_sum_kernel<T>, tiles.blocks, kRowThreads, stream, partial, offsets, out, experts,
              width, tiles);
}

// out[r] is the sum of the rows x[order[j]], j in [offsets[r], offsets[r + 1]), in rising order of j.
//   x: [count, width], order: [count], the rows of x sorted by index, offsets: [rows + 1] -> out: [rows, width]
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, 1)
    index_sum_kernel(const T* x, const int32_t* order, const int32_t* offsets, T* out, int64_t rows, int64_t width,
                     RowTiles tiles) {
  const int64_t r = tiles.row(), column = tiles.pack() * V;
  if (r >= rows || column >= width) return;
  wide_t<T> sum[V] = {};
  for (int64_t j = offsets[r]; j < offsets[r + 1]; ++j) {
    const auto part = load<V>(x + order[j] * width + column);
    for (int v = 0; v < V; ++v) sum[v] += widen(part.at[v]);
  }
  Pack<T, V> result;
  for (int v = 0; v < V; ++v) result.at[v] = narrow<T>(sum[v]);
  store(out + r * width + column, result);
}

// int32 elements of scratch memory of launch_index_sum: order, offsets, and the scratch memory of the sort.
inline int64_t index_sum_scratch(int64_t count, int64_t rows) { return count + rows + 1 + sort_scratch(count, rows); }

// out[r] is the sum of x[j] over the j with index[j] == r, in rising order of j.
//   x: [count, width], index: [count] in [0, rows), scratch: [index_sum_scratch] -> out: [rows, width]
template <class T>
void launch_index_sum(const T* x, const int32_t* index, int32_t* scratch, T* out, int64_t count, int64_t rows,
                      int64_t width, cudaStream_t stream) {
  if (rows == 0) return;
  int32_t *order = scratch, *offsets = order + count;
  launch_group_by_expert(index, count, rows, offsets + rows + 1, order, nullptr, offsets, stream);
  constexpr int V = kPack<T>;
  const bool packed = width % V == 0 && is_aligned<T, V>(x) && is_aligned<T, V>(out);
  const RowTiles tiles(rows, packed ? width / V : width);
  cuda_launch("index_sum", packed ? index_sum_kernel<T, V> : index_sum_kernel<T, 1>, tiles.blocks, kRowThreads, stream,
              x, order, offsets, out, rows, width, tiles);
}

}  // namespace moe
