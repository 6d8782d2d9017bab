// The micro-kernel of a matrix product on a CPU: one tile of the result, kMr rows by kNr columns, whose sums stay in
// registers while the depth of the product passes by. The names are BLIS's (Van Zee and van de Geijn, "BLIS: A
// Framework for Rapidly Instantiating BLAS Functionality", ACM TOMS 2015).
#pragma once

#include "cpu/lanes.h"

namespace moe {

// Counted, not tuned: with AVX2 a tile of 6 rows takes 12 registers for its sums, 2 for a row of b and 1 for a value of
// a, 15 of 16; with AVX-512 a tile of 12 rows takes 24, 2 and 1, 27 of 32.
constexpr int64_t kNr = 2 * kLanes;
constexpr int64_t kMr = kLanes == 16 ? 12 : 6;

// c = a b for a tile of at most kMr rows.
//   kWide: whether more than the first kLanes columns are wanted; if not, the others are zero
//   a: [kRows, depth]; element (i, k) is a[i * row_stride + k * column_stride]
//   b: [depth, kNr], contiguous
//   epilogue(i, low, high): receives row i of c [kRows, kNr], columns [0, kLanes) in low, [kLanes, kNr) in high
template <bool kWide, int kRows, class Epilogue>
MOE_INLINE void micro_kernel(int64_t depth, const float* a, int64_t row_stride, int64_t column_stride, const float* b,
                             const Epilogue& epilogue) {
  Lanes sum[kRows][2] = {};
  for (int64_t k = 0; k < depth; ++k, a += column_stride, b += kNr) {
    const Lanes low = load(b), high = kWide ? load(b + kLanes) : Lanes{};
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Lanes factor = broadcast(a[i * row_stride]);
      sum[i][0] += factor * low;
      if constexpr (kWide) sum[i][1] += factor * high;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) epilogue(i, sum[i][0], sum[i][1]);
}

// The micro-kernel for a number of rows that is known at run time only, 0 <= rows <= kMost.
//   a: [rows, depth], b: [depth, kNr], epilogue: of the rows of c [rows, kNr], all as above
template <bool kWide, int kMost, class Epilogue>
MOE_INLINE void micro_kernel_of_rows(int64_t rows, int64_t depth, const float* a, int64_t row_stride,
                                     int64_t column_stride, const float* b, const Epilogue& epilogue) {
  if constexpr (kMost > 0) {
    if (rows == kMost) return micro_kernel<kWide, kMost>(depth, a, row_stride, column_stride, b, epilogue);
    micro_kernel_of_rows<kWide, kMost - 1>(rows, depth, a, row_stride, column_stride, b, epilogue);
  }
}

// c = a b for any number of rows, one tile after the other. Not inlined, so that its few values all fit into registers;
// the epilogue is a copy, so that no store through its pointers can change it.
//   a: [rows, depth]; tile t, the rows from t * kMr on, begins at a + t * tile_stride and has the strides given
//   kWide, b, epilogue: as above, for the rows of c [rows, kNr]
template <bool kWide, class Epilogue>
__attribute__((noinline)) void multiply_tiles(int64_t rows, int64_t depth, const float* a, int64_t tile_stride,
                                              int64_t row_stride, int64_t column_stride, const float* b,
                                              const Epilogue epilogue) {
  int64_t first = 0;
  const auto shifted = [&](int i, Lanes low, Lanes high) { epilogue(first + i, low, high); };
  for (; first + kMr <= rows; first += kMr, a += tile_stride) {
    micro_kernel<kWide, kMr>(depth, a, row_stride, column_stride, b, shifted);
  }
  micro_kernel_of_rows<kWide, kMr - 1>(rows - first, depth, a, row_stride, column_stride, b, shifted);
}

// The first `columns` columns of the same, at least one; the epilogue may receive anything for the others. Half of a
// panel takes half of the time: a convolution from and to 16 channels 0.8 of what it took as a whole one.
template <class Epilogue>
void multiply_panel(int64_t columns, int64_t rows, int64_t depth, const float* a, int64_t tile_stride,
                    int64_t row_stride, int64_t column_stride, const float* b, const Epilogue& epilogue) {
  const auto multiply = columns > kLanes ? multiply_tiles<true, Epilogue> : multiply_tiles<false, Epilogue>;
  multiply(rows, depth, a, tile_stride, row_stride, column_stride, b, epilogue);
}

// The epilogue that stores float sums.
//   c: [rows, kNr], its rows `row_stride` elements apart; overwritten, or added to where `accumulate`
struct FloatEpilogue {
  float* c;
  int64_t row_stride;
  bool accumulate;

  void operator()(int64_t i, Lanes low, Lanes high) const {
    float* const to = c + i * row_stride;
    store(to, accumulate ? load(to) + low : low);
    store(to + kLanes, accumulate ? load(to + kLanes) + high : high);
  }
};

}  // namespace moe
