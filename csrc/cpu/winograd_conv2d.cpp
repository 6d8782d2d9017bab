// Grouped 3 x 3 convolutions of a batch sorted by expert, by Winograd's algorithm.
#include "common/layout.h"
#include "cpu/blocks.h"
#include "cpu/winograd.h"

namespace moe {
namespace {

constexpr int64_t kFilters = 32;  // output channels that are in work at once
constexpr int64_t kWeightStep = point_step(kFilters * kSummands);

// Kernels of one expert, w(output channel, input channel, 3, 3): as they lie, or with channels exchanged and turned
// round.
template <class T>
struct Kernels {
  const T* data;
  int64_t output_step, input_step;
  bool turned;

  // The nine numbers of kLanes output channels' kernels, of which `count` exist.
  void read(int64_t output, int64_t input, int64_t count, Lanes taps[9]) const {
    const T* from = data + output * output_step + input * input_step;
    float values[9][kLanes] = {};
    for (int64_t first = 0; first < count; first += 8) {
      Eight rows[8] = {};
      for (int64_t i = 0; i < std::min<int64_t>(8, count - first); ++i, from += output_step) {
        __builtin_prefetch(from + 8 * input_step);  // more streams than the machine follows by itself
        rows[i] = read_eight(from);
        values[8][first + i] = static_cast<float>(from[8]);
      }
      transpose(rows);
      for (int i = 0; i < 8; ++i) store(values[i] + first, rows[i]);
    }
    for (int i = 0; i < 9; ++i) taps[turned ? 8 - i : i] = load(values[i]);
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
        : strip(kInputs, w.columns_ * kOutputs + 2, w.x_.channels),
          points(kPoints * point_step(rows * w.columns_ * w.depth_)),
          weights(kPoints * kWeightStep),
          products(kPoints * point_step(rows * w.columns_ * kFilters)),
          results(kOutputs * kOutputs * w.columns_ * kFilters) {}

    Strip strip;
    Floats points, weights, products, results;
  };

  // Rows [first, first + count) of tiles, output channels [begin, end).
  void run(int64_t first, int64_t count, const Kernels<T>& kernels, const T* bias, int64_t begin, int64_t end,
           Scratch& scratch) const {
    const int64_t tiles = count * columns_;
    const int64_t step = point_step(tiles * depth_);
    Strip& strip = scratch.strip;
    for (int64_t i = 0; i < count; ++i) {
      float* const to = scratch.points + i * columns_ * depth_;  // of [36, tiles, depth]
      strip.read(x_, (first + i) / rows_, (first + i) % rows_ * kOutputs - pad_y_, pad_x_);
      strip.evaluate<kInputs, input_to_points>(columns_, [&](int64_t point, int64_t t, int64_t c, Lanes v) {
        store(to + point * step + t * depth_ + c, v);
      });
    }
    for (int64_t o = begin; o < end; o += kFilters) {
      const int64_t filters = std::min(kFilters, end - o);
      for (int64_t c = 0; c < x_.channels; c += kSummands) {
        const int64_t terms = std::min(kSummands, x_.channels - c);
        for (int64_t p = 0; p < filters; p += kPanel) {
          kernels_to_points(kernels, o + p, filters - p, c, terms, scratch.weights + p * kSummands);
        }
        for (int64_t point = 0; point < kPoints; ++point) {
          for (int64_t p = 0; p < filters; p += kPanel) {
            multiply_tiles(tiles, terms, scratch.points + point * step + c, kGemmTile * depth_, depth_, 1,
                           scratch.weights + point * kWeightStep + p * kSummands,
                           TileSums{scratch.products + point * point_step(tiles * kFilters) + p, kFilters, c > 0});
          }
        }
      }
      for (int64_t i = 0; i < count; ++i) write_results(first + i, i * columns_, tiles, o, filters, bias, scratch);
    }
  }

 private:
  // Input channels [c0, c0 + terms) of kPanel output channels, of which `count` exist -> weights [36, terms, kPanel].
  static void kernels_to_points(const Kernels<T>& kernels, int64_t output, int64_t count, int64_t c0, int64_t terms,
                                float* weights) {
    for (int64_t c = 0; c < terms; ++c) {
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        Lanes taps[9];
        float* const to = weights + c * kPanel + lane;
        kernels.read(output + lane, c0 + c, std::clamp<int64_t>(count - lane, 0, kLanes), taps);
        on_both_sides<3, kInputs, weight_to_points>(
            [&](int i, int j) { return taps[3 * i + j]; },
            [&](int i, int j, Lanes value) { store(to + (i * kInputs + j) * kWeightStep, value); });
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
        const float* const from = scratch.products + (tile + t) * kFilters + o;
        float* const to = scratch.results + t * kOutputs * kFilters + o;
        on_both_sides<kInputs, kOutputs, points_to_output>(
            [&](int i, int j) { return load(from + (i * kInputs + j) * point_step(tiles * kFilters)); },
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

// Output channels of a part of the work: fewer where few blocks would leave threads idle, though each part evaluates
// its block's tiles anew. No result depends on it.
int64_t filter_band(int64_t width, int64_t blocks) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bands = threads == 1 ? 1 : (2 * threads + blocks - 1) / std::max<int64_t>(1, blocks);
  return round_up((width + bands - 1) / bands, kFilters);
}

template <class T>
void convolve(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
              const Shape& padding, bool turned, Tensor& out) {
  const auto *kernels = weight.const_data_ptr<T>(), *shifts = bias ? bias->const_data_ptr<T>() : nullptr;
  const int64_t depth = x.size(1), width = out.size(1);
  const Winograd<T> convolution({x.const_data_ptr<T>(), depth, x.size(2), x.size(3), is_channels_last(x)},
                                {out.mutable_data_ptr<T>(), width, out.size(2), out.size(3), is_channels_last(out)},
                                padding[0], padding[1]);
  auto rows = read_offsets(offsets, weight.size(0), x.size(0));
  for (int64_t& row : rows) row *= convolution.rows_per_image();
  const auto blocks = row_blocks(rows, convolution.rows_per_block());
  int64_t most = 0;
  for (const Block& block : blocks) most = std::max(most, block.count);
  const int64_t count = static_cast<int64_t>(blocks.size()), band = filter_band(width, count);
  const int64_t bands = (width + band - 1) / band;
  share(count * bands, [&] {
    return [&, scratch = typename Winograd<T>::Scratch(convolution, most)](int64_t i) mutable {
      const Block& block = blocks[i / bands];
      const Kernels<T> own{kernels + block.expert * 9 * depth * width, 9 * (turned ? 1 : depth),
                           9 * (turned ? width : 1), turned};
      const int64_t begin = i % bands * band;
      convolution.run(block.begin, block.count, own, bias ? shifts + block.expert * width : nullptr, begin,
                      std::min(begin + band, width), scratch);
    };
  });
}

// x [N, C, H, W], weight [E, O, C, 3, 3], bias [E, O], offsets [E + 1] -> [N, O, H', W'] in the layout of x;
// turned: O and C exchanged, and the kernels turned round.
Tensor winograd_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
                       const Shape& padding, bool turned) {
  const Tensor source = as_layout(x, is_channels_last(x)), kernels = as_contiguous(weight);
  const OptionalTensor shifts = bias ? OptionalTensor(as_contiguous(*bias)) : std::nullopt;
  Tensor out = new_tensor(
      x, {x.size(0), weight.size(turned ? 2 : 1), x.size(2) + 2 * padding[0] - 2, x.size(3) + 2 * padding[1] - 2},
      is_channels_last(x));
  dispatch_narrow(x.scalar_type(), "x",
                  [&](auto zero) { convolve<decltype(zero)>(source, kernels, shifts, offsets, padding, turned, out); });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("winograd_conv2d", TORCH_BOX(&moe::winograd_conv2d)); }
