// A matrix product's innermost block on a CPU.
#pragma once

#include "cpu/lanes.h"

namespace moe {

constexpr int64_t kPanel = 2 * kLanes;  // columns of a block
// Rows of a block: 12 sums, 2 loads and a factor fill 15 of 16 registers, or 24, 2 and one 27 of 32.
constexpr int64_t kGemmTile = kLanes == 16 ? 12 : 6;

// a [kRows, depth] b [depth, kPanel], whose row i goes to to(i, left, right). Element (i, k) of a is a[i * row + k *
// column]; b is contiguous.
template <int kRows, class To>
MOE_INLINE void multiply_tile(int64_t depth, const float* a, int64_t row, int64_t column, const float* b,
                              const To& to) {
  Lanes sum[kRows][2] = {};
  for (int64_t k = 0; k < depth; ++k, a += column, b += kPanel) {
    const Lanes left = load(b), right = load(b + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Lanes factor = broadcast(a[i * row]);
      sum[i][0] += factor * left;
      sum[i][1] += factor * right;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) to(i, sum[i][0], sum[i][1]);
}

// The same of at most kMost rows.
template <int kMost, class To>
MOE_INLINE void multiply_rest(int64_t rows, int64_t depth, const float* a, int64_t row, int64_t column, const float* b,
                              const To& to) {
  if constexpr (kMost > 0) {
    if (rows == kMost) return multiply_tile<kMost>(depth, a, row, column, b, to);
    multiply_rest<kMost - 1>(rows, depth, a, row, column, b, to);
  }
}

// The same of any number of rows: tile t of a begins at a + t * tile. A function of its own, whose few values all fit
// into registers; `to` is a copy, so that what it stores cannot change it.
template <class To>
__attribute__((noinline)) void multiply_tiles(int64_t rows, int64_t depth, const float* a, int64_t tile, int64_t row,
                                              int64_t column, const float* b, const To to) {
  int64_t first = 0;
  const auto shifted = [&](int i, Lanes left, Lanes right) { to(first + i, left, right); };
  for (; first + kGemmTile <= rows; first += kGemmTile, a += tile) {
    multiply_tile<kGemmTile>(depth, a, row, column, b, shifted);
  }
  multiply_rest<kGemmTile - 1>(rows - first, depth, a, row, column, b, shifted);
}

// Where a product of float goes, rows `step` apart: in place of what was there, or on top of it.
struct TileSums {
  float* values;
  int64_t step;
  bool add;

  void operator()(int64_t i, Lanes left, Lanes right) const {
    float* const to = values + i * step;
    store(to, add ? load(to) + left : left);
    store(to + kLanes, add ? load(to + kLanes) + right : right);
  }
};

}  // namespace moe
