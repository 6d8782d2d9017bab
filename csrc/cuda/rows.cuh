// How threads cover the rows of a matrix: a warp each, or in tiles of threads that lie side by side. No torch header.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch.cuh"

namespace moe {

// Where a kernel's launch bounds ask for one block at least, ptxas does not spill to let one more fit.
constexpr int kRowThreads = 256;

// Blocks of kRowThreads threads over rows of `packs` packs: `lanes` threads, a power of two, side by side in a row, and
// `chunks` blocks along it.
struct RowTiles {
  int lanes = 1;
  unsigned chunks;
  int64_t blocks;

  RowTiles(int64_t rows, int64_t packs) {
    while (lanes < packs && lanes < kRowThreads) lanes *= 2;
    chunks = static_cast<unsigned>((packs + lanes - 1) / lanes);
    const int64_t height = kRowThreads / lanes;
    blocks = (rows + height - 1) / height * chunks;
  }
  __device__ __forceinline__ int64_t row() const {
    return int64_t{blockIdx.x / chunks} * (kRowThreads / lanes) + threadIdx.x / lanes;
  }
  __device__ __forceinline__ int64_t pack() const { return int64_t{blockIdx.x % chunks} * lanes + threadIdx.x % lanes; }
};

// The expert of a row: the last that begins, at `scale` rows to the offset, no later.
__device__ __forceinline__ int64_t expert_of(int64_t row, const int32_t* offsets, int64_t experts, int64_t scale = 1) {
  int64_t e = 0, above = experts;
  while (above - e > 1) {
    const int64_t middle = (e + above) / 2;
    (offsets[middle] * scale <= row ? e : above) = middle;
  }
  return e;
}

// One warp per row: the row of this thread's warp, and the number of blocks for `rows` of them.
__device__ __forceinline__ int64_t warp_row() {
  return int64_t{blockIdx.x} * (kRowThreads / kWarp) + threadIdx.x / kWarp;
}
inline int64_t warp_row_blocks(int64_t rows) { return (rows + kRowThreads / kWarp - 1) / (kRowThreads / kWarp); }

}  // namespace moe
