// Winograd's F(4 x 4, 3 x 3): 4 x 4 results of a 3 x 3 convolution of stride 1 from 36 products instead of 144.
//
//   Y = A^T [ sum over channels (G w G^T) * (B^T X B) ] A        (Lavin and Gray, CVPR 2016; * is elementwise)
//   dw = G^T [ sum over tiles (A dY A^T) * (B^T X B) ] G
//
// Rows of A, B and G evaluate polynomials at points, here 0, +-2/3, +-3/2 and infinity, whose powers stay near 1: the
// rounding error (root mean square, 128 channels) is 1.3 times that of a direct convolution summed in order, and 2
// (AVX2) or 3.6 times (AVX-512) that of oneDNN's. With the usual points 0, +-1, +-2 it would be three times larger
// (docs/facts.md).
#pragma once

#include <algorithm>

#include "cpu/micro_kernel.h"
#include "cpu/narrow.h"
#include "cpu/scratch.h"

namespace moe {

constexpr int64_t kOutputs = 4, kInputs = 6;    // results and pixels on each side of a tile
constexpr int64_t kPoints = kInputs * kInputs;  // points of a tile, and products for each pair of channels
// Tiles that a convolution transforms at a time, but at least one row of them. 96 and 384 take 1.04 and 1.00 of the
// time (tuned-constants.md).
constexpr int64_t kTiles = 192;
// Products summed before they join a total, so that rounding errors grow with n / 64, and tiles that a weight gradient
// transforms at a time. In a convolution 32 and 128 take 1.04 and 0.98 of the time (tuned-constants.md).
constexpr int64_t kSummands = 64;
constexpr float kNear = 2 / 3.f, kFar = 3 / 2.f, kNear2 = 4 / 9.f, kFar2 = 9 / 4.f;
constexpr float kNearScale = 1 / (2 * kNear2 * (kNear2 - kFar2)), kFarScale = 1 / (2 * kFar2 * (kFar2 - kNear2));

// Elements from one point's array [size] to the next one's: a cache line more than its size, since 36 streams a power
// of two apart fall into one set of the L1 cache and evict one another (docs/facts.md).
constexpr int64_t point_stride(int64_t size) { return size + 16; }
inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// The values at 2/3, -2/3, 3/2 and -3/2, from the even and odd parts of a polynomial at 2/3 (near) and 3/2 (far).
//   parts: one vector of channels each -> to: [4] of them
MOE_INLINE void at_points(Lanes near_even, Lanes near_odd, Lanes far_even, Lanes far_odd, Lanes to[4]) {
  to[0] = near_even + near_odd;
  to[1] = near_even - near_odd;
  to[2] = far_even + far_odd;
  to[3] = far_even - far_odd;
}

// B^T x, x: [6] -> to: [6], kLanes channels at a time
MOE_INLINE void input_to_points(const Lanes x[6], Lanes to[6]) {
  to[0] = x[0] + x[4] - (kNear2 + kFar2) * x[2];
  at_points(x[4] - kFar2 * x[2], kNear * x[3] - kFar * x[1], x[4] - kNear2 * x[2], kFar * x[3] - kNear * x[1], to + 1);
  to[5] = x[1] + x[5] - (kNear2 + kFar2) * x[3];
}

// G w, w: [3] -> to: [6]
MOE_INLINE void weight_to_points(const Lanes w[3], Lanes to[6]) {
  to[0] = w[0];
  at_points(kNearScale * (w[0] + kNear2 * w[2]), (kNearScale * kNear) * w[1], kFarScale * (w[0] + kFar2 * w[2]),
            (kFarScale * kFar) * w[1], to + 1);
  to[5] = w[2];
}

// A^T m, m: [6] -> y: [4]
MOE_INLINE void points_to_output(const Lanes m[6], Lanes y[4]) {
  const Lanes near_sum = m[1] + m[2], near_difference = m[1] - m[2];
  const Lanes far_sum = m[3] + m[4], far_difference = m[3] - m[4];
  y[0] = m[0] + near_sum + far_sum;
  y[1] = kNear * near_difference + kFar * far_difference;
  y[2] = kNear2 * near_sum + kFar2 * far_sum;
  y[3] = (kNear * kNear2) * near_difference + (kFar * kFar2) * far_difference + m[5];
}

// A y, y: [4] -> to: [6]
MOE_INLINE void output_to_points(const Lanes y[4], Lanes to[6]) {
  to[0] = y[0];
  at_points(y[0] + kNear2 * y[2], kNear * y[1] + (kNear * kNear2) * y[3], y[0] + kFar2 * y[2],
            kFar * y[1] + (kFar * kFar2) * y[3], to + 1);
  to[5] = y[3];
}

// G^T m, m: [6] -> w: [3]
MOE_INLINE void points_to_weight(const Lanes m[6], Lanes w[3]) {
  const Lanes near_sum = kNearScale * (m[1] + m[2]), far_sum = kFarScale * (m[3] + m[4]);
  w[0] = m[0] + near_sum + far_sum;
  w[1] = (kNearScale * kNear) * (m[1] - m[2]) + (kFarScale * kFar) * (m[3] - m[4]);
  w[2] = kNear2 * near_sum + kFar2 * far_sum + m[5];
}

// The two-dimensional transform M X M^T, where kMap applies M to a column.
//   read(i, j): element (i, j) of X [kFrom, kFrom], kLanes channels of it
//   write(i, j, value): takes element (i, j) of the result [kTo, kTo]
template <int kFrom, int kTo, void (*kMap)(const Lanes*, Lanes*), class Read, class Write>
MOE_INLINE void transform_2d(const Read& read, const Write& write) {
  Lanes half[kTo][kFrom], to[kTo];
  for (int j = 0; j < kFrom; ++j) {
    Lanes column[kFrom];
    for (int i = 0; i < kFrom; ++i) column[i] = read(i, j);
    kMap(column, to);
    for (int i = 0; i < kTo; ++i) half[i][j] = to[i];
  }
  for (int i = 0; i < kTo; ++i) {
    kMap(half[i], to);
    for (int j = 0; j < kTo; ++j) write(i, j, to[j]);
  }
}

// Images, contiguous or channels-last, as rows of pixels.
//   data: [N, channels, height, width], or [N, height, width, channels] in memory if channels_last
template <class T>
struct Images {
  T* data;
  int64_t channels, height, width;
  bool channels_last;

  // The first pixel of row y of an image, at a channel.
  T* row(int64_t image, int64_t y, int64_t channel = 0) const {
    const int64_t pixel = channels_last ? (image * height + y) * width * channels + channel
                                        : ((image * channels + channel) * height + y) * width;
    return data + pixel;
  }
  // to: [width, channels], its pixels `step` elements apart = row y of an image
  void read_row(int64_t image, int64_t y, float* to, int64_t step) const {
    const T* from = row(image, y);
    if (!channels_last) return copy_transposed(channels, width, from, height * width, to, step);
    for (int64_t x = 0; x < width; ++x, from += channels, to += step) {
      for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<float>(from[c]);
    }
  }
  // Channels [first, first + count) of row y of an image = from: [width, count], its pixels `step` elements apart.
  void write_row(int64_t image, int64_t y, int64_t first, int64_t count, const float* from, int64_t step) const {
    T* to = row(image, y, first);
    if (!channels_last) return copy_transposed(width, count, from, step, to, height * width);
    for (int64_t x = 0; x < width; ++x, from += step, to += channels) {
      for (int64_t c = 0; c < count; ++c) store(to[c], from[c]);
    }
  }
};

// Some rows of pixels of an image, padded with zeros beyond its edges.
//   pixels: [height, width, channels rounded up to kLanes]
class Strip {
 public:
  Strip(int64_t height, int64_t width, int64_t channels)
      : height_(height),
        width_(width),
        depth_(round_up(channels, kLanes)),
        pixels_(ScratchFloats::zeros(height * width * depth_)) {}

  // Reads rows [top, top + height) of an image, the first pixel of each to column `left`; top may be negative.
  template <class T>
  void read(const Images<T>& from, int64_t image, int64_t top, int64_t left) {
    const int64_t size = width_ * depth_;
    for (int64_t r = 0; r < height_; ++r) {
      float* to = pixels_ + r * size;
      if (top + r < 0 || top + r >= from.height) {
        std::fill(to, to + size, 0.f);
      } else {
        from.read_row(image, top + r, to + left * depth_, depth_);
      }
    }
  }

  // Transforms the first `tiles` tiles: tile t is the kSide x kSide pixels from column 4 t on.
  //   write(point, tile, channel, values): takes the values of kLanes channels at a point
  template <int kSide, void (*kToPoints)(const Lanes*, Lanes*), class Write>
  void transform_tiles(int64_t tiles, const Write& write) const {
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t c = 0; c < depth_; c += kLanes) {
        const float* const tile = pixels_ + t * kOutputs * depth_ + c;
        transform_2d<kSide, kInputs, kToPoints>(
            [&](int i, int j) { return load(tile + (i * width_ + j) * depth_); },
            [&](int i, int j, Lanes value) { write(i * kInputs + j, t, c, value); });
      }
    }
  }

 private:
  int64_t height_, width_, depth_;
  ScratchFloats pixels_;
};

}  // namespace moe
