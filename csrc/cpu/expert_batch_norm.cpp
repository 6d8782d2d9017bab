// Batch normalisation with statistics per expert. A few values at a time are summed in acc_t, and these sums in double
// over fixed parts, so that they are accurate and bitwise the same for any number of threads.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/inline.h"
#include "common/layout.h"
#include "cpu/blocks.h"

namespace moe {
namespace {

// Values summed before they join the total in double, so that rounding errors grow with n / 16. 4 and 64 take 1.30 and
// 0.89 of the time (tuned-constants.md).
constexpr int64_t kSummands = 16;
// Sums that are made side by side, in registers. 32 and 128 take 0.99 and 1.06 of the time (tuned-constants.md).
constexpr int64_t kSums = 64;
// Most channels of a part. 32 and 128 take 1.01 and 0.96 of the time (tuned-constants.md).
constexpr int64_t kChannels = 64;
// Most pixels of a part by pixel; a part by plane has as many values or one image. They stay in L2 while they are
// summed twice. 256 and 4096 take 1.05 and 1.01 of the time (tuned-constants.md).
constexpr int64_t kPixels = 1024;
// Fewest elements of a task that normalises. 2048 and 131072 take 0.98 and 0.99 of the time (tuned-constants.md).
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

// A part of a batch, which one task sums: by pixel some channels of some pixels of one expert, by plane one channel of
// some of its images.
struct Part {
  int64_t t, channels;   // expert * C + the first channel, and their number
  int64_t begin, count;  // the index in memory of the first value, and the values of each channel, at least one
};

std::vector<Part> parts_of(const Batch& batch) {
  const int64_t C = batch.channels, S = batch.pixels;
  std::vector<Part> parts;
  if (S == 0) return parts;
  if (batch.by_pixel) {
    std::vector<int64_t> pixels(batch.ranges);
    for (int64_t& image : pixels) image *= S;
    for (const Block& block : row_blocks(pixels, kPixels)) {
      for (int64_t c = 0; c < C; c += kChannels) {
        parts.push_back({block.expert * C + c, std::min(kChannels, C - c), block.begin * C + c, block.count});
      }
    }
  } else {
    for (const Block& block : row_blocks(batch.ranges, std::max<int64_t>(1, kPixels * kChannels / S))) {
      for (int64_t c = 0; c < C; ++c) {
        parts.push_back({block.expert * C + c, 1, (block.begin * C + c) * S, block.count * S});
      }
    }
  }
  return parts;
}

// Two values that are summed for every element.
template <class A>
struct Pair {
  A first, second;
};

// Adds value(lane, index) of some rows of at most kSums / kWays lanes to sums: [lanes]. Neighbouring lanes have
// neighbouring indices, rows those that are `stride` apart. Every kWays-th row joins the same sum.
template <int64_t kWays, class A, class Value>
MOE_INLINE void sum_rows(int64_t index, int64_t rows, int64_t stride, int64_t lanes, const Value& value,
                         Pair<double>* sums) {
  constexpr int64_t kLanes = kSums / kWays, kRows = kSummands * kWays;
  for (int64_t r = 0; r < rows; r += kRows) {
    A first[kWays][kLanes] = {}, second[kWays][kLanes] = {};
    const auto add = [&](int64_t way, int64_t lane, int64_t row) {
      const Pair<A> pair = value(lane, index + row * stride + lane);
      first[way][lane] += pair.first;
      second[way][lane] += pair.second;
    };
    if (r + kRows <= rows && lanes == kLanes) {  // both constant, so that the sums stay in registers
      for (int64_t i = 0; i < kRows; i += kWays) {
#pragma GCC unroll 4
        for (int64_t way = 0; way < kWays; ++way) {
          for (int64_t lane = 0; lane < kLanes; ++lane) add(way, lane, r + i + way);
        }
      }
    } else {
      for (int64_t i = r; i < std::min(r + kRows, rows); ++i) {
        for (int64_t lane = 0; lane < lanes; ++lane) add(i % kWays, lane, i);
      }
    }
    for (int64_t way = 0; way < kWays; ++way) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        sums[lane].first += first[way][lane];
        sums[lane].second += second[way][lane];
      }
    }
  }
}

// Adds value(column, index) of a matrix, whose rows are `stride` apart, to sums: [columns].
template <class A, class Value>
void sum_columns(int64_t index, int64_t rows, int64_t stride, int64_t columns, const Value& value, Pair<double>* sums) {
  constexpr int64_t kMostRows = 4 * kSummands;  // of all columns before the next
  for (int64_t r = 0; r < rows; r += kMostRows) {
    for (int64_t c = 0; c < columns;) {
      const auto add = [&](auto ways) {
        const int64_t lanes = std::min(kSums / ways, columns - c);
        sum_rows<ways, A>(
            index + r * stride + c, std::min(kMostRows, rows - r), stride, lanes,
            [&](int64_t lane, int64_t j) { return value(c + lane, j); }, sums + c);
        c += lanes;
      };
      if (columns - c >= kSums) {
        add(std::integral_constant<int64_t, 1>());
      } else if (columns - c >= kSums / 2) {
        add(std::integral_constant<int64_t, 2>());
      } else {
        add(std::integral_constant<int64_t, 4>());
      }
    }
  }
}

// The sums of value(channel, index) over a part, with the part's channels counted from 0.
//   sums: [channels of the part]
template <class A, class Value>
void sum_part(const Batch& batch, const Part& part, const Value& value, Pair<double>* sums) {
  std::fill(sums, sums + part.channels, Pair<double>{});
  if (batch.by_pixel) return sum_columns<A>(part.begin, part.count, batch.channels, part.channels, value, sums);
  constexpr int64_t kLargePlane = kSums * kSummands;
  const int64_t S = batch.pixels, step = batch.channels * S;  // from an image to the next
  const auto of_channel = [&](int64_t, int64_t j) { return value(0, j); };
  Pair<double> columns[kLargePlane] = {};
  if (S < kLargePlane) {  // its pixels as columns, the images as rows
    sum_columns<A>(part.begin, part.count / S, step, S, of_channel, columns);
  } else {
    for (int64_t plane = part.begin; plane < part.begin + part.count / S * step; plane += step) {
      sum_columns<A>(plane, S / kSums, kSums, kSums, of_channel, columns);
      sum_columns<A>(plane + S / kSums * kSums, 1, 0, S % kSums, of_channel, columns);
    }
  }
  for (int64_t c = 0; c < std::min(S, kLargePlane); ++c) {
    sums->first += columns[c].first;
    sums->second += columns[c].second;
  }
}

// Calls sum(part, sums: [channels of the part]) for all parts, in parallel, and then merge(t, n, sums) for each channel
// of each part in order, where n is its number of values.
template <class Sum, class Merge>
void for_each_part(const Batch& batch, const Sum& sum, const Merge& merge) {
  const std::vector<Part> parts = parts_of(batch);
  const int64_t most = batch.by_pixel ? kChannels : 1, count = static_cast<int64_t>(parts.size());
  std::vector<Pair<double>> sums(count * most);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sum(parts[i], sums.data() + i * most);
  });
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < parts[i].channels; ++c) merge(parts[i].t + c, parts[i].count, sums[i * most + c]);
  }
}

// The mean and variance of value(index) over each expert and channel. A part is summed twice, the second time about its
// own mean, and what parts have is merged as by Chan, Golub and LeVeque ("Updating Formulae and a Pairwise Algorithm
// for Computing Sample Variances", 1979).
//   mean, var: [E * C]
template <class A, class Value>
void moments(const Batch& batch, const Value& value, std::vector<double>& mean, std::vector<double>& var) {
  const auto sum = [&](const Part& part, Pair<double>* sums) {
    A centre[kChannels];
    sum_part<A>(batch, part, [&](int64_t, int64_t j) { return Pair<A>{value(j), A(0)}; }, sums);
    for (int64_t c = 0; c < part.channels; ++c) centre[c] = static_cast<A>(sums[c].first / part.count);
    const auto about_centre = [&](int64_t c, int64_t j) {
      const A distance = value(j) - centre[c];
      return Pair<A>{distance, distance * distance};
    };
    sum_part<A>(batch, part, about_centre, sums);
    for (int64_t c = 0; c < part.channels; ++c) {
      const double error = sums[c].first / part.count;  // of the centre, by rounding
      sums[c] = {centre[c] + error, sums[c].second - error * sums[c].first};
    }
  };
  std::vector<double> total(mean.size());
  for_each_part(batch, sum, [&](int64_t t, int64_t n, const Pair<double>& of_part) {
    const double distance = of_part.first - mean[t], before = total[t];
    total[t] += n;
    mean[t] += distance * n / total[t];
    var[t] += of_part.second + distance * distance * before * n / total[t];
  });
  for (size_t t = 0; t < var.size(); ++t) var[t] = var[t] < 0 ? 0 : var[t] / std::max(1.0, total[t]);
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
    if (training) moments<A>(batch, [src](int64_t j) { return static_cast<A>(src[j]); }, mean, var);
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
  std::vector<double> dbias(centre.size()), dweight(centre.size());
  dispatch_float(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T *g = data<T>(dense_grad), *src = data<T>(dense_x);
    const std::vector<A> near(centre.begin(), centre.end());
    const auto sum = [&](const Part& part, Pair<double>* sums) {
      const A* const m = near.data() + part.t;
      const auto value = [=](int64_t c, int64_t j) {
        const A grad = static_cast<A>(g[j]);
        return Pair<A>{grad, grad * (static_cast<A>(src[j]) - m[c])};
      };
      sum_part<A>(batch, part, value, sums);
    };
    for_each_part(batch, sum, [&](int64_t t, int64_t, const Pair<double>& of_part) {
      dbias[t] += of_part.first;
      dweight[t] += of_part.second;
    });
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
