// A matrix product's innermost block on a CPU: eight lanes of float, which the compiler maps to the machine's
// registers.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace moe {

constexpr int64_t kLanes = 8;
constexpr int64_t kPanel = 2 * kLanes;  // columns of a block
constexpr int64_t kGemmTile = 6;        // rows of a block: 12 sums, 2 loads and a factor fill 15 of 16 registers

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

inline Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }
inline void store(float* to, Lanes value) { *reinterpret_cast<Lanes*>(to) = value; }
inline Lanes broadcast(float v) { return Lanes{v, v, v, v, v, v, v, v}; }

// c [kRows, kPanel] = a [kRows, depth] b [depth, kPanel], on top of c where `add`; rows of a are lda apart, of c ldc.
template <int kRows>
void multiply_tile(int64_t depth, const float* a, int64_t lda, const float* b, float* c, int64_t ldc, bool add) {
  Lanes sum[kRows][2] = {};
  if (add) {
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      sum[i][0] = load(c + i * ldc);
      sum[i][1] = load(c + i * ldc + kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k, b += kPanel) {
    const Lanes left = load(b), right = load(b + kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Lanes factor = broadcast(a[i * lda + k]);
      sum[i][0] += factor * left;
      sum[i][1] += factor * right;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    store(c + i * ldc, sum[i][0]);
    store(c + i * ldc + kLanes, sum[i][1]);
  }
}

// c [rows, kPanel] = a [rows, depth] b [depth, kPanel], on top of c where `add`
inline void multiply_panel(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, float* c,
                           int64_t ldc, bool add = false) {
  int64_t i = 0;
  for (; i + kGemmTile <= rows; i += kGemmTile)
    multiply_tile<kGemmTile>(depth, a + i * lda, lda, b, c + i * ldc, ldc, add);
  a += i * lda, c += i * ldc;
  switch (rows - i) {
    case 5:
      return multiply_tile<5>(depth, a, lda, b, c, ldc, add);
    case 4:
      return multiply_tile<4>(depth, a, lda, b, c, ldc, add);
    case 3:
      return multiply_tile<3>(depth, a, lda, b, c, ldc, add);
    case 2:
      return multiply_tile<2>(depth, a, lda, b, c, ldc, add);
    case 1:
      return multiply_tile<1>(depth, a, lda, b, c, ldc, add);
  }
}

}  // namespace moe
