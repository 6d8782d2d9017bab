// Winograd's F(4 x 4, 3 x 3): a 3 x 3 convolution of step 1 from 36 products for every 4 x 4 results, where 144 are
// usual.
//
//   Y = A^T [ sum over channels (G w G^T) * (B^T X B) ] A        (Lavin and Gray, CVPR 2016)
//
// Rows are points at which polynomials are evaluated: here 0, +-2/3, +-3/2 and infinity. Their powers stay near 1, so
// that the rounding error is twice that of a direct convolution; with the usual 0, +-1, +-2 it would be six times.
#pragma once

#include <algorithm>
#include <memory>

#include "common/gemm.h"
#include "common/tensor.h"

namespace moe {

constexpr int64_t kOutputs = 4, kInputs = 6, kPoints = kInputs * kInputs;  // per side; points of a tile
constexpr int64_t kTiles = 192;       // tiles of a block, at least a row of an image
constexpr int64_t kFilters = 32;      // output channels that are in work at once
constexpr int64_t kSummands = 64;     // summed up before they are added to others, against rounding
constexpr int64_t kFilterBand = 256;  // output channels of a block
constexpr float kNear = 2 / 3.f, kFar = 3 / 2.f, kNear2 = 4 / 9.f, kFar2 = 9 / 4.f;

// The step between the points of an array: a line more than its size, since 36 stores to one set of a cache evict one
// another.
inline int64_t point_step(int64_t size) { return size + 16; }
inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// B^T x
MOE_INLINE void input_to_points(const Lanes x[6], Lanes to[6]) {
  const Lanes near_even = x[4] - kFar2 * x[2], near_odd = kNear * x[3] - kFar * x[1];
  const Lanes far_even = x[4] - kNear2 * x[2], far_odd = kFar * x[3] - kNear * x[1];
  to[0] = x[0] + x[4] - (kNear2 + kFar2) * x[2];
  to[1] = near_even + near_odd;
  to[2] = near_even - near_odd;
  to[3] = far_even + far_odd;
  to[4] = far_even - far_odd;
  to[5] = x[1] + x[5] - (kNear2 + kFar2) * x[3];
}

// G w
MOE_INLINE void weight_to_points(const Lanes w[3], Lanes to[6]) {
  constexpr float kNearScale = 1 / (2 * kNear2 * (kNear2 - kFar2)), kFarScale = 1 / (2 * kFar2 * (kFar2 - kNear2));
  const Lanes near_even = kNearScale * (w[0] + kNear2 * w[2]), near_odd = (kNearScale * kNear) * w[1];
  const Lanes far_even = kFarScale * (w[0] + kFar2 * w[2]), far_odd = (kFarScale * kFar) * w[1];
  to[0] = w[0];
  to[1] = near_even + near_odd;
  to[2] = near_even - near_odd;
  to[3] = far_even + far_odd;
  to[4] = far_even - far_odd;
  to[5] = w[2];
}

// A^T m
MOE_INLINE void points_to_output(const Lanes m[6], Lanes y[4]) {
  const Lanes near_sum = m[1] + m[2], near_difference = m[1] - m[2];
  const Lanes far_sum = m[3] + m[4], far_difference = m[3] - m[4];
  y[0] = m[0] + near_sum + far_sum;
  y[1] = kNear * near_difference + kFar * far_difference;
  y[2] = kNear2 * near_sum + kFar2 * far_sum;
  y[3] = (kNear * kNear2) * near_difference + (kFar * kFar2) * far_difference + m[5];
}

template <class T>
MOE_INLINE Lanes read_lanes(const T* from) {
  Lanes lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(from[i]);
  return lanes;
}
MOE_INLINE Lanes read_lanes(const float* from) { return load(from); }

template <class T>
MOE_INLINE void write_lanes(T* to, Lanes lanes) {
  for (int i = 0; i < kLanes; ++i) store(to[i], lanes[i]);
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

// Images [N, C, H, W], contiguous or channels-last, as rows of pixels.
template <class T>
struct Images {
  T* data;
  int64_t channels, height, width;
  bool channels_last;

  T* row(int64_t image, int64_t y, int64_t channel = 0) const {
    const int64_t pixel = channels_last ? (image * height + y) * width * channels + channel
                                        : ((image * channels + channel) * height + y) * width;
    return data + pixel;
  }
  // to [width, step]
  void read_row(int64_t image, int64_t y, float* to, int64_t step) const {
    const T* from = row(image, y);
    if (!channels_last) return copy_transposed(channels, width, from, height * width, to, step);
    for (int64_t x = 0; x < width; ++x, from += channels, to += step) {
      for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<float>(from[c]);
    }
  }
  // `count` channels from `first` on, from [width, step]
  void write_row(int64_t image, int64_t y, int64_t first, int64_t count, const float* from, int64_t step) const {
    T* to = row(image, y, first);
    if (!channels_last) return copy_transposed(width, count, from, step, to, height * width);
    for (int64_t x = 0; x < width; ++x, from += step, to += channels) {
      for (int64_t c = 0; c < count; ++c) store(to[c], from[c]);
    }
  }
};

// Kernels of one expert, w(output channel, input channel, 3, 3): as they lie, or with channels exchanged and turned
// round.
template <class T>
struct Kernels {
  const T* data;
  int64_t output_step, input_step;
  bool turned;

  // The nine numbers of eight output channels' kernels, of which `count` exist.
  void read(int64_t output, int64_t input, int64_t count, Lanes taps[9]) const {
    const T* from = data + output * output_step + input * input_step;
    Lanes rows[kLanes] = {}, last = {};
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = read_lanes(from + i * output_step);
      last[i] = static_cast<float>(from[i * output_step + 8]);
    }
    transpose(rows);
    for (int i = 0; i < 8; ++i) taps[turned ? 8 - i : i] = rows[i];
    taps[turned ? 0 : 8] = last;
  }
};

template <class T>
class Winograd {
 public:
  Winograd(Images<const T> x, Images<T> y, int64_t pad_y, int64_t pad_x)
      : x_(x),
        y_(y),
        pad_y_(pad_y),
        pad_x_(pad_x),
        depth_(round_up(x.channels, kLanes)),
        columns_((y.width + kOutputs - 1) / kOutputs),
        rows_((y.height + kOutputs - 1) / kOutputs) {}

  // The rows of tiles that make an image.
  int64_t rows_per_image() const { return rows_; }
  // The rows of tiles that make a block.
  int64_t rows_per_block() const { return std::max<int64_t>(1, kTiles / columns_); }

  // What `rows` rows of tiles need.
  struct Scratch {
    Scratch(const Winograd& w, int64_t rows)
        : strip(new float[kInputs * w.strip_width() * w.depth_]()),  // zero where no image is
          points(new float[kPoints * point_step(rows * w.columns_ * w.depth_)]),
          weights(new float[kPoints * point_step(w.x_.channels * kFilters)]),
          products(new float[kPoints * point_step(rows * w.columns_ * kFilters)]),
          results(new float[kOutputs * kOutputs * w.columns_ * kFilters]) {}

    std::unique_ptr<float[]> strip, points, weights, products, results;
  };

  // Rows [first, first + count) of tiles, output channels [begin, end).
  void run(int64_t first, int64_t count, const Kernels<T>& kernels, const T* bias, int64_t begin, int64_t end,
           Scratch& scratch) const {
    const int64_t tiles = count * columns_;
    for (int64_t i = 0; i < count; ++i) {
      read_strip(first + i, scratch.strip.get());
      strip_to_points(scratch.strip.get(), tiles, scratch.points.get() + i * columns_ * depth_);
    }
    for (int64_t o = begin; o < end; o += kFilters) {
      const int64_t filters = std::min(kFilters, end - o);
      for (int64_t p = 0; p < filters; p += kPanel) kernels_to_points(kernels, o + p, filters - p, p, scratch);
      for (int64_t point = 0; point < kPoints; ++point) {
        for (int64_t p = 0; p < filters; p += kPanel) {
          const float* weights = scratch.weights.get() + point * point_step(kFilters * x_.channels) + p * x_.channels;
          for (int64_t c = 0; c < x_.channels; c += kSummands) {
            multiply_panel(tiles, std::min(kSummands, x_.channels - c),
                           scratch.points.get() + point * point_step(tiles * depth_) + c, depth_, weights + c * kPanel,
                           scratch.products.get() + point * point_step(tiles * kFilters) + p, kFilters, c > 0);
          }
        }
      }
      for (int64_t i = 0; i < count; ++i) write_results(first + i, i * columns_, tiles, o, filters, bias, scratch);
    }
  }

 private:
  int64_t strip_width() const { return columns_ * kOutputs + 2; }

  // The six rows of pixels under a row of tiles, [6, strip_width, depth], zero outside the image.
  void read_strip(int64_t row, float* strip) const {
    const int64_t top = row % rows_ * kOutputs - pad_y_, size = strip_width() * depth_;
    for (int64_t r = 0; r < kInputs; ++r) {
      float* to = strip + r * size;
      if (top + r < 0 || top + r >= x_.height) {
        std::fill(to, to + size, 0.f);
      } else {
        x_.read_row(row / rows_, top + r, to + pad_x_ * depth_, depth_);
      }
    }
  }

  // strip -> points [36, tiles, depth], of which this is one row of tiles.
  void strip_to_points(const float* strip, int64_t tiles, float* points) const {
    for (int64_t t = 0; t < columns_; ++t) {
      for (int64_t c = 0; c < depth_; c += kLanes) {
        Lanes half[kInputs][kInputs];
        for (int64_t j = 0; j < kInputs; ++j) {
          Lanes column[kInputs], to[kInputs];
          for (int64_t i = 0; i < kInputs; ++i) {
            column[i] = load(strip + ((i * strip_width()) + t * kOutputs + j) * depth_ + c);
          }
          input_to_points(column, to);
          for (int64_t i = 0; i < kInputs; ++i) half[i][j] = to[i];
        }
        for (int64_t i = 0; i < kInputs; ++i) {
          Lanes to[kInputs];
          input_to_points(half[i], to);
          for (int64_t j = 0; j < kInputs; ++j) {
            store(points + (i * kInputs + j) * point_step(tiles * depth_) + t * depth_ + c, to[j]);
          }
        }
      }
    }
  }

  // A panel of 16 output channels, of which `count` exist -> weights [36, 32 / 16, C, 16], of which it is panel p / 16.
  void kernels_to_points(const Kernels<T>& kernels, int64_t output, int64_t count, int64_t p, Scratch& scratch) const {
    for (int64_t c = 0; c < x_.channels; ++c) {
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        Lanes taps[9], half[kInputs][3];
        kernels.read(output + lane, c, std::clamp<int64_t>(count - lane, 0, kLanes), taps);
        for (int j = 0; j < 3; ++j) {
          const Lanes column[] = {taps[j], taps[3 + j], taps[6 + j]};
          Lanes to[kInputs];
          weight_to_points(column, to);
          for (int64_t i = 0; i < kInputs; ++i) half[i][j] = to[i];
        }
        for (int64_t i = 0; i < kInputs; ++i) {
          Lanes to[kInputs];
          weight_to_points(half[i], to);
          for (int64_t j = 0; j < kInputs; ++j) {
            const int64_t point = i * kInputs + j;
            store(scratch.weights.get() + point * point_step(kFilters * x_.channels) + p * x_.channels + c * kPanel +
                      lane,
                  to[j]);
          }
        }
      }
    }
  }

  // products [36, tiles, 32] -> the images' rows, by way of results [4, 4 columns, 32]
  void write_results(int64_t row, int64_t tile, int64_t tiles, int64_t output, int64_t filters, const T* bias,
                     Scratch& scratch) const {
    float shift[kFilters] = {};
    for (int64_t o = 0; bias != nullptr && o < filters; ++o) shift[o] = static_cast<float>(bias[output + o]);
    const int64_t width = columns_ * kOutputs;
    for (int64_t t = 0; t < columns_; ++t) {
      for (int64_t o = 0; o < filters; o += kLanes) {
        Lanes half[kOutputs][kInputs];
        for (int64_t j = 0; j < kInputs; ++j) {
          Lanes column[kInputs], to[kOutputs];
          for (int64_t i = 0; i < kInputs; ++i) {
            column[i] = load(scratch.products.get() + (i * kInputs + j) * point_step(tiles * kFilters) +
                             (tile + t) * kFilters + o);
          }
          points_to_output(column, to);
          for (int64_t i = 0; i < kOutputs; ++i) half[i][j] = to[i];
        }
        for (int64_t i = 0; i < kOutputs; ++i) {
          Lanes to[kOutputs];
          points_to_output(half[i], to);
          for (int64_t j = 0; j < kOutputs; ++j) {
            store(scratch.results.get() + (i * width + t * kOutputs + j) * kFilters + o, to[j] + load(shift + o));
          }
        }
      }
    }
    const int64_t top = row % rows_ * kOutputs;
    for (int64_t i = 0; i < std::min(kOutputs, y_.height - top); ++i) {
      y_.write_row(row / rows_, top + i, output, filters, scratch.results.get() + i * width * kFilters, kFilters);
    }
  }

  Images<const T> x_;
  Images<T> y_;
  int64_t pad_y_, pad_x_, depth_, columns_, rows_;
};

}  // namespace moe
