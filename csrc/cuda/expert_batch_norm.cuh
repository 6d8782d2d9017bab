// Batch normalisation with statistics per expert on a GPU. The sums of norm_sums.cuh become coefficients for each
// expert and channel, which a last pass applies to every element.
#pragma once

#include <cmath>

#include "cuda/norm_sums.cuh"

namespace moe {

// What the elements of one expert and channel are computed with: forward y = (x - centre) * scale + shift, backward
// dx = scale * (grad - shift - (x - centre) * slope).
template <class A>
struct alignas(16) NormCoefficients {
  A scale, centre, shift, slope;
};

// The statistics, from partial sums or, where partial is null, those given, and the coefficients of
// y = (x - mean) * weight / sqrt(var + eps) + bias.
//   partial: [norm_partial_rows, channels], or null; given_mean, given_var, weight, bias: [experts, channels], or null
//   -> mean, var, coefficients: [experts, channels]
template <class A>
__global__ void __launch_bounds__(kNormThreads)
    norm_statistics_kernel(NormBatch b, NormTiles tiles, const Pair* partial, const A* given_mean, const A* given_var,
                           const A* weight, const A* bias, double eps, A* mean, A* var,
                           NormCoefficients<A>* coefficients) {
  __shared__ Pair shared[kNormThreads];
  const MergePlace at(b);
  double centre = 0, variance = 0;
  if (partial) {
    const double n = std::fmax(1.0, static_cast<double>(b.values(at.e)));
    const auto sum = [](const Pair& p, double) { return p; };
    centre = merged(b, tiles, partial, at.e, at.channel, shared, sum).first[0] / n;
    const auto squares = [=](const Pair& p, double count) {
      const double distance = p.first[0] / count - centre;
      return Pair{{0}, {p.second[0] + count * distance * distance}};
    };
    variance = std::fmax(0.0, merged(b, tiles, partial, at.e, at.channel, shared, squares).second[0] / n);
  }
  if (!at.writes) return;
  if (!partial) centre = given_mean[at.index], variance = given_var[at.index];
  mean[at.index] = static_cast<A>(centre);
  var[at.index] = static_cast<A>(variance);
  const double scale = (weight ? weight[at.index] : A(1)) / std::sqrt(variance + eps);
  coefficients[at.index] = {static_cast<A>(scale), static_cast<A>(centre), bias ? bias[at.index] : A(0), A(0)};
}

// The gradients of bias and weight.
//   partial: [norm_partial_rows, channels], var: [experts, channels] -> dbias, dweight: [experts, channels]
template <class A>
__global__ void __launch_bounds__(kNormThreads)
    norm_param_grad_kernel(NormBatch b, NormTiles tiles, const Pair* partial, const A* var, double eps, A* dbias,
                           A* dweight) {
  __shared__ Pair shared[kNormThreads];
  const MergePlace at(b);
  const auto sum = [](const Pair& p, double) { return p; };
  const Pair total = merged(b, tiles, partial, at.e, at.channel, shared, sum);
  if (!at.writes) return;
  dbias[at.index] = static_cast<A>(total.first[0]);
  dweight[at.index] = static_cast<A>(total.second[0] / std::sqrt(var[at.index] + eps));
}

// The coefficients of dx = weight / sqrt(var + eps) * (grad - dbias / n - (x - mean) / sqrt(var + eps) * dweight / n),
// where a channel has n values; where the statistics are constants, and mean, dbias and dweight null, those of
// dx = weight / sqrt(var + eps) * grad.
//   var: [experts, channels], weight, mean, dbias, dweight: the same, or null -> coefficients: [experts, channels]
template <class A>
__global__ void __launch_bounds__(kNormThreads)
    norm_input_grad_coefficients_kernel(NormBatch b, const A* weight, const A* mean, const A* var, const A* dbias,
                                        const A* dweight, double eps, NormCoefficients<A>* coefficients) {
  const int64_t i = int64_t{blockIdx.x} * kNormThreads + threadIdx.x;
  if (i >= b.experts * b.channels) return;
  const double inverse = 1 / std::sqrt(var[i] + eps), n = std::fmax(1.0, static_cast<double>(b.values(i / b.channels)));
  NormCoefficients<A> c{static_cast<A>((weight ? weight[i] : A(1)) * inverse), A(0), A(0), A(0)};
  if (mean) {
    c.centre = mean[i];
    c.shift = static_cast<A>(dbias[i] / n);
    c.slope = static_cast<A>(inverse * dweight[i] / n);
  }
  coefficients[i] = c;
}

// Computes every element with its expert's and channel's coefficients. Forward in is x; backward it is grad, and x is
// null for constant statistics.
//   in, x: [images, channels, pixels] in the batch's layout, coefficients: [experts, channels] -> out: like in
template <class T, int V, bool by_pixel, bool forward>
__global__ void __launch_bounds__(kRowThreads)
    norm_apply_kernel(NormBatch b, const T* in, const T* x, const NormCoefficients<wide_t<T>>* coefficients, T* out,
                      RowTiles tiles) {
  using A = wide_t<T>;
  const int64_t run = tiles.row(), column = tiles.pack() * V, row = by_pixel ? run : run / b.channels;
  if (row >= b.rows() || column >= b.run()) return;
  const int64_t e = expert_of(row, b.offsets, b.experts, b.rows_per_image()), start = run * b.run() + column;
  coefficients += e * b.channels + (by_pixel ? column : run % b.channels);
  const auto pack = load<V>(in + start);
  Pack<T, V> other = {}, result;
  if (!forward && x) other = load<V>(x + start);
  NormCoefficients<A> c = coefficients[0];
  for (int v = 0; v < V; ++v) {
    if (by_pixel && v > 0) c = coefficients[v];
    const A value = widen(pack.at[v]), centred = (forward ? value : widen(other.at[v])) - c.centre;
    result.at[v] = narrow<T>(forward ? centred * c.scale + c.shift
                             : x     ? c.scale * (value - c.shift - centred * c.slope)
                                     : c.scale * value);
  }
  store(out + start, result);
}

// Calls f(elements of an access, by_pixel) with both as constants.
template <class T, class F>
void with_layout(const NormBatch& b, bool aligned, F f) {
  const auto with_pack = [&](auto pack) { b.by_pixel ? f(pack, std::true_type()) : f(pack, std::false_type()); };
  aligned&& b.run() % kPack<T> == 0 ? with_pack(std::integral_constant<int, kPack<T>>())
                                    : with_pack(std::integral_constant<int, 1>());
}

// in, x: [images, channels, pixels], coefficients: [experts, channels] -> out: like in; x may be null backward
template <class T, bool forward>
void launch_norm_apply(NormBatch b, const T* in, const T* x, const NormCoefficients<wide_t<T>>* coefficients, T* out,
                       cudaStream_t stream) {
  constexpr int kWide = kPack<T>;
  const bool aligned = is_aligned<T, kWide>(in) && is_aligned<T, kWide>(x) && is_aligned<T, kWide>(out);
  with_layout<T>(b, aligned, [&](auto pack, auto by_pixel) {
    constexpr int V = decltype(pack)::value;
    const RowTiles tiles(b.rows() * (by_pixel ? 1 : b.channels), b.run() / V);
    cuda_launch("expert_batch_norm", norm_apply_kernel<T, V, by_pixel, forward>, tiles.blocks, kRowThreads, stream, b,
                in, x, coefficients, out, tiles);
  });
}

// The forward, with the batch's statistics or, where partial is null, with those given.
//   x: [images, channels, pixels]; weight, bias, given_mean, given_var: [experts, channels], or null
//   partial: [norm_partial_rows, channels] and coefficients: [experts, channels], scratch
//   -> y: like x, mean, var: [experts, channels]
template <class T>
void launch_norm_forward(NormBatch b, const T* x, const wide_t<T>* weight, const wide_t<T>* bias,
                         const wide_t<T>* given_mean, const wide_t<T>* given_var, double eps, Pair* partial,
                         NormCoefficients<wide_t<T>>* coefficients, T* y, wide_t<T>* mean, wide_t<T>* var,
                         cudaStream_t stream) {
  with_layout<T>(b, is_aligned<T, kPack<T>>(x), [&](auto pack, auto by_pixel) {
    constexpr int V = decltype(pack)::value;
    const NormTiles tiles(b, V);
    if (partial) {
      cuda_launch("expert_batch_norm", norm_moments_kernel<T, V, by_pixel>, tiles.count * tiles.chunks, kNormThreads,
                  stream, b, tiles, x, partial);
    }
    cuda_launch("expert_batch_norm", norm_statistics_kernel<wide_t<T>>, b.experts * merge_chunks(b), kNormThreads,
                stream, b, tiles, partial, given_mean, given_var, weight, bias, eps, mean, var, coefficients);
  });
  launch_norm_apply<T, true>(b, x, x, coefficients, y, stream);
}

// The gradients of bias and weight.
//   grad, x: [images, channels, pixels], mean, var: [experts, channels], partial: [norm_partial_rows, channels],
//   scratch
//   -> dbias, dweight: [experts, channels]
template <class T>
void launch_norm_param_grad(NormBatch b, const T* grad, const T* x, const wide_t<T>* mean, const wide_t<T>* var,
                            double eps, Pair* partial, wide_t<T>* dbias, wide_t<T>* dweight, cudaStream_t stream) {
  with_layout<T>(b, is_aligned<T, kPack<T>>(grad) && is_aligned<T, kPack<T>>(x), [&](auto pack, auto by_pixel) {
    constexpr int V = decltype(pack)::value;
    const NormTiles tiles(b, V);
    cuda_launch("expert_batch_norm", norm_products_kernel<T, V, by_pixel>, tiles.count * tiles.chunks, kNormThreads,
                stream, b, tiles, grad, x, mean, partial);
    cuda_launch("expert_batch_norm", norm_param_grad_kernel<wide_t<T>>, b.experts * merge_chunks(b), kNormThreads,
                stream, b, tiles, partial, var, eps, dbias, dweight);
  });
}

// The gradient of x. Where the statistics are constants, x, mean, dbias and dweight are null; weight may always be.
//   grad, x: [images, channels, pixels]; weight, mean, var, dbias, dweight: [experts, channels]
//   coefficients: [experts, channels], scratch -> dx: like grad
template <class T>
void launch_norm_input_grad(NormBatch b, const T* grad, const T* x, const wide_t<T>* weight, const wide_t<T>* mean,
                            const wide_t<T>* var, const wide_t<T>* dbias, const wide_t<T>* dweight, double eps,
                            NormCoefficients<wide_t<T>>* coefficients, T* dx, cudaStream_t stream) {
  cuda_launch("expert_batch_norm", norm_input_grad_coefficients_kernel<wide_t<T>>,
              (b.experts * b.channels + kNormThreads - 1) / kNormThreads, kNormThreads, stream, b, weight, mean, var,
              dbias, dweight, eps, coefficients);
  launch_norm_apply<T, false>(b, grad, x, coefficients, dx, stream);
}

}  // namespace moe
