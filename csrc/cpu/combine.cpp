// Weighted sums of each row's k slots, and the two adjoints. Every sum has one order for any number of threads.
#include "common/combine_arguments.h"

namespace moe {
namespace {

// Columns that are summed at a time, in accumulators that stay in L1. 64 and 1024 take 1.20 and 0.87 of the time
// (tuned-constants.md).
constexpr int64_t kColumns = 256;
// Products summed before they join the total, so that rounding errors grow with n / 64. 16 and 256 take 2.54 and 0.64
// of the time (tuned-constants.md).
constexpr int64_t kSummands = 64;

// The position as a contiguous tensor, after a check that it holds each of the slots once.
//   position: int32 [T, k] with T * k = slots; returns the same numbers
Tensor read_position(const Tensor& position, int64_t slots) {
  const Tensor dense = dense_position(position, slots);
  const int32_t* place = data<int32_t>(dense);
  std::vector<char> seen(slots);
  for (int64_t j = 0; j < slots; ++j) {
    MOE_CHECK(place[j] >= 0 && place[j] < slots && !std::exchange(seen[place[j]], 1),
              "position must hold each of 0 to ", slots - 1, " once, got ", place[j], " at slot ", j);
  }
  return dense;
}

// out[t] = sum over i of weights[t, i] y[position[t, i]].
//   y: [T * k, ...], weights: [T, k], position: int32 [T, k]; returns [T, ...]
Tensor combine(const Tensor& y, const Tensor& weights, const Tensor& position) {
  const int64_t rows = position.size(0), k = position.size(1), width = row_width(y);
  const Tensor place = read_position(position, y.size(0)), dense = as_contiguous(y), scale = dense_weights(weights, y);
  Tensor out = new_tensor(y, with_rows(y, rows));
  dispatch_float(y.scalar_type(), "y", [&](auto zero) {
    using T = decltype(zero);
    const T* src = data<T>(dense);
    const acc_t<T>* w = data<acc_t<T>>(scale);
    const int32_t* p = data<int32_t>(place);
    T* dst = mutable_data<T>(out);
    torch::stable::parallel_for(0, rows, grain(k * width), [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        for (int64_t c0 = 0; c0 < width; c0 += kColumns) {
          const int64_t n = std::min(kColumns, width - c0);
          acc_t<T> sum[kColumns] = {};
          for (int64_t slot = t * k; slot < (t + 1) * k; ++slot) {
            const T* row = src + p[slot] * width + c0;
            for (int64_t c = 0; c < n; ++c) sum[c] += w[slot] * static_cast<acc_t<T>>(row[c]);
          }
          for (int64_t c = 0; c < n; ++c) dst[t * width + c0 + c] = static_cast<T>(sum[c]);
        }
      }
    });
  });
  return out;
}

// The gradient of y: dy[position[t, i]] = weights[t, i] grad[t].
//   grad: [T, ...], weights: [T, k], position: int32 [T, k]; returns [T * k, ...]
Tensor combine_input_grad(const Tensor& grad, const Tensor& weights, const Tensor& position) {
  const int64_t rows = position.size(0), k = position.size(1), width = row_width(grad);
  const Tensor place = read_position(position, rows * k), dense = as_contiguous(grad),
               scale = dense_weights(weights, grad);
  Tensor out = new_tensor(grad, with_rows(grad, rows * k));
  dispatch_float(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    const T* src = data<T>(dense);
    const acc_t<T>* w = data<acc_t<T>>(scale);
    const int32_t* p = data<int32_t>(place);
    T* dst = mutable_data<T>(out);
    torch::stable::parallel_for(0, rows * k, grain(width), [&](int64_t first, int64_t last) {
      for (int64_t slot = first; slot < last; ++slot) {
        const T* from = src + slot / k * width;
        T* to = dst + p[slot] * width;
        for (int64_t c = 0; c < width; ++c) to[c] = static_cast<T>(w[slot] * static_cast<acc_t<T>>(from[c]));
      }
    });
  });
  return out;
}

// The gradient of the weights: dweights[t, i] = <grad[t], y[position[t, i]]>.
//   grad: [T, ...], y: [T * k, ...], position: int32 [T, k]; returns [T, k]
Tensor combine_weight_grad(const Tensor& grad, const Tensor& y, const Tensor& position) {
  const int64_t rows = position.size(0), k = position.size(1), width = row_width(y);
  check_weight_grad(grad, y);
  const Tensor place = read_position(position, y.size(0)), dense = as_contiguous(y), dense_grad = as_contiguous(grad);
  Tensor out = new_tensor(y, {rows, k}, accumulate_type(y.scalar_type()));
  dispatch_float(y.scalar_type(), "y", [&](auto zero) {
    using T = decltype(zero);
    const T *g = data<T>(dense_grad), *src = data<T>(dense);
    const int32_t* p = data<int32_t>(place);
    acc_t<T>* dst = mutable_data<acc_t<T>>(out);
    torch::stable::parallel_for(0, rows * k, grain(width), [&](int64_t first, int64_t last) {
      for (int64_t slot = first; slot < last; ++slot) {
        const T *a = g + slot / k * width, *b = src + p[slot] * width;
        acc_t<T> sum = 0;
        for (int64_t c0 = 0; c0 < width; c0 += kSummands) {
          acc_t<T> part = 0;
#pragma omp simd reduction(+ : part)
          for (int64_t c = c0; c < std::min(c0 + kSummands, width); ++c) {
            part += static_cast<acc_t<T>>(a[c]) * static_cast<acc_t<T>>(b[c]);
          }
          sum += part;
        }
        dst[slot] = sum;
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("combine", TORCH_BOX(&moe::combine));
  m.impl("combine_input_grad", TORCH_BOX(&moe::combine_input_grad));
  m.impl("combine_weight_grad", TORCH_BOX(&moe::combine_weight_grad));
}
