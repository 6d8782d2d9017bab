// Batch normalisation with statistics per expert. Sums are in double over fixed blocks, so that they are accurate and
// bitwise the same for any number of threads.
#include <algorithm>
#include <cmath>

#include "common/layout.h"
#include "cpu/blocks.h"

namespace moe {
namespace {

// Rows summed before they join the total, so that rounding errors grow with n / 16. 4 and 64 take 1.33 and 0.92 of the
// time (tuned-constants.md).
constexpr int64_t kRows = 16;
// Channels that a task sums, in accumulators that stay in L1. 32 and 128 take 1.06 and 0.95 of the time
// (tuned-constants.md).
constexpr int64_t kChannels = 64;
// Pixels of a block, which is a task for up to kChannels channels. 256 and 4096 take 1.00 and 1.01 of the time
// (tuned-constants.md).
constexpr int64_t kPixels = 1024;
// Fewest elements of a task that normalises. 2048 and 131072 take 1.00 and 1.01 of the time (tuned-constants.md).
constexpr int64_t kGrain = 16384;

// How a batch x [N, C, *] lies in memory: by pixel (channels-last, or one pixel per image), C channels of one pixel are
// neighbours; otherwise by plane, all pixels of one channel of an image.
//   offsets: int32 [E + 1] over the N images
struct Batch {
  Batch(const Tensor& x, const Tensor& offsets, int64_t num_experts)
      : ranges(read_offsets(offsets, num_experts, x.size(0))), experts(num_experts), channels(x.size(1)) {
    const int64_t spatial = channels * x.size(0) == 0 ? 1 : x.numel() / (x.size(0) * channels);
    channels_last = is_channels_last(x);
    by_pixel = channels_last || spatial == 1;
    pixels = spatial;
  }

  // Values of each channel that expert e normalises.
  int64_t values(int64_t e) const { return (ranges[e + 1] - ranges[e]) * pixels; }

  std::vector<int64_t> ranges;  // [E + 1]
  int64_t experts, channels, pixels;
  bool channels_last, by_pixel;
};

ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// t: [E, C] or none -> the same in double, or `otherwise` everywhere
std::vector<double> table(const OptionalTensor& t, const Batch& batch, double otherwise) {
  const int64_t size = batch.experts * batch.channels;
  if (!t) return std::vector<double>(size, otherwise);
  const Tensor wide = as_contiguous(torch::stable::to(*t, ScalarType::Double));
  const double* p = data<double>(wide);
  return {p, p + size};
}

// values: [E * C] -> [E, C] in the dtype of the statistics of `like`
Tensor to_tensor(const std::vector<double>& values, const Tensor& like, const Batch& batch) {
  Tensor out = new_tensor(like, {batch.experts, batch.channels}, statistics_type(like));
  dispatch_float(out.scalar_type(), "statistics", [&](auto zero) {
    using T = decltype(zero);
    std::transform(values.begin(), values.end(), mutable_data<T>(out), [](double v) { return static_cast<T>(v); });
  });
  return out;
}

// Sums first(t, j) and second(t, j) over the elements of every expert and channel, where t = expert * C + channel and j
// is the element's index in memory. Blocks have fixed borders and are added in order.
//   out_first, out_second: [E * C]
template <class First, class Second>
void sum_pairs(const Batch& batch, const First& first, const Second& second, std::vector<double>& out_first,
               std::vector<double>& out_second) {
  const int64_t C = batch.channels, S = batch.pixels, E = batch.experts;
  out_first.assign(E * C, 0.0);
  out_second.assign(E * C, 0.0);
  if (batch.by_pixel) {
    // A task is kChannels channels of a block of pixels, which are summed kRows at a time.
    const int64_t groups = (C + kChannels - 1) / kChannels;
    std::vector<int64_t> pixels(batch.ranges);
    for (int64_t& image : pixels) image *= S;
    const std::vector<Block> blocks = row_blocks(pixels, kPixels);
    std::vector<double> sums(2 * blocks.size() * C);  // [blocks, 2, C]
    torch::stable::parallel_for(0, blocks.size() * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const Block& block = blocks[task / groups];
        const int64_t e = block.expert, c0 = task % groups * kChannels, n = std::min(kChannels, C - c0);
        const int64_t last = block.begin + block.count;
        double* a = sums.data() + task / groups * 2 * C + c0;
        double* b = a + C;
        for (int64_t r = block.begin; r < last; r += kRows) {
          double pa[kChannels] = {}, pb[kChannels] = {};
          for (int64_t i = r; i < std::min(r + kRows, last); ++i) {
            for (int64_t c = 0; c < n; ++c) {
              pa[c] += first(e * C + c0 + c, i * C + c0 + c);
              pb[c] += second(e * C + c0 + c, i * C + c0 + c);
            }
          }
          for (int64_t c = 0; c < n; ++c) a[c] += pa[c], b[c] += pb[c];
        }
      }
    });
    for (size_t i = 0; i < blocks.size(); ++i) {
      const double* sum = sums.data() + 2 * i * C;
      const int64_t t = blocks[i].expert * C;
      for (int64_t c = 0; c < C; ++c) out_first[t + c] += sum[c], out_second[t + c] += sum[C + c];
    }
  } else {
    // A task is one channel of one expert. A plane is summed in kSums interleaved sums, which are then added as a tree.
    // 8 and 32 take 0.93 and 1.10 of the time (tuned-constants.md).
    constexpr int64_t kSums = 16;
    torch::stable::parallel_for(0, E * C, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t e = t / C, c = t % C;
        for (int64_t image = batch.ranges[e]; image < batch.ranges[e + 1]; ++image) {
          double pa[kSums] = {}, pb[kSums] = {};
          const int64_t base = (image * C + c) * S;
          int64_t s = 0;
          for (; s + kSums <= S; s += kSums) {
            for (int64_t l = 0; l < kSums; ++l) {
              pa[l] += first(t, base + s + l);
              pb[l] += second(t, base + s + l);
            }
          }
          for (; s < S; ++s) pa[s % kSums] += first(t, base + s), pb[s % kSums] += second(t, base + s);
          for (int64_t width = kSums / 2; width > 0; width /= 2) {
            for (int64_t l = 0; l < width; ++l) pa[l] += pa[l + width], pb[l] += pb[l + width];
          }
          out_first[t] += pa[0];
          out_second[t] += pb[0];
        }
      }
    });
  }
}

// Calls f(t, j) for every element, in parallel: t = expert * C + channel, j its index in memory.
template <class F>
void for_each_element(const Batch& batch, const F& f) {
  const int64_t C = batch.channels, S = batch.pixels;
  for_each_expert(batch.ranges, [&](int64_t e, int64_t begin, int64_t count) {
    const int64_t lines = batch.by_pixel ? count * S : count * C, width = batch.by_pixel ? C : S;
    const int64_t first = begin * C * S, grain = kGrain / std::clamp<int64_t>(width, 1, kGrain);
    torch::stable::parallel_for(0, lines, grain, [&](int64_t from, int64_t to) {
      for (int64_t line = from; line < to; ++line) {
        const int64_t base = first + line * width;
        if (batch.by_pixel) {
          for (int64_t c = 0; c < C; ++c) f(e * C + c, base + c);
        } else {
          const int64_t t = e * C + line % C;
          for (int64_t s = 0; s < S; ++s) f(t, base + s);
        }
      }
    });
  });
}

// y = (x - mean) / sqrt(var + eps) * weight + bias for each expert, with the statistics of the batch in training (0 for
// an expert without images), else with the running ones.
//   x: [N, C, *], weight, bias: [E, C] or none, running_mean, running_var: [E, C], unread in training
//   offsets: int32 [E + 1]
//   returns y of the shape and layout of x, and the statistics that were used, mean and var [E, C]
std::tuple<Tensor, Tensor, Tensor> expert_batch_norm_forward(const Tensor& x, const OptionalTensor& weight,
                                                             const OptionalTensor& bias,
                                                             const OptionalTensor& running_mean,
                                                             const OptionalTensor& running_var, const Tensor& offsets,
                                                             bool training, double eps) {
  const Batch batch(x, offsets, offsets.size(0) - 1);
  const Tensor dense = as_layout(x, batch.channels_last);
  Tensor y = new_tensor(x, shape(x), batch.channels_last);
  std::vector<double> mean = table(training ? std::nullopt : running_mean, batch, 0);
  std::vector<double> var = table(training ? std::nullopt : running_var, batch, 0);
  const std::vector<double> w = table(weight, batch, 1), b = table(bias, batch, 0);
  dispatch_float(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* src = data<T>(dense);
    T* dst = mutable_data<T>(y);
    const auto value = [&](int64_t j) { return static_cast<double>(static_cast<A>(src[j])); };
    if (training) {
      // Two passes: the mean, then the squared distances from it, corrected for the rounding of the mean itself.
      std::vector<double> sum, squares;
      const auto none = [](int64_t, int64_t) { return 0.0; };
      sum_pairs(batch, [&](int64_t, int64_t j) { return value(j); }, none, sum, squares);
      for (size_t t = 0; t < sum.size(); ++t) mean[t] = sum[t] / std::max<int64_t>(1, batch.values(t / batch.channels));
      const auto centred = [&](int64_t t, int64_t j) { return value(j) - mean[t]; };
      const auto square = [&](int64_t t, int64_t j) { return centred(t, j) * centred(t, j); };
      sum_pairs(batch, centred, square, sum, squares);
      for (size_t t = 0; t < sum.size(); ++t) {
        const double n = std::max<int64_t>(1, batch.values(t / batch.channels));
        var[t] = std::max(0.0, (squares[t] - sum[t] * sum[t] / n) / n);
        mean[t] += sum[t] / n;
      }
    }
    std::vector<A> centre(mean.begin(), mean.end()), scale(mean.size()), shift(b.begin(), b.end());
    for (size_t t = 0; t < scale.size(); ++t) scale[t] = static_cast<A>(w[t] / std::sqrt(var[t] + eps));
    for_each_element(batch, [&, src, dst](int64_t t, int64_t j) {
      dst[j] = static_cast<T>((static_cast<A>(src[j]) - centre[t]) * scale[t] + shift[t]);
    });
  });
  return {y, to_tensor(mean, x, batch), to_tensor(var, x, batch)};
}

// The gradients of bias and weight, sums of grad and of grad * (x - mean) / sqrt(var + eps).
//   grad, x: [N, C, *], mean, var: [E, C], offsets: int32 [E + 1]; returns dbias [E, C], dweight [E, C]
std::tuple<Tensor, Tensor> expert_batch_norm_param_grad(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                        const Tensor& var, const Tensor& offsets, double eps) {
  const Batch batch(grad, offsets, mean.size(0));
  const Tensor dense_grad = as_layout(grad, batch.channels_last), dense_x = as_layout(x, batch.channels_last);
  const std::vector<double> centre = table(mean, batch, 0), variance = table(var, batch, 0);
  std::vector<double> dbias, dweight;
  dispatch_float(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T *g = data<T>(dense_grad), *src = data<T>(dense_x);
    const auto plain = [&](int64_t, int64_t j) { return static_cast<double>(static_cast<A>(g[j])); };
    const auto scaled = [&](int64_t t, int64_t j) {
      return static_cast<double>(static_cast<A>(g[j])) * (static_cast<double>(static_cast<A>(src[j])) - centre[t]);
    };
    sum_pairs(batch, plain, scaled, dbias, dweight);
  });
  for (size_t t = 0; t < dweight.size(); ++t) dweight[t] /= std::sqrt(variance[t] + eps);
  return {to_tensor(dbias, x, batch), to_tensor(dweight, x, batch)};
}

// The gradient of x. Where the statistics are constants it is dx = grad * weight / sqrt(var + eps); where they are the
// batch's own, x, mean and the results of expert_batch_norm_param_grad are given, and, with n values of the channel,
// dx = weight / sqrt(var + eps) * (grad - dbias / n - (x - mean) / sqrt(var + eps) * dweight / n).
//   grad: [N, C, *], x: [N, C, *] or none, weight, mean, dbias, dweight: [E, C] or none, var: [E, C]
//   offsets: int32 [E + 1]; returns dx of the shape and layout of grad
Tensor expert_batch_norm_input_grad(const Tensor& grad, const OptionalTensor& x, const OptionalTensor& weight,
                                    const OptionalTensor& mean, const Tensor& var, const OptionalTensor& dbias,
                                    const OptionalTensor& dweight, const Tensor& offsets, double eps) {
  const Batch batch(grad, offsets, var.size(0));
  const Tensor dense_grad = as_layout(grad, batch.channels_last);
  const Tensor dense_x = x ? as_layout(*x, batch.channels_last) : dense_grad;
  Tensor out = new_tensor(grad, shape(grad), batch.channels_last);
  const std::vector<double> w = table(weight, batch, 1), variance = table(var, batch, 0), m = table(mean, batch, 0);
  const std::vector<double> sum = table(dbias, batch, 0), sum_scaled = table(dweight, batch, 0);
  dispatch_float(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T *g = data<T>(dense_grad), *src = data<T>(dense_x);
    T* dst = mutable_data<T>(out);
    std::vector<A> scale(w.size()), offset(w.size()), slope(w.size()), centre(m.begin(), m.end());
    for (size_t t = 0; t < w.size(); ++t) {
      const double n = std::max<int64_t>(1, batch.values(t / batch.channels)), inv = 1 / std::sqrt(variance[t] + eps);
      scale[t] = static_cast<A>(w[t] * inv);
      offset[t] = static_cast<A>(sum[t] / n);
      slope[t] = static_cast<A>(inv * sum_scaled[t] / n);
    }
    if (x) {
      for_each_element(batch, [&, g, src, dst](int64_t t, int64_t j) {
        const A centred = static_cast<A>(src[j]) - centre[t];
        dst[j] = static_cast<T>(scale[t] * (static_cast<A>(g[j]) - offset[t] - centred * slope[t]));
      });
    } else {
      for_each_element(batch,
                       [&, g, dst](int64_t t, int64_t j) { dst[j] = static_cast<T>(scale[t] * static_cast<A>(g[j])); });
    }
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("expert_batch_norm_forward", TORCH_BOX(&moe::expert_batch_norm_forward));
  m.impl("expert_batch_norm_param_grad", TORCH_BOX(&moe::expert_batch_norm_param_grad));
  m.impl("expert_batch_norm_input_grad", TORCH_BOX(&moe::expert_batch_norm_input_grad));
}
