// GEMM on one core, computed in float whatever the storage type: a and b are converted while they are packed into the
// order in which the micro-kernel reads them. Blocking and names are BLIS's; the caller's blocks of rows stand for MC.
#pragma once

#include "cpu/blocks.h"
#include "cpu/micro_kernel.h"
#include "cpu/narrow.h"
#include "cpu/scratch.h"

namespace moe {

// Depth that is packed at a time: a panel of b [kKc, kNr] is 32 kB with AVX2 and 64 kB with AVX-512, so it stays in L1
// or L2 while the rows of a pass by. 256 and 1024 take 1.02 and 1.04 of the time (tuned-constants.md).
constexpr int64_t kKc = 512;
// Columns of b that are packed at a time. Where b is transposed, few columns touch many pages: 64 instead of 16 took
// the input gradient of 4 rows per expert from 4.6 to 2.4 ms (AVX2, docs/facts.md). With AVX-512 kNr, 2 kNr and 8 kNr
// take 1.22, 1.06 and 1.09 of the time (tuned-constants.md).
constexpr int64_t kNc = 4 * kNr;

// A strided matrix [rows, columns], contiguous along at least one of its axes: element (i, j) is
// data[row(i) * row_stride + j * column_stride].
template <class T>
struct Matrix {
  const T* data;
  int64_t row_stride, column_stride;       // one of them is 1
  const int32_t* gathered_rows = nullptr;  // [rows]: row(i) is gathered_rows[i]; null: row(i) is i

  const T* at(int64_t i, int64_t j) const {
    return data + (gathered_rows ? gathered_rows[i] : i) * row_stride + j * column_stride;
  }
  // The transpose of columns [first, columns), [columns - first, rows]; the rows must not be gathered.
  Matrix transposed(int64_t first) const { return {data + first * column_stride, column_stride, row_stride}; }
};

// to: [count] = from: [count], as float
template <class T>
MOE_INLINE void to_float(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

// Columns [k0, k0 + depth) of a, packed by rows, or, where the columns of a are contiguous, by tiles of kMr rows and by
// columns within a tile.
//   a: [rows, k]
//   packed: [rows, depth], or [ceil(rows / kMr), depth, kMr], with the strides that multiply_panel takes
template <class T>
struct PackedA {
  float* packed;
  int64_t tile_stride, row_stride, column_stride;

  PackedA(const Matrix<T>& a, int64_t rows, int64_t k0, int64_t depth, float* to)
      : packed(to),
        tile_stride(kMr * depth),
        row_stride(a.column_stride == 1 ? depth : 1),
        column_stride(a.column_stride == 1 ? 1 : kMr) {
    if (a.column_stride == 1) {
      for (int64_t i = 0; i < rows; ++i) to_float(a.at(i, k0), depth, to + i * depth);
      return;
    }
    // Columns at a time: with AVX2 they fill three cache lines of a tile. 1 takes 1.05 of the time, 4, 16 and 32
    // between 0.99 and 1.01 (tuned-constants.md).
    constexpr int64_t kPackedColumns = 8;
    for (int64_t k = 0; k < depth; k += kPackedColumns) {
      const int64_t last = std::min(k + kPackedColumns, depth);
      for (int64_t i = 0; i < rows; i += kMr) {
        const int64_t count = std::min(kMr, rows - i);
        for (int64_t c = k; c < last; ++c) {
          float* const tile_column = to + i * depth + c * kMr;
          if (count == kMr) {
            to_float(a.at(i, k0 + c), kMr, tile_column);
          } else {
            to_float(a.at(i, k0 + c), count, tile_column);
          }
        }
      }
    }
  }
};

// Packs columns [j0, j0 + columns) of rows [k0, k0 + depth) of b into panels of kNr columns. Where the last panel has
// fewer, the rest is zero: nobody reads its products, but denormal numbers left in memory would slow them down.
//   b: [k, n] -> to: [ceil(columns / kNr), depth, kNr]
template <class T>
void pack_b(const Matrix<T>& b, int64_t k0, int64_t depth, int64_t j0, int64_t columns, float* to) {
  const int64_t whole = columns / kNr * kNr, rest = columns - whole;
  float* const last = to + whole * depth;
  if (rest > 0) std::fill(last, last + kNr * depth, 0.f);
  if (b.column_stride != 1) {
    for (int64_t j = 0; j < columns; j += kNr) {
      copy_transposed(std::min(kNr, columns - j), depth, b.at(k0, j0 + j), b.column_stride, to + j * depth, kNr);
    }
    return;
  }
  // Rows to prefetch ahead, which lie too far apart for the hardware prefetcher to foresee. 0, 4 and 16 take
  // between 1.00 and 1.01 of the time (tuned-constants.md).
  constexpr int64_t kAhead = 8;
  for (int64_t k = 0; k < depth; ++k) {
    const T *const from = b.at(k0 + k, j0), *const ahead = b.at(k0 + std::min(k + kAhead, depth - 1), j0);
    for (int64_t j = 0; j < whole; j += kNr) {
      __builtin_prefetch(ahead + j);
      to_float(from + j, kNr, to + j * depth + k * kNr);
    }
    if (rest > 0) to_float(from + whole, rest, last + k * kNr);
  }
}

// The epilogue of gemm for one panel of c: adds the sums of the depth so far and either keeps them in float or, at the
// end of the depth, adds the bias and rounds once.
template <class T>
struct PanelEpilogue {
  const float* partial_in;      // [rows, kNr], or null at the beginning of the depth
  float* partial_out;           // [rows, kNr], or null at the end of the depth
  T* c;                         // [rows, columns], its rows `row_stride` elements apart
  int64_t row_stride, columns;  // columns <= kNr
  Lanes bias[2];                // [kNr], zero where there is none

  void operator()(int64_t i, Lanes low, Lanes high) const {
    if (partial_in) {
      low += load(partial_in + i * kNr);
      high += load(partial_in + i * kNr + kLanes);
    }
    if (partial_out) {
      store(partial_out + i * kNr, low);
      store(partial_out + i * kNr + kLanes, high);
      return;
    }
    low += bias[0];
    high += bias[1];
    T* const to = c + i * row_stride;
    if (columns == kNr) {
      write_lanes(to, low);
      write_lanes(to + kLanes, high);
      return;
    }
    float row[kNr];
    store(row, low);
    store(row + kLanes, high);
    for (int64_t j = 0; j < columns; ++j) store(to[j], row[j]);
  }
};

// c = a b + bias, on the calling thread.
//   a: [m, k], b: [k, n], bias: [n] or null
//   c: [m, n], its rows `c_stride` elements apart
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b, const T* bias, T* c,
          int64_t c_stride) {
  const int64_t passes = std::max<int64_t>(1, (k + kKc - 1) / kKc);
  const int64_t kc = std::max<int64_t>(1, (k + passes - 1) / passes);
  const ScratchFloats packed_a((m + kMr) * kc), packed_b(kNc * kc), partial(passes > 1 ? m * (n + kNr) : 0);
  for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += kc) {
    const int64_t depth = std::min(kc, k - k0);
    const PackedA<T> rows_of_a(a, m, k0, depth, packed_a);
    const bool last = k0 + kc >= k;
    for (int64_t j0 = 0; j0 < n; j0 += kNc) {
      const int64_t end = std::min(j0 + kNc, n);
      pack_b(b, k0, depth, j0, end - j0, packed_b);
      for (int64_t j = j0; j < end; j += kNr) {
        const int64_t columns = std::min(kNr, n - j);
        float shift[kNr] = {};
        if (bias) to_float(bias + j, columns, shift);
        const PanelEpilogue<T> epilogue{
            k0 > 0 ? partial + j * m : nullptr, last ? nullptr : partial + j * m, c + j, c_stride, columns,
            {load(shift), load(shift + kLanes)}};
        multiply_panel(columns, m, depth, rows_of_a.packed, rows_of_a.tile_stride, rows_of_a.row_stride,
                       rows_of_a.column_stride, packed_b + (j - j0) * depth, epilogue);
      }
    }
  }
}

// Mean rows of a block below which the vendor's float GEMM, which packs nothing, is the faster. With AVX-512 on an AMD
// EPYC (Zen 5) ours takes 1.16 of its time for 1 row, 0.73 for 2, 0.68 for 3 and 0.94 for 4 (tuned-constants.md), so
// that 2 would do there; with AVX2 not measured.
constexpr int64_t kFewRows = 4;

// Whether a GEMM of ATen's is faster than `gemm` for these blocks of rows.
//   In double it always is: ours computes in float.
//   In 16 bits it is where the CPU multiplies them itself; elsewhere ATen emulates them, and ours converts as it packs.
//   In float it is for blocks of few rows, and where MKL uses AVX-512, which it does on Intel's CPUs alone: on an AMD
//   EPYC (Zen 5), 2048 x 512 x 1024 with 8 experts, it has 74 GFLOP/s and ours 146 (docs/facts.md); on an Intel CPU
//   with AVX-512 not measured.
inline bool vendor_gemm_is_faster(ScalarType dtype, const std::vector<Block>& blocks) {
  if (dtype != ScalarType::Float) return multiplies_natively(dtype);
#ifdef __x86_64__
  static const bool vendor_uses_full_vectors = __builtin_cpu_supports("avx512f") && __builtin_cpu_is("intel");
#else
  constexpr bool vendor_uses_full_vectors = true;  // not measured
#endif
  int64_t rows = 0;
  for (const Block& b : blocks) rows += b.count;
  return vendor_uses_full_vectors || rows < kFewRows * static_cast<int64_t>(blocks.size());
}

}  // namespace moe
