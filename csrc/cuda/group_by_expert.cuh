// Stable sort of the slots by expert on a GPU: a radix sort, least significant digit first, of one pass for up to 1024
// experts. Only counts, which are integers, are added atomically; places come from prefix sums, so the sort is stable.
#pragma once

#include <algorithm>

#include "cuda/rows.cuh"

namespace moe {

// Ten bits: the counts of 1024 digits for each of 8 warps, 32 kB, fit into shared memory. None of these is measured.
constexpr int kDigitBits = 10, kDigits = 1 << kDigitBits;
constexpr int kSortThreads = 256, kSortWarps = kSortThreads / kWarp;
constexpr int kWarpSlots = 256, kTileSlots = kSortWarps * kWarpSlots;  // slots of a warp, of a block (a tile)

// Blocks that sort `slots` slots.
inline int64_t sort_tiles(int64_t slots) { return std::max<int64_t>(1, (slots + kTileSlots - 1) / kTileSlots); }

// int32 elements of scratch memory: counts [digits, tiles], totals [digits], and the order [slots] between two passes.
inline int64_t sort_scratch(int64_t slots, int64_t num_experts) {
  const int64_t digits = std::min<int64_t>(num_experts, kDigits);
  return digits * (sort_tiles(slots) + 1) + (num_experts > kDigits ? slots : 0);
}

// One pass: sorts the slots from[0], from[1], ... by their digit (ids[slot] >> shift) % kDigits, one of `digits`.
//   ids: [slots], from: [slots], or null for 0, 1, ...; counts: [digits, tiles], totals: [digits], scratch
template <class Id>
struct SortPass {
  const Id* ids;
  const int32_t* from;
  int64_t slots;
  int shift, digits, tiles;
  int32_t *counts, *totals;

  __device__ __forceinline__ int32_t slot(int64_t j) const { return from ? from[j] : static_cast<int32_t>(j); }
  __device__ __forceinline__ int digit(int32_t slot) const { return static_cast<int>(ids[slot] >> shift) % kDigits; }
};

// counts [digit, tile] = the number of the tile's slots with that digit, by one block per tile.
template <class Id>
__global__ void __launch_bounds__(kSortThreads) sort_count_kernel(SortPass<Id> p) {
  __shared__ int32_t count[kDigits];
  for (int d = threadIdx.x; d < p.digits; d += kSortThreads) count[d] = 0;
  __syncthreads();
  const int64_t begin = int64_t{blockIdx.x} * kTileSlots, rest = p.slots - begin;
  for (int i = threadIdx.x; i < kTileSlots && i < rest; i += kSortThreads) {
    atomicAdd(&count[p.digit(p.slot(begin + i))], 1);
  }
  __syncthreads();
  for (int d = threadIdx.x; d < p.digits; d += kSortThreads) p.counts[int64_t{d} * p.tiles + blockIdx.x] = count[d];
}

// The sum of the values of the warp's lanes up to and including this one.
__device__ __forceinline__ int32_t warp_sum_up_to(int32_t value) {
  for (int by = 1; by < kWarp; by *= 2) {
    const int32_t below = __shfl_up_sync(kAllLanes, value, by);
    if (static_cast<int>(threadIdx.x % kWarp) >= by) value += below;
  }
  return value;
}

// The sum of the values of the threads before this one; `total` becomes the sum over the block. All threads must call.
//   partial: [kSortWarps], shared memory
__device__ __forceinline__ int32_t block_sum_below(int32_t value, int32_t (&partial)[kSortWarps], int32_t& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t sum = warp_sum_up_to(value);
  if (lane == kWarp - 1) partial[warp] = sum;
  __syncthreads();
  int32_t before = 0;
  total = 0;
  for (int w = 0; w < kSortWarps; ++w) {
    before += w < warp ? partial[w] : 0;
    total += partial[w];
  }
  __syncthreads();
  return before + sum - value;
}

// Exclusive prefix sums, in place, by one warp per digit: counts [digit, tile] becomes the sum of the digit's counts in
// the tiles before, and totals [digit] that of all tiles.
template <class Id>
__global__ void __launch_bounds__(kRowThreads) sort_scan_kernel(SortPass<Id> p) {
  const int64_t digit = warp_row();
  if (digit >= p.digits) return;
  int32_t* counts = p.counts + digit * p.tiles;
  int32_t before = 0;
  for (int begin = 0; begin < p.tiles; begin += kWarp) {
    const int tile = begin + threadIdx.x % kWarp;
    const int32_t count = tile < p.tiles ? counts[tile] : 0, sum = warp_sum_up_to(count);
    if (tile < p.tiles) counts[tile] = before + sum - count;
    before += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  if (threadIdx.x % kWarp == 0) p.totals[digit] = before;
}

// Puts the tile's slots in their places, by one block per tile.
//   order: [slots], the slot at each place; position: [slots], its inverse, or null
//   offsets: [digits + 1], the places where the digits begin, or null
template <class Id>
__global__ void __launch_bounds__(kSortThreads)
    sort_scatter_kernel(SortPass<Id> p, int32_t* order, int32_t* position, int32_t* offsets) {
  __shared__ int32_t partial[kSortWarps];
  __shared__ int32_t next[kSortWarps][kDigits];  // first a warp's count of each digit, then the digit's next place
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int d = threadIdx.x; d < p.digits; d += kSortThreads) {
    for (int w = 0; w < kSortWarps; ++w) next[w][d] = 0;
  }
  __syncthreads();
  const int64_t begin = int64_t{blockIdx.x} * kTileSlots + warp * kWarpSlots, rest = p.slots - begin;
  for (int i = lane; i < kWarpSlots && i < rest; i += kWarp) atomicAdd(&next[warp][p.digit(p.slot(begin + i))], 1);
  __syncthreads();
  int32_t before = 0, total;
  for (int first = 0; first < p.digits; first += kSortThreads) {
    const int d = first + static_cast<int>(threadIdx.x);
    const int32_t start = before + block_sum_below(d < p.digits ? p.totals[d] : 0, partial, total);
    before += total;
    if (d >= p.digits) continue;
    if (offsets && blockIdx.x == 0) offsets[d] = start;
    int32_t place = start + p.counts[int64_t{d} * p.tiles + blockIdx.x];
    for (int w = 0; w < kSortWarps; ++w) {
      const int32_t count = next[w][d];
      next[w][d] = place;
      place += count;
    }
  }
  if (offsets && blockIdx.x == 0 && threadIdx.x == 0) offsets[p.digits] = static_cast<int32_t>(p.slots);
  __syncthreads();
  for (int i = lane; i < kWarpSlots && i - lane < rest; i += kWarp) {
    const bool has_slot = i < rest;
    const int32_t slot = has_slot ? p.slot(begin + i) : 0;
    const int digit = has_slot ? p.digit(slot) : -1;
    const unsigned equal = __match_any_sync(kAllLanes, digit), below = equal & ((1u << lane) - 1);
    const int32_t place = has_slot ? next[warp][digit] + __popc(below) : 0;
    __syncwarp();
    if (has_slot && below == 0) next[warp][digit] += __popc(equal);
    __syncwarp();
    if (has_slot) {
      order[place] = slot;
      if (position) position[slot] = place;
    }
  }
}

// offsets[e] is the first place with an expert of at least e, found by bisection.
//   ids: [slots], order: [slots], sorted -> offsets: [num_experts + 1]
template <class Id>
__global__ void __launch_bounds__(kSortThreads)
    sort_offsets_kernel(const Id* ids, const int32_t* order, int64_t slots, int64_t num_experts, int32_t* offsets) {
  const int64_t e = int64_t{blockIdx.x} * kSortThreads + threadIdx.x;
  if (e > num_experts) return;
  int64_t low = 0, high = slots;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ids[order[middle]] < e) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  offsets[e] = static_cast<int32_t>(low);
}

// order: the slots, sorted by expert; position: the inverse permutation; offsets: where each expert's slots begin.
//   ids: [slots] in [0, num_experts), scratch: [sort_scratch]
//   -> order: [slots], position: [slots] or null, offsets: [num_experts + 1]
template <class Id>
void launch_group_by_expert(const Id* ids, int64_t slots, int64_t num_experts, int32_t* scratch, int32_t* order,
                            int32_t* position, int32_t* offsets, cudaStream_t stream) {
  const int tiles = static_cast<int>(sort_tiles(slots));
  const int digits = static_cast<int>(std::min<int64_t>(num_experts, kDigits));
  int32_t *counts = scratch, *totals = counts + int64_t{digits} * tiles, *between = totals + digits;
  int passes = 1;
  while (num_experts > int64_t{1} << passes * kDigitBits) ++passes;
  const int32_t* from = nullptr;
  for (int i = 0; i < passes; ++i) {
    int32_t* to = (passes - i) % 2 ? order : between;  // the last pass writes `order`
    const bool last = i == passes - 1;
    const SortPass<Id> pass{ids, from, slots, i * kDigitBits, digits, tiles, counts, totals};
    cuda_launch("group_by_expert", sort_count_kernel<Id>, tiles, kSortThreads, stream, pass);
    cuda_launch("group_by_expert", sort_scan_kernel<Id>, warp_row_blocks(digits), kRowThreads, stream, pass);
    cuda_launch("group_by_expert", sort_scatter_kernel<Id>, tiles, kSortThreads, stream, pass, to,
                last ? position : nullptr, passes == 1 ? offsets : nullptr);
    from = to;
  }
  if (passes > 1) {
    cuda_launch("group_by_expert", sort_offsets_kernel<Id>, num_experts / kSortThreads + 1, kSortThreads, stream, ids,
                order, slots, num_experts, offsets);
  }
}

}  // namespace moe
