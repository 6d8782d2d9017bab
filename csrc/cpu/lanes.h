// Vectors of floats for the level that is compiled for (GCC's vector extensions), and their conversion from and to the
// storage types: load and store keep float as it is, read converts to float, write rounds to the storage type.
#pragma once

#include "common/inline.h"
#include "common/tensor.h"

namespace moe {

// Eight floats at any address. Not to be used as a template argument: GCC then drops the attributes, and with them the
// permission to be unaligned and to alias.
typedef float Lanes8 __attribute__((vector_size(8 * sizeof(float)), aligned(sizeof(float)), may_alias));

// from: [8] -> the vector
inline Lanes8 load8(const float* from) { return *reinterpret_cast<const Lanes8*>(from); }
// to: [8] = the vector
inline void store(float* to, Lanes8 value) { *reinterpret_cast<Lanes8*>(to) = value; }

// The widest vector: kLanes floats, 16 with AVX-512 and 8 below. broadcast(v) is v in every lane; a list in braces,
// since Lanes{} + v is an addition (-0 + 0 is not -0), which took half of the micro-kernel's speed (docs/facts.md).
#ifdef __AVX512F__
typedef float Lanes __attribute__((vector_size(16 * sizeof(float)), aligned(sizeof(float)), may_alias));

// from: [kLanes] -> the vector
inline Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }
// to: [kLanes] = the vector
inline void store(float* to, Lanes value) { *reinterpret_cast<Lanes*>(to) = value; }
inline Lanes broadcast(float v) { return Lanes{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }
#else
typedef Lanes8 Lanes;

// from: [kLanes] -> the vector
inline Lanes load(const float* from) { return load8(from); }
inline Lanes broadcast(float v) { return Lanes{v, v, v, v, v, v, v, v}; }
#endif
constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);

// from: [8] of a storage type -> the values as float
template <class T>
MOE_INLINE Lanes8 read8(const T* from) {
  float values[8];
  for (int i = 0; i < 8; ++i) values[i] = static_cast<float>(from[i]);
  return load8(values);
}
MOE_INLINE Lanes8 read8(const float* from) { return load8(from); }

// to: [8] of a storage type = the values, rounded
template <class T>
MOE_INLINE void write8(T* to, Lanes8 lanes) {
  float values[8];
  store(values, lanes);
#pragma omp simd
  for (int i = 0; i < 8; ++i) store(to[i], values[i]);
}
MOE_INLINE void write8(float* to, Lanes8 lanes) { store(to, lanes); }

// to: [kLanes] of a storage type = the values, rounded
template <class T>
MOE_INLINE void write_lanes(T* to, Lanes lanes) {
  float values[kLanes];
  store(values, lanes);
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) store(to[i], values[i]);
}
MOE_INLINE void write_lanes(float* to, Lanes lanes) { store(to, lanes); }

// Lane i of the result is element kFrom[i] of the sixteen of a and b.
template <int... kFrom>
MOE_INLINE Lanes8 shuffle(Lanes8 a, Lanes8 b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kFrom...);
#else
  typedef int32_t Mask __attribute__((vector_size(sizeof(Lanes8))));
  return __builtin_shuffle(a, b, Mask{kFrom...});
#endif
}

// r: [8, 8] = its transpose, row i in r[i]. Rows are interleaved in pairs, then pairs of rows, then halves are joined.
MOE_INLINE void transpose(Lanes8 r[8]) {
  Lanes8 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(r[i], r[i + 1]);
    pairs[i + 1] = shuffle<2, 10, 3, 11, 6, 14, 7, 15>(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(pairs[i + j], pairs[i + j + 2]);
      fours[i + 2 * j + 1] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(pairs[i + j], pairs[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11>(fours[i], fours[i + 4]);
    r[i + 4] = shuffle<4, 5, 6, 7, 12, 13, 14, 15>(fours[i], fours[i + 4]);
  }
}

// to = the transpose of from, in blocks of 8 x 8.
//   from: [rows, columns], its rows `from_stride` elements apart
//   to: [columns, rows], its rows `to_stride` elements apart
template <class To, class From>
void copy_transposed(int64_t rows, int64_t columns, const From* from, int64_t from_stride, To* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += 8) {
    for (int64_t j = 0; j < columns; j += 8) {
      if (i + 8 <= rows && j + 8 <= columns) {
        Lanes8 block[8];
        for (int k = 0; k < 8; ++k) block[k] = read8(from + (i + k) * from_stride + j);
        transpose(block);
        for (int k = 0; k < 8; ++k) write8(to + (j + k) * to_stride + i, block[k]);
      } else {
        for (int64_t r = i; r < std::min<int64_t>(i + 8, rows); ++r) {
          for (int64_t c = j; c < std::min<int64_t>(j + 8, columns); ++c) {
            store(to[c * to_stride + r], static_cast<float>(from[r * from_stride + c]));
          }
        }
      }
    }
  }
}

}  // namespace moe
