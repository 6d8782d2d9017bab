// The weight gradients of grouped 3 x 3 convolutions of a batch sorted by expert, by Winograd's algorithm.
#include "common/layout.h"
#include "cpu/offsets.h"
#include "cpu/winograd.h"

namespace moe {
namespace {

constexpr int64_t kRowGroup = 4 * kGemmTile;  // channels of the left factors that lie together

// The values of tiles at all points, [36, groups of channels, tiles, channels of a group].
struct Values {
  Values(int64_t channels, int64_t group, int64_t tiles)
      : group(group),
        tiles(tiles),
        step(point_step(round_up(channels, group) * tiles)),
        values(Floats::zeros(kPoints * step)) {}

  float* at(int64_t point, int64_t tile, int64_t channel) const {
    return values + point * step + (channel / group * tiles + tile) * group + channel % group;
  }

  int64_t group, tiles, step;
  Floats values;
};

// One expert after the other, whose tiles are evaluated some at a time, and joined to the sums [36, O, C] by points.
template <class T>
class WeightGrad {
 public:
  WeightGrad(Images<const T> grad, Images<const T> x, int64_t pad_y, int64_t pad_x)
      : grad_(grad),
        x_(x),
        pad_y_(pad_y),
        pad_x_(pad_x),
        columns_((grad.width + kOutputs - 1) / kOutputs),
        rows_((grad.height + kOutputs - 1) / kOutputs),
        rows_at_once_(std::max<int64_t>(1, kTiles / columns_)),
        left_(grad.channels, kRowGroup, rows_at_once_ * columns_),
        right_(x.channels, kPanel, rows_at_once_ * columns_),
        width_(round_up(x.channels, kPanel)),
        step_(point_step(grad.channels * width_)),
        sums_(kPoints * step_) {}

  // Images [begin, begin + count), at least one -> [O, C, 3, 3]
  void run(int64_t begin, int64_t count, T* out) {
    for (int64_t row = begin * rows_; row < (begin + count) * rows_; row += rows_at_once_) {
      const int64_t rows = std::min(rows_at_once_, (begin + count) * rows_ - row);
      evaluate(row, rows);
      torch::stable::parallel_for(0, kPoints, 1, [&](int64_t first, int64_t last) {
        for (int64_t point = first; point < last; ++point) multiply(point, rows * columns_, row > begin * rows_);
      });
    }
    torch::stable::parallel_for(0, grad_.channels, 1, [&](int64_t first, int64_t last) {
      for (int64_t o = first; o < last; ++o) write(o, out + o * x_.channels * 9);
    });
  }

 private:
  // Rows [row, row + rows) of tiles.
  void evaluate(int64_t row, int64_t rows) {
    torch::stable::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
      Strip inputs(kInputs, columns_ * kOutputs + 2, x_.channels);
      Strip outputs(kOutputs, columns_ * kOutputs, grad_.channels);
      for (int64_t i = first; i < last; ++i) {
        const int64_t image = (row + i) / rows_, top = (row + i) % rows_ * kOutputs;
        const auto write_to = [&](const Values& values) {
          return
              [&, i](int64_t point, int64_t t, int64_t c, Lanes v) { store(values.at(point, i * columns_ + t, c), v); };
        };
        inputs.read(x_, image, top - pad_y_, pad_x_);
        inputs.evaluate<kInputs, input_to_points>(columns_, write_to(right_));
        outputs.read(grad_, image, top, 0);
        outputs.evaluate<kOutputs, output_to_points>(columns_, write_to(left_));
      }
    });
  }

  // sums [O, C] = left [tiles, O]^T right [tiles, C] at one point, on top of what they were where `add`
  void multiply(int64_t point, int64_t tiles, bool add) {
    for (int64_t t = 0; t < tiles; t += kSummands) {
      for (int64_t o = 0; o < grad_.channels; o += kRowGroup) {
        for (int64_t c = 0; c < x_.channels; c += kPanel) {
          multiply_tiles(std::min(kRowGroup, grad_.channels - o), std::min(kSummands, tiles - t), left_.at(point, t, o),
                         kGemmTile, 1, kRowGroup, right_.at(point, t, c),
                         TileSums{sums_ + point * step_ + o * width_ + c, width_, add || t > 0});
        }
      }
    }
  }

  // sums -> the kernels [C, 3, 3] of output channel o
  void write(int64_t o, T* out) const {
    for (int64_t c = 0; c < x_.channels; c += kLanes) {
      float taps[9][kLanes];
      const float* const from = sums_ + o * width_ + c;
      on_both_sides<kInputs, 3, points_to_weight>([&](int i, int j) { return load(from + (i * kInputs + j) * step_); },
                                                  [&](int i, int j, Lanes value) { store(taps[3 * i + j], value); });
      for (int64_t first = 0; first < std::min(kLanes, x_.channels - c); first += 8) {
        Eight rows[8];
        for (int i = 0; i < 8; ++i) rows[i] = load_eight(taps[i] + first);
        transpose(rows);
        for (int64_t i = 0; i < std::min<int64_t>(8, x_.channels - c - first); ++i) {
          T* const to = out + (c + first + i) * 9;
          write_eight(to, rows[i]);
          store(to[8], taps[8][first + i]);
        }
      }
    }
  }

  Images<const T> grad_, x_;
  int64_t pad_y_, pad_x_, columns_, rows_, rows_at_once_;
  Values left_, right_;
  int64_t width_, step_;
  Floats sums_;
};

// grad [N, O, H', W'], x [N, C, H, W] -> [E, O, C, 3, 3]; an expert without rows gets zeros.
Tensor winograd_conv2d_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& offsets, const Shape& padding) {
  const int64_t num_experts = offsets.size(0) - 1;
  const auto ranges = read_offsets(offsets, num_experts, grad.size(0));
  const Tensor left = as_layout(grad, is_channels_last(grad)), right = as_layout(x, is_channels_last(x));
  Tensor out = new_tensor(grad, {num_experts, grad.size(1), x.size(1), 3, 3});
  const int64_t size = grad.size(1) * x.size(1) * 9;
  dispatch_narrow(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    const auto images = [](const Tensor& t) {
      return Images<const T>{t.const_data_ptr<T>(), t.size(1), t.size(2), t.size(3), is_channels_last(t)};
    };
    WeightGrad<T> gradient(images(left), images(right), padding[0], padding[1]);
    for (int64_t e = 0; e < num_experts; ++e) {
      T* const to = out.mutable_data_ptr<T>() + e * size;
      if (ranges[e] == ranges[e + 1]) {
        std::fill(to, to + size, T(0));
      } else {
        gradient.run(ranges[e], ranges[e + 1] - ranges[e], to);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("winograd_conv2d_weight_grad", TORCH_BOX(&moe::winograd_conv2d_weight_grad));
}
