// Grouped 3 x 3 convolutions of a batch sorted by expert, by Winograd's algorithm.
#include "common/layout.h"
#include "cpu/blocks.h"
#include "cpu/winograd.h"

namespace moe {
namespace {

// Output channels that are computed at a time. Their transformed weights from kSummands input channels, 288 kB, stay in
// L2 (docs/facts.md). 64 and 128 take 1.03 and 0.97 of the time (tuned-constants.md).
constexpr int64_t kFilters = 32;
constexpr int64_t kWeightStride = point_stride(kFilters * kSummands);

// The 3 x 3 kernels of one expert. Element (i, j) of the kernel from input channel c to output channel o is
// data[o * output_stride + c * input_stride + 3 * i + j]. Where `rotated`, by 180 degrees, it is (2 - i, 2 - j)
// instead.
template <class T>
struct Kernels {
  const T* data;
  int64_t output_stride, input_stride;
  bool rotated;

  // Reads the kernels from one input channel to `count` output channels from `output` on; the other lanes are zero.
  //   taps: [9] of kLanes output channels
  void read(int64_t output, int64_t input, int64_t count, Lanes taps[9]) const {
    const T* from = data + output * output_stride + input * input_stride;
    float values[9][kLanes] = {};
    for (int64_t first = 0; first < count; first += 8) {
      Lanes8 rows[8] = {};
      for (int64_t i = 0; i < std::min<int64_t>(8, count - first); ++i, from += output_stride) {
        // These are more streams than the hardware prefetches by itself; for four experts of 512 channels this made 30
        // ms of 39 (AVX2, docs/facts.md).
        __builtin_prefetch(from + 8 * input_stride);
        rows[i] = read8(from);
        values[8][first + i] = static_cast<float>(from[8]);
      }
      transpose(rows);
      for (int i = 0; i < 8; ++i) store(values[i] + first, rows[i]);
    }
    for (int i = 0; i < 9; ++i) taps[rotated ? 8 - i : i] = load(values[i]);
  }
};

// A grouped convolution. The results are tiles of 4 x 4, in rows of `columns_` tiles; rows are counted over all images.
//   x: [N, C, H, W], to which pad_y and pad_x zeros are added on each side, y: [N, O, H', W']
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

  // Rows of tiles in an image.
  int64_t rows_per_image() const { return rows_; }
  // Rows of tiles in a block of a batch with `rows` of them: fewer than a whole block's, but at least a third, so that
  // the threads have equal numbers of blocks if these are of one expert. No result depends on it. With three whole
  // blocks on two threads, a convolution of 128 images of 8 x 8 pixels and 64 channels took 1.3 times as long.
  int64_t rows_per_block(int64_t rows) const {
    const int64_t whole = std::max<int64_t>(1, kTiles / columns_), threads = torch::stable::get_num_threads();
    const int64_t last = std::max<int64_t>(rows, 1) - 1, rounds = last / (whole * threads) + 1;
    const int64_t equal = last / (rounds * threads) + 1;
    return 3 * equal >= whole ? std::min(whole, equal) : whole;
  }

  // Scratch memory of one thread for blocks of at most `rows` rows of tiles.
  struct Scratch {
    Scratch(const Winograd& w, int64_t rows)
        : strip(kInputs, w.columns_ * kOutputs + 2, w.x_.channels),
          points(kPoints * point_stride(rows * w.columns_ * w.depth_)),
          weights(kPoints * kWeightStride),
          products(kPoints * point_stride(rows * w.columns_ * kFilters)),
          results(kOutputs * kOutputs * w.columns_ * kFilters) {}

    Strip strip;             // the pixels under a row of tiles
    ScratchFloats points;    // [36, tiles, C rounded up], B^T X B
    ScratchFloats weights;   // [36, panels of kNr filters, kSummands, kNr], G w G^T
    ScratchFloats products;  // [36, tiles, kFilters], their products summed over channels
    ScratchFloats results;   // [4, 4 columns, kFilters], a row of tiles of y
  };

  // Computes output channels [begin, end) of rows [first, first + count) of tiles, which are all of one expert.
  //   kernels: [O, C, 3, 3] and bias: [O] or null, of that expert
  void run(int64_t first, int64_t count, const Kernels<T>& kernels, const T* bias, int64_t begin, int64_t end,
           Scratch& scratch) const {
    const int64_t tiles = count * columns_;
    const int64_t step = point_stride(tiles * depth_);
    Strip& strip = scratch.strip;
    for (int64_t i = 0; i < count; ++i) {
      float* const to = scratch.points + i * columns_ * depth_;
      strip.read(x_, (first + i) / rows_, (first + i) % rows_ * kOutputs - pad_y_, pad_x_);
      strip.transform_tiles<kInputs, input_to_points>(columns_, [&](int64_t point, int64_t t, int64_t c, Lanes v) {
        store(to + point * step + t * depth_ + c, v);
      });
    }
    for (int64_t o = begin; o < end; o += kFilters) {
      const int64_t filters = std::min(kFilters, end - o);
      for (int64_t c = 0; c < x_.channels; c += kSummands) {
        const int64_t summands = std::min(kSummands, x_.channels - c);
        for (int64_t p = 0; p < filters; p += kNr) {
          kernels_to_points(kernels, o + p, filters - p, c, summands, scratch.weights + p * kSummands);
        }
        for (int64_t point = 0; point < kPoints; ++point) {
          for (int64_t p = 0; p < filters; p += kNr) {
            multiply_panel(
                filters - p, tiles, summands, scratch.points + point * step + c, kMr * depth_, depth_, 1,
                scratch.weights + point * kWeightStride + p * kSummands,
                FloatEpilogue{scratch.products + point * point_stride(tiles * kFilters) + p, kFilters, c > 0});
          }
        }
      }
      for (int64_t i = 0; i < count; ++i) write_results(first + i, i * columns_, tiles, o, filters, bias, scratch);
    }
  }

 private:
  // Transforms the kernels from input channels [c0, c0 + summands) to kNr output channels from `output` on. Only
  // `count` of these exist; whole vectors of others are left as they are.
  //   kernels: [O, C, 3, 3] -> weights: [36, summands, kNr], its points kWeightStride elements apart
  static void kernels_to_points(const Kernels<T>& kernels, int64_t output, int64_t count, int64_t c0, int64_t summands,
                                float* weights) {
    for (int64_t c = 0; c < summands; ++c) {
      for (int64_t lane = 0; lane < std::min(kNr, count); lane += kLanes) {
        Lanes taps[9];
        float* const to = weights + c * kNr + lane;
        kernels.read(output + lane, c0 + c, std::min(kLanes, count - lane), taps);
        transform_2d<3, kInputs, weight_to_points>(
            [&](int i, int j) { return taps[3 * i + j]; },
            [&](int i, int j, Lanes value) { store(to + (i * kInputs + j) * kWeightStride, value); });
      }
    }
  }

  // Transforms the sums of a row of tiles back and writes them to y, with the bias.
  //   scratch.products: [36, tiles, kFilters], of which the row's tiles begin at `tile`
  //   bias: [O] or null
  //   y_: channels [output, output + filters) of the rows of pixels under row `row` of tiles
  void write_results(int64_t row, int64_t tile, int64_t tiles, int64_t output, int64_t filters, const T* bias,
                     Scratch& scratch) const {
    float shift[kFilters] = {};
    for (int64_t o = 0; bias != nullptr && o < filters; ++o) shift[o] = static_cast<float>(bias[output + o]);
    const int64_t width = columns_ * kOutputs;
    for (int64_t t = 0; t < columns_; ++t) {
      for (int64_t o = 0; o < filters; o += kLanes) {
        const float* const from = scratch.products + (tile + t) * kFilters + o;
        float* const to = scratch.results + t * kOutputs * kFilters + o;
        transform_2d<kInputs, kOutputs, points_to_output>(
            [&](int i, int j) { return load(from + (i * kInputs + j) * point_stride(tiles * kFilters)); },
            [&](int i, int j, Lanes value) { store(to + (i * width + j) * kFilters, value + load(shift + o)); });
      }
    }
    const int64_t top = row % rows_ * kOutputs;
    for (int64_t i = 0; i < std::min(kOutputs, y_.height - top); ++i) {
      y_.write_row(row / rows_, top + i, output, filters, scratch.results + i * width * kFilters, kFilters);
    }
  }

  Images<const T> x_;
  Images<T> y_;
  int64_t pad_y_, pad_x_, depth_, columns_, rows_;
};

// Output channels of a task: all of them, or fewer where there are too few blocks for the threads, as in the third
// stage of a ResNet with 32 images, although each task then transforms its block's tiles anew. No result depends on it.
// Not measured by itself.
int64_t filter_band(int64_t width, int64_t blocks) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bands = blocks % threads == 0 ? 1 : (2 * threads + blocks - 1) / blocks;
  return round_up((width + bands - 1) / bands, kFilters);
}

// x: [N, C, H, W], weight: [E, O, C, 3, 3], or [E, C, O, 3, 3] if transposed, bias: [E, O] or none, offsets: [E + 1]
// -> out: [N, O, H', W']
template <class T>
void convolve(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
              const Shape& padding, bool transposed, Tensor& out) {
  const auto *kernels = weight.const_data_ptr<T>(), *shifts = bias ? bias->const_data_ptr<T>() : nullptr;
  const int64_t depth = x.size(1), width = out.size(1);
  const Winograd<T> convolution({x.const_data_ptr<T>(), depth, x.size(2), x.size(3), is_channels_last(x)},
                                {out.mutable_data_ptr<T>(), width, out.size(2), out.size(3), is_channels_last(out)},
                                padding[0], padding[1]);
  auto rows = read_offsets(offsets, weight.size(0), x.size(0));
  for (int64_t& row : rows) row *= convolution.rows_per_image();
  const auto blocks = row_blocks(rows, convolution.rows_per_block(rows.back()));
  int64_t most = 0;
  for (const Block& block : blocks) most = std::max(most, block.count);
  const int64_t count = static_cast<int64_t>(blocks.size()), band = filter_band(width, count);
  const int64_t bands = (width + band - 1) / band;
  dynamic_parallel_for(count * bands, [&] {
    return [&, scratch = typename Winograd<T>::Scratch(convolution, most)](int64_t i) mutable {
      const Block& block = blocks[i / bands];
      const Kernels<T> own{kernels + block.expert * 9 * depth * width, 9 * (transposed ? 1 : depth),
                           9 * (transposed ? width : 1), transposed};
      const int64_t begin = i % bands * band;
      convolution.run(block.begin, block.count, own, bias ? shifts + block.expert * width : nullptr, begin,
                      std::min(begin + band, width), scratch);
    };
  });
}

// The grouped convolution, or, for its input gradient, the transposed one, whose weight is [E, C, O, 3, 3] and whose
// kernels are rotated by 180 degrees.
//   x: [N, C, H, W], weight: [E, O, C, 3, 3], bias: [E, O] or none, offsets: [E + 1], padding: (vertical, horizontal)
//   returns [N, O, H + 2 padding - 2, W + 2 padding - 2] in the layout of x
Tensor winograd_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
                       const Shape& padding, bool transposed) {
  const Tensor source = as_layout(x, is_channels_last(x)), kernels = as_contiguous(weight);
  const OptionalTensor shifts = bias ? OptionalTensor(as_contiguous(*bias)) : std::nullopt;
  Tensor out = new_tensor(
      x, {x.size(0), weight.size(transposed ? 2 : 1), x.size(2) + 2 * padding[0] - 2, x.size(3) + 2 * padding[1] - 2},
      is_channels_last(x));
  dispatch_narrow(x.scalar_type(), "x", [&](auto zero) {
    convolve<decltype(zero)>(source, kernels, shifts, offsets, padding, transposed, out);
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("winograd_conv2d", TORCH_BOX(&moe::winograd_conv2d)); }
