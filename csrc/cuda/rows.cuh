// How threads cover the rows of a matrix: a warp for each row, or blocks as rectangles of threads. No torch header.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch.cuh"

namespace moe {

// Threads of a block. Not measured. Kernels whose launch bounds also ask for one block per multiprocessor do so because
// ptxas otherwise spills registers to let more blocks fit (`make gpu-static` shows the spills).
constexpr int kRowThreads = 256;

// Covers a matrix [rows, packs * V] with one thread for each pack of V elements. A block is a rectangle of
// kRowThreads / lanes rows by `lanes` packs.
struct RowTiles {
  int lanes = 1;    // a power of two: the least that covers a row, but at most kRowThreads
  unsigned chunks;  // blocks along a row
  int64_t blocks;   // in all

  RowTiles(int64_t rows, int64_t packs) {
    while (lanes < packs && lanes < kRowThreads) lanes *= 2;
    chunks = static_cast<unsigned>((packs + lanes - 1) / lanes);
    const int64_t height = kRowThreads / lanes;
    blocks = (rows + height - 1) / height * chunks;
  }
  // The row and the pack of this thread, which may lie beyond the matrix.
  __device__ __forceinline__ int64_t row() const {
    return int64_t{blockIdx.x / chunks} * (kRowThreads / lanes) + threadIdx.x / lanes;
  }
  __device__ __forceinline__ int64_t pack() const { return int64_t{blockIdx.x % chunks} * lanes + threadIdx.x % lanes; }
};

// The expert of a row: the last one that begins at or before it. An expert's offset counts `scale` rows.
//   offsets: [experts + 1]
__device__ __forceinline__ int64_t expert_of(int64_t row, const int32_t* offsets, int64_t experts, int64_t scale = 1) {
  int64_t e = 0, above = experts;
  while (above - e > 1) {
    const int64_t middle = (e + above) / 2;
    (offsets[middle] * scale <= row ? e : above) = middle;
  }
  return e;
}

// With one warp per row: the row of this thread's warp, which may be beyond the last, and the blocks for `rows` rows.
__device__ __forceinline__ int64_t warp_row() {
  return int64_t{blockIdx.x} * (kRowThreads / kWarp) + threadIdx.x / kWarp;
}
inline int64_t warp_row_blocks(int64_t rows) { return (rows + kRowThreads / kWarp - 1) / (kRowThreads / kWarp); }

}  // namespace moe
