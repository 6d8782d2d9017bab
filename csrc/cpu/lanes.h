// As many floats at a time as a register holds at the level that is compiled for.
#pragma once

#include <memory>
#include <vector>

#include "common/inline.h"
#include "common/tensor.h"

namespace moe {

// No template argument: as such, these types lose their attributes, and with them the right to lie anywhere.
typedef float Eight __attribute__((vector_size(8 * sizeof(float)), aligned(sizeof(float)), may_alias));

inline Eight load_eight(const float* from) { return *reinterpret_cast<const Eight*>(from); }
inline void store(float* to, Eight value) { *reinterpret_cast<Eight*>(to) = value; }

#ifdef __AVX512F__
typedef float Lanes __attribute__((vector_size(16 * sizeof(float)), aligned(sizeof(float)), may_alias));

inline Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }
inline void store(float* to, Lanes value) { *reinterpret_cast<Lanes*>(to) = value; }
inline Lanes broadcast(float v) { return Lanes{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }
#else
typedef Eight Lanes;

inline Lanes load(const float* from) { return load_eight(from); }
inline Lanes broadcast(float v) { return Lanes{v, v, v, v, v, v, v, v}; }
#endif
constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);

// Floats from the beginning of a cache line on, for work within one call. A thread keeps the memory of its last calls:
// a page that the system hands out anew costs a write 0.5 to 2 us, which made a convolution of four small images four
// times slower (docs/facts.md).
class Floats {
 public:
  explicit Floats(int64_t count) : lines_(spare().take(count / kLine + 1)) {}
  Floats(Floats&&) = default;
  Floats& operator=(Floats&&) = delete;
  ~Floats() {
    if (lines_.data) spare().keep(std::move(lines_));
  }
  static Floats zeros(int64_t count) {
    Floats floats(count);
    std::fill(floats + 0, floats + count, 0.f);
    return floats;
  }
  operator float*() const { return lines_.data[0].values; }

 private:
  static constexpr int64_t kLine = 16;
  struct alignas(64) Line {
    float values[kLine];
  };
  struct Lines {
    std::unique_ptr<Line[]> data;
    int64_t count;
  };
  // At most 16 MB, the last that were given back.
  class Spare {
   public:
    Lines take(int64_t count) {
      auto best = lines_.end();
      for (auto it = lines_.begin(); it != lines_.end(); ++it) {
        if (it->count >= count && (best == lines_.end() || it->count < best->count)) best = it;
      }
      if (best == lines_.end() || best->count > 4 * count) return {std::unique_ptr<Line[]>(new Line[count]), count};
      Lines found = std::move(*best);
      lines_.erase(best);
      total_ -= found.count;
      return found;
    }
    void keep(Lines lines) {
      total_ += lines.count;
      lines_.push_back(std::move(lines));
      for (; total_ > kMost; lines_.erase(lines_.begin())) total_ -= lines_.front().count;
    }

   private:
    static constexpr int64_t kMost = (16 << 20) / sizeof(Line);
    std::vector<Lines> lines_;
    int64_t total_ = 0;
  };
  static Spare& spare() {
    static thread_local Spare spare;
    return spare;
  }

  Lines lines_;
};

template <class T>
MOE_INLINE Eight read_eight(const T* from) {
  float values[8];
  for (int i = 0; i < 8; ++i) values[i] = static_cast<float>(from[i]);
  return load_eight(values);
}
MOE_INLINE Eight read_eight(const float* from) { return load_eight(from); }

template <class T>
MOE_INLINE void write_eight(T* to, Eight lanes) {
  float values[8];
  store(values, lanes);
#pragma omp simd
  for (int i = 0; i < 8; ++i) store(to[i], values[i]);
}
MOE_INLINE void write_eight(float* to, Eight lanes) { store(to, lanes); }

template <class T>
MOE_INLINE void write_lanes(T* to, Lanes lanes) {
  float values[kLanes];
  store(values, lanes);
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) store(to[i], values[i]);
}
MOE_INLINE void write_lanes(float* to, Lanes lanes) { store(to, lanes); }

template <int... kFrom>
MOE_INLINE Eight shuffle(Eight a, Eight b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kFrom...);
#else
  typedef int32_t Mask __attribute__((vector_size(sizeof(Eight))));
  return __builtin_shuffle(a, b, Mask{kFrom...});
#endif
}

MOE_INLINE void transpose(Eight r[8]) {
  Eight pairs[8], fours[8];
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
  for (int64_t i = 0; i < rows; i += 8) {
    for (int64_t j = 0; j < columns; j += 8) {
      if (i + 8 <= rows && j + 8 <= columns) {
        Eight block[8];
        for (int k = 0; k < 8; ++k) block[k] = read_eight(from + (i + k) * from_step + j);
        transpose(block);
        for (int k = 0; k < 8; ++k) write_eight(to + (j + k) * to_step + i, block[k]);
      } else {
        for (int64_t r = i; r < std::min<int64_t>(i + 8, rows); ++r) {
          for (int64_t c = j; c < std::min<int64_t>(j + 8, columns); ++c) {
            store(to[c * to_step + r], static_cast<float>(from[r * from_step + c]));
          }
        }
      }
    }
  }
}

}  // namespace moe
