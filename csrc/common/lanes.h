// Eight floats at a time, which the compiler maps to the machine's registers.
#pragma once

#include "common/inline.h"
#include "common/tensor.h"

namespace moe {

constexpr int64_t kLanes = 8;

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

inline Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }
inline void store(float* to, Lanes value) { *reinterpret_cast<Lanes*>(to) = value; }
inline Lanes broadcast(float v) { return Lanes{v, v, v, v, v, v, v, v}; }

template <class T>
MOE_INLINE Lanes read_lanes(const T* from) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(from[i]);
  return load(lanes);
}
MOE_INLINE Lanes read_lanes(const float* from) { return load(from); }

template <class T>
MOE_INLINE void write_lanes(T* to, Lanes lanes) {
  float values[kLanes];
  store(values, lanes);
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) store(to[i], values[i]);
}
MOE_INLINE void write_lanes(float* to, Lanes lanes) { store(to, lanes); }

template <int... kFrom>
MOE_INLINE Lanes shuffle(Lanes a, Lanes b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kFrom...);
#else
  typedef int32_t Mask __attribute__((vector_size(sizeof(Lanes))));
  return __builtin_shuffle(a, b, Mask{kFrom...});
#endif
}

MOE_INLINE void transpose(Lanes r[8]) {
  Lanes pairs[8], fours[8];
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

// to [columns, rows] = from [rows, columns] transposed; rows of either are as far apart as the steps say.
template <class To, class From>
void copy_transposed(int64_t rows, int64_t columns, const From* from, int64_t from_step, To* to, int64_t to_step) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      if (i + kLanes <= rows && j + kLanes <= columns) {
        Lanes block[kLanes];
        for (int k = 0; k < kLanes; ++k) block[k] = read_lanes(from + (i + k) * from_step + j);
        transpose(block);
        for (int k = 0; k < kLanes; ++k) write_lanes(to + (j + k) * to_step + i, block[k]);
      } else {
        for (int64_t r = i; r < std::min(i + kLanes, rows); ++r) {
          for (int64_t c = j; c < std::min(j + kLanes, columns); ++c) {
            store(to[c * to_step + r], static_cast<float>(from[r * from_step + c]));
          }
        }
      }
    }
  }
}

}  // namespace moe
