// Products of matrices on one core, in float whatever they are stored as: both are packed into the order in which the
// innermost block reads them.
#pragma once

#include <memory>

#include "cpu/blocks.h"
#include "cpu/micro_kernel.h"
#include "cpu/narrow.h"

namespace moe {

// Terms of a sum at a time: 32 kB of one matrix stay in L1 or near it while the other's rows pass by.
constexpr int64_t kDepth = 512;
constexpr int64_t kBand = 4 * kPanel;  // columns that are packed at a time: the more, the fewer pages in turn
constexpr int64_t kFewRows = 4;  // of a block; with fewer, the vendor's product, which packs nothing, is the faster

// Element (i, j) is from[index(i) * row + j * column], where row or column is 1.
template <class T>
struct Matrix {
  const T* from;
  int64_t row, column;
  const int32_t* rows = nullptr;  // index(i) is rows[i], or i

  const T* at(int64_t i, int64_t j) const { return from + (rows ? rows[i] : i) * row + j * column; }
  // Element (j, i) is this one's (i, first + j); not of gathered rows.
  Matrix transposed(int64_t first) const { return {from + first * column, column, row}; }
};

template <class T>
MOE_INLINE void to_float(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

// The left matrix's [rows, depth] from column k0: row by row, or, where its columns are contiguous, tile by tile and in
// a tile column by column.
template <class T>
struct LeftPanel {
  float* packed;
  int64_t tile, row, column;

  LeftPanel(const Matrix<T>& a, int64_t rows, int64_t k0, int64_t depth, float* to)
      : packed(to), tile(kGemmTile * depth), row(a.column == 1 ? depth : 1), column(a.column == 1 ? 1 : kGemmTile) {
    if (a.column == 1) {
      for (int64_t i = 0; i < rows; ++i) to_float(a.at(i, k0), depth, to + i * depth);
      return;
    }
    constexpr int64_t kAtOnce = 8;  // columns, which fill three lines of a tile
    for (int64_t k = 0; k < depth; k += kAtOnce) {
      const int64_t last = std::min(k + kAtOnce, depth);
      for (int64_t i = 0; i < rows; i += kGemmTile) {
        const int64_t count = std::min(kGemmTile, rows - i);
        for (int64_t c = k; c < last; ++c) {
          float* const tile_column = to + i * depth + c * kGemmTile;
          if (count == kGemmTile) {
            to_float(a.at(i, k0 + c), kGemmTile, tile_column);
          } else {
            to_float(a.at(i, k0 + c), count, tile_column);
          }
        }
      }
    }
  }
};

// The right matrix's [depth, width] from (k0, j0) as panels [depth, kPanel]. Nobody reads what becomes of columns
// beyond the width: they are zero, lest they slow the product down.
template <class T>
void pack_right(const Matrix<T>& b, int64_t k0, int64_t depth, int64_t j0, int64_t width, float* to) {
  const int64_t whole = width / kPanel * kPanel, rest = width - whole;
  float* const last = to + whole * depth;
  if (rest > 0) std::fill(last, last + kPanel * depth, 0.f);
  if (b.column != 1) {
    for (int64_t j = 0; j < width; j += kPanel) {
      copy_transposed(std::min(kPanel, width - j), depth, b.at(k0, j0 + j), b.column, to + j * depth, kPanel);
    }
    return;
  }
  constexpr int64_t kAhead = 8;  // rows lie too far apart for the machine to see which comes next
  for (int64_t k = 0; k < depth; ++k) {
    const T *const from = b.at(k0 + k, j0), *const ahead = b.at(k0 + std::min(k + kAhead, depth - 1), j0);
    for (int64_t j = 0; j < whole; j += kPanel) {
      __builtin_prefetch(ahead + j);
      to_float(from + j, kPanel, to + j * depth + k * kPanel);
    }
    if (rest > 0) to_float(from + whole, rest, last + k * kPanel);
  }
}

// What becomes of a panel's products: they join the sums of the depth before, and in the end are rounded once.
template <class T>
struct PanelSums {
  const float* before;  // [rows, kPanel], or null
  float* after;         // the same, or null at the end of the depth
  T* out;
  int64_t stride, width;
  Lanes bias[2];

  void operator()(int64_t i, Lanes left, Lanes right) const {
    if (before) {
      left += load(before + i * kPanel);
      right += load(before + i * kPanel + kLanes);
    }
    if (after) {
      store(after + i * kPanel, left);
      store(after + i * kPanel + kLanes, right);
      return;
    }
    left += bias[0];
    right += bias[1];
    T* const to = out + i * stride;
    if (width == kPanel) {
      write_lanes(to, left);
      write_lanes(to + kLanes, right);
      return;
    }
    float row[kPanel];
    store(row, left);
    store(row + kLanes, right);
    for (int64_t j = 0; j < width; ++j) store(to[j], row[j]);
  }
};

// out [rows, width], whose rows are `stride` apart, = a [rows, depth] b [depth, width] + bias [width] if there is one.
template <class T>
void multiply(int64_t rows, int64_t width, int64_t depth, const Matrix<T>& a, const Matrix<T>& b, const T* bias, T* out,
              int64_t stride) {
  const int64_t passes = std::max<int64_t>(1, (depth + kDepth - 1) / kDepth);
  const int64_t step = std::max<int64_t>(1, (depth + passes - 1) / passes);
  const Floats left((rows + kGemmTile) * step), right(kBand * step), sums(passes > 1 ? rows * (width + kPanel) : 0);
  for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += step) {
    const int64_t terms = std::min(step, depth - k0);
    const LeftPanel<T> factors(a, rows, k0, terms, left);
    const bool last = k0 + step >= depth;
    for (int64_t band = 0; band < width; band += kBand) {
      const int64_t end = std::min(band + kBand, width);
      pack_right(b, k0, terms, band, end - band, right);
      for (int64_t j = band; j < end; j += kPanel) {
        const int64_t count = std::min(kPanel, width - j);
        float shift[kPanel] = {};
        if (bias) to_float(bias + j, count, shift);
        const PanelSums<T> sum{
            k0 > 0 ? sums + j * rows : nullptr, last ? nullptr : sums + j * rows, out + j, stride, count,
            {load(shift), load(shift + kLanes)}};
        multiply_tiles(rows, terms, factors.packed, factors.tile, factors.row, factors.column,
                       right + (j - band) * terms, sum);
      }
    }
  }
}

// Calls f with a value of the C++ type and returns true where `multiply` is the fastest product: in 16 bits where the
// CPU has no such arithmetic, in float where the blocks are not too small and MKL is no better: it has kernels for
// AVX-512 that it takes on Intel's CPUs alone (on an AMD EPYC of Zen 5 it reaches half of ours). In double and
// elsewhere the vendor's is.
template <class F>
bool dispatch_multiply(ScalarType dtype, const std::vector<Block>& blocks, F&& f) {
#ifdef __x86_64__
  static const bool vendors = __builtin_cpu_supports("avx512f") && __builtin_cpu_is("intel");
#else
  constexpr bool vendors = true;
#endif
  int64_t rows = 0;
  for (const Block& b : blocks) rows += b.count;
  const bool few = rows < kFewRows * static_cast<int64_t>(blocks.size());
  if (dtype == ScalarType::Float ? vendors || few : multiplies_natively(dtype)) return false;
  dispatch_narrow(dtype, "x", f);
  return true;
}

}  // namespace moe
