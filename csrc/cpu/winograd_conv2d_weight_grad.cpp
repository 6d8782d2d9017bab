// The weight gradients of grouped 3 x 3 convolutions of a batch sorted by expert, by Winograd's algorithm.
#include "common/layout.h"
#include "cpu/blocks.h"
#include "cpu/offsets.h"
#include "cpu/winograd.h"

namespace moe {
namespace {

// Output channels that lie together in the transformed gradient: the least number of whole tiles of the micro-kernel
// that is also one of whole vectors. Twice as many take 1.02 of the time (tuned-constants.md).
constexpr int64_t kRowGroup = 4 * kMr;
static_assert(kRowGroup % kLanes == 0);
// Most parts of an expert's batch. 4 and 64 take 0.97 and 0.99 of the time (tuned-constants.md).
constexpr int64_t kMostParts = 16;
// Most sums of all parts together, if there are several. 2^18 and 2^22 take 0.99 and 1.14 of the time
// (tuned-constants.md).
constexpr int64_t kMostSums = 1 << 20;

// Transformed tiles, packed for the micro-kernel, which reads no channel beyond the last whole vector.
//   values: [36, ceil(channels / group), tiles, group]
struct TransformedTiles {
  TransformedTiles(int64_t channels, int64_t group, int64_t tiles)
      : group(group), tiles(tiles), step(point_stride(round_up(channels, group) * tiles)), values(kPoints * step) {}

  float* at(int64_t point, int64_t tile, int64_t channel) const {
    return values + point * step + (channel / group * tiles + tile) * group + channel % group;
  }

  int64_t group, tiles, step;
  ScratchFloats values;
};

// The weight gradient of one expert at a time. Its rows of tiles are cut into parts that depend on the shapes alone,
// each with sums [36, O, C] of its own, to which the products of some transformed tiles at a time are added.
//   grad: [N, O, H', W'], x: [N, C, H, W], to which pad_y and pad_x zeros are added on each side
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
        rows_at_once_(std::max<int64_t>(1, kSummands / columns_)),
        width_(round_up(x.channels, kNr)),
        step_(point_stride(grad.channels * width_)) {}

  // Whether an expert with `count` images is work for one thread: too few tiles for two parts, and few sums.
  bool is_small(int64_t count) const { return most_parts(count) < 2 && kPoints * step_ <= kMostSums; }

  // Some rows of transformed tiles.
  struct Tiles {
    explicit Tiles(const WeightGrad& w)
        : grad(w.grad_.channels, kRowGroup, w.rows_at_once_ * w.columns_),
          x(w.x_.channels, kNr, w.rows_at_once_ * w.columns_) {}

    TransformedTiles grad, x;
  };

  // Scratch memory for experts with at most `count` images each.
  struct Scratch {
    Scratch(const WeightGrad& w, int64_t count) : tiles(w), sums(w.num_parts(count) * kPoints * w.step_) {}

    Tiles tiles;         // of the calling thread
    ScratchFloats sums;  // [parts, 36, O, C]
  };

  // out: [O, C, 3, 3] = the gradient from images [begin, begin + count), at least one
  void run(int64_t begin, int64_t count, const Scratch& scratch, T* out) const {
    const int64_t first = begin * rows_, rows = count * rows_, parts = num_parts(count);
    const auto sum_part = [&](int64_t i, const Tiles& tiles) {
      const int64_t from = i * rows / parts;
      sum(first + from, (i + 1) * rows / parts - from, tiles, scratch.sums + i * kPoints * step_);
    };
    // Within a part threads wait for one another twice in rows_at_once_ rows, and multiply tiles that others have
    // transformed, which in some processes took two threads longer than one (docs/facts.md). With more than two threads
    // not measured.
    if (parts > 1 && 2 * parts >= torch::stable::get_num_threads()) {
      dynamic_parallel_for(parts, [&] { return [&, tiles = Tiles(*this)](int64_t i) { sum_part(i, tiles); }; });
    } else {
      for (int64_t i = 0; i < parts; ++i) sum_part(i, scratch.tiles);
    }
    torch::stable::parallel_for(0, parts > 1 ? kPoints : 0, 1, [&](int64_t from, int64_t to) {
      for (int64_t point = from; point < to; ++point) add_parts(parts, scratch.sums + point * step_);
    });
    torch::stable::parallel_for(0, grad_.channels, 1, [&](int64_t from, int64_t to) {
      for (int64_t o = from; o < to; ++o) write(o, scratch.sums, out + o * x_.channels * 9);
    });
  }

 private:
  // Parts that `count` images can be cut into, each with as many tiles as are transformed at a time.
  int64_t most_parts(int64_t count) const { return count * rows_ / rows_at_once_; }

  int64_t num_parts(int64_t count) const {
    int64_t parts = 1;
    while (2 * parts <= std::min(kMostParts, most_parts(count)) && 2 * parts * kPoints * step_ <= kMostSums) parts *= 2;
    return parts;
  }

  // sums: [36, O, C] = those of rows [row, row + rows) of tiles
  void sum(int64_t row, int64_t rows, const Tiles& tiles, float* sums) const {
    for (int64_t done = 0; done < rows; done += rows_at_once_) {
      const int64_t count = std::min(rows_at_once_, rows - done);
      transform(row + done, count, tiles);
      torch::stable::parallel_for(0, kPoints, 1, [&](int64_t first, int64_t last) {
        for (int64_t point = first; point < last; ++point) {
          multiply(point, count * columns_, tiles, done > 0, sums + point * step_);
        }
      });
    }
  }

  // Transforms rows [row, row + rows) of tiles.
  void transform(int64_t row, int64_t rows, const Tiles& tiles) const {
    torch::stable::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
      Strip x_strip(kInputs, columns_ * kOutputs + 2, x_.channels);
      Strip grad_strip(kOutputs, columns_ * kOutputs, grad_.channels);
      for (int64_t i = first; i < last; ++i) {
        const int64_t image = (row + i) / rows_, top = (row + i) % rows_ * kOutputs;
        const auto write_to = [&](const TransformedTiles& values) {
          return
              [&, i](int64_t point, int64_t t, int64_t c, Lanes v) { store(values.at(point, i * columns_ + t, c), v); };
        };
        x_strip.read(x_, image, top - pad_y_, pad_x_);
        x_strip.transform_tiles<kInputs, input_to_points>(columns_, write_to(tiles.x));
        grad_strip.read(grad_, image, top, 0);
        grad_strip.transform_tiles<kOutputs, output_to_points>(columns_, write_to(tiles.grad));
      }
    });
  }

  // sums: [O, C] at one point = grad [count, O]^T x [count, C], added to what they were if `accumulate`
  void multiply(int64_t point, int64_t count, const Tiles& tiles, bool accumulate, float* sums) const {
    for (int64_t t = 0; t < count; t += kSummands) {
      for (int64_t o = 0; o < grad_.channels; o += kRowGroup) {
        for (int64_t c = 0; c < x_.channels; c += kNr) {
          multiply_panel(x_.channels - c, std::min(kRowGroup, grad_.channels - o), std::min(kSummands, count - t),
                         tiles.grad.at(point, t, o), kMr, 1, kRowGroup, tiles.x.at(point, t, c),
                         FloatEpilogue{sums + o * width_ + c, width_, accumulate || t > 0});
        }
      }
    }
  }

  // sums: [parts, O, C] at one point; adds all to the first
  void add_parts(int64_t parts, float* sums) const {
    for (int64_t part = 1; part < parts; ++part) {
      const float* const own = sums + part * kPoints * step_;
      for (int64_t i = 0; i < grad_.channels * width_; ++i) sums[i] += own[i];
    }
  }

  // Transforms the sums of output channel o back.
  //   sums: [36, O, C] -> out: [C, 3, 3]
  void write(int64_t o, const float* sums, T* out) const {
    for (int64_t c = 0; c < x_.channels; c += kLanes) {
      float taps[9][kLanes];
      const float* const from = sums + o * width_ + c;
      transform_2d<kInputs, 3, points_to_weight>([&](int i, int j) { return load(from + (i * kInputs + j) * step_); },
                                                 [&](int i, int j, Lanes value) { store(taps[3 * i + j], value); });
      for (int64_t first = 0; first < std::min(kLanes, x_.channels - c); first += 8) {
        Lanes8 rows[8];
        for (int i = 0; i < 8; ++i) rows[i] = load8(taps[i] + first);
        transpose(rows);
        for (int64_t i = 0; i < std::min<int64_t>(8, x_.channels - c - first); ++i) {
          T* const to = out + (c + first + i) * 9;
          write8(to, rows[i]);
          store(to[8], taps[8][first + i]);
        }
      }
    }
  }

  Images<const T> grad_, x_;
  int64_t pad_y_, pad_x_, columns_, rows_, rows_at_once_, width_, step_;
};

// The weight gradient of winograd_conv2d; an expert without images gets zeros.
//   grad: [N, O, H', W'], x: [N, C, H, W], offsets: [E + 1], padding: (vertical, horizontal) of the convolution
//   returns [E, O, C, 3, 3]
Tensor winograd_conv2d_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& offsets, const Shape& padding) {
  const int64_t num_experts = offsets.size(0) - 1;
  const auto ranges = read_offsets(offsets, num_experts, grad.size(0));
  const Tensor dense_grad = as_layout(grad, is_channels_last(grad)), dense_x = as_layout(x, is_channels_last(x));
  Tensor out = new_tensor(grad, {num_experts, grad.size(1), x.size(1), 3, 3});
  const int64_t size = grad.size(1) * x.size(1) * 9;
  dispatch_narrow(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    const auto images = [](const Tensor& t) {
      return Images<const T>{t.const_data_ptr<T>(), t.size(1), t.size(2), t.size(3), is_channels_last(t)};
    };
    const WeightGrad<T> gradient(images(dense_grad), images(dense_x), padding[0], padding[1]);
    std::vector<int64_t> small, others;  // experts
    int64_t most_images = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
      const int64_t count = ranges[e + 1] - ranges[e];
      (gradient.is_small(count) ? small : others).push_back(e);
      most_images = std::max(most_images, count);
    }
    const auto make_work = [&](const std::vector<int64_t>& experts) {
      return [&, scratch = typename WeightGrad<T>::Scratch(gradient, most_images)](int64_t i) {
        const int64_t e = experts[i];
        T* const to = out.mutable_data_ptr<T>() + e * size;
        if (ranges[e] == ranges[e + 1]) {
          std::fill(to, to + size, T(0));
        } else {
          gradient.run(ranges[e], ranges[e + 1] - ranges[e], scratch, to);
        }
      };
    };
    // Threads share the small experts if these are many, and else the work of one: for 128 experts with one image of 64
    // channels each, two threads take 3.2 ms instead of 5.5 (docs/facts.md).
    if (static_cast<int64_t>(small.size()) >= 4 * torch::stable::get_num_threads()) {
      dynamic_parallel_for(small.size(), [&] { return make_work(small); });
    } else {
      others.insert(others.end(), small.begin(), small.end());
    }
    const auto work = make_work(others);
    for (size_t i = 0; i < others.size(); ++i) work(i);
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("winograd_conv2d_weight_grad", TORCH_BOX(&moe::winograd_conv2d_weight_grad));
}
