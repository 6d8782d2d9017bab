// KL(softmax(clean) || softmax(adv)) of each row of logits on a GPU: one warp per row, in double like the CPU's.
#pragma once

#include <cmath>

#include "cuda/rows.cuh"

namespace moe {

// log(softmax) of one row, whose classes are shared among the lanes of a warp.
//   row: [classes]
template <class T>
struct LogSoftmax {
  const T* logits;
  double top, log_sum;

  __device__ __forceinline__ LogSoftmax(const T* row, int64_t classes) : logits(row), top(load_one(0)), log_sum(0) {
    const int lane = threadIdx.x % kWarp;
    for (int64_t c = lane; c < classes; c += kWarp) top = load_one(c) > top ? load_one(c) : top;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const double other = __shfl_xor_sync(kAllLanes, top, offset);
      top = other > top ? other : top;
    }
    double sum = 0;
    for (int64_t c = lane; c < classes; c += kWarp) sum += std::exp(load_one(c) - top);
    log_sum = std::log(warp_sum(sum));
  }

  __device__ __forceinline__ double load_one(int64_t c) const { return widen(logits[c]); }
  __device__ __forceinline__ double operator[](int64_t c) const { return load_one(c) - top - log_sum; }
};

// The clean distribution p and the adversarial distribution q of this warp's row, over `classes` classes.
template <class T>
struct Divergence {
  int64_t classes;
  LogSoftmax<T> log_p, log_q;

  __device__ __forceinline__ double p(int64_t c) const { return std::exp(log_p[c]); }
  __device__ __forceinline__ double q(int64_t c) const { return std::exp(log_q[c]); }
  __device__ __forceinline__ double ratio(int64_t c, double p) const { return p > 0 ? log_p[c] - log_q[c] : 0; }
  __device__ __forceinline__ double sum() const {
    double sum = 0;
    for (int64_t c = threadIdx.x % kWarp; c < classes; c += kWarp) {
      const double probability = p(c);
      sum += probability * ratio(c, probability);
    }
    return warp_sum(sum);
  }
};

// clean, adv: [rows, classes] -> out: [rows]
template <class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    kl_divergence_kernel(const T* clean, const T* adv, wide_t<T>* out, int64_t rows, int64_t classes) {
  const int64_t b = warp_row();
  if (b >= rows) return;
  const Divergence<T> row{classes, {clean + b * classes, classes}, {adv + b * classes, classes}};
  const double sum = row.sum();
  if (threadIdx.x % kWarp == 0) out[b] = static_cast<wide_t<T>>(sum);
}

// grad: [rows], clean, adv: [rows, classes] -> dclean, dadv: [rows, classes], each null where it is not needed
template <class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    kl_divergence_backward_kernel(const wide_t<T>* grad, const T* clean, const T* adv, T* dclean, T* dadv, int64_t rows,
                                  int64_t classes) {
  const int64_t b = warp_row();
  if (b >= rows) return;
  const Divergence<T> row{classes, {clean + b * classes, classes}, {adv + b * classes, classes}};
  const double divergence = dclean ? row.sum() : 0, g = grad[b];
  for (int64_t c = threadIdx.x % kWarp; c < classes; c += kWarp) {
    const double p = row.p(c);
    if (dclean) {
      dclean[b * classes + c] = narrow<T>(static_cast<wide_t<T>>(g * p * (row.ratio(c, p) - divergence)));
    }
    if (dadv) dadv[b * classes + c] = narrow<T>(static_cast<wide_t<T>>(g * (row.q(c) - p)));
  }
}

// clean, adv: [rows, classes] -> out: [rows]
template <class T>
void launch_kl_divergence(const T* clean, const T* adv, wide_t<T>* out, int64_t rows, int64_t classes,
                          cudaStream_t stream) {
  cuda_launch("kl_divergence", kl_divergence_kernel<T>, warp_row_blocks(rows), kRowThreads, stream, clean, adv, out,
              rows, classes);
}

// grad: [rows], clean, adv: [rows, classes] -> dclean, dadv: [rows, classes], each null where it is not needed
template <class T>
void launch_kl_divergence_backward(const wide_t<T>* grad, const T* clean, const T* adv, T* dclean, T* dadv,
                                   int64_t rows, int64_t classes, cudaStream_t stream) {
  cuda_launch("kl_divergence_backward", kl_divergence_backward_kernel<T>, warp_row_blocks(rows), kRowThreads, stream,
              grad, clean, adv, dclean, dadv, rows, classes);
}

}  // namespace moe
