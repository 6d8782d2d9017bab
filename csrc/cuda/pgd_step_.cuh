// pgd_step_ on a GPU. Linf is computed by element; L2 and L1 by one block per sample, which reads the sample several
// times, out of the caches if it fits.
#pragma once

#include "common/pgd_math.h"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"

namespace moe {

// x_adv, grad, x: [batch, size]; eps, alpha: [1] with stride 0, or [batch] with stride 1
template <class T, class G>
struct PgdBatch {
  T* x_adv;
  const G* grad;
  const T *x, *eps, *alpha;
  int64_t batch, size;
  int eps_stride, alpha_stride;
  T low, high;
  ModelInput<T, G> model_input;
};

// Writes the model input of the V elements from element i of the batch on, which may be in several channels.
template <class T, class G, int V>
__device__ __forceinline__ void normalize(const ModelInput<T, G>& m, const Pack<T, V>& x_adv, int64_t i) {
  const int64_t row = i / m.inner;
  int64_t channel = row % m.channels, left = (row + 1) * m.inner - i;
  Pack<G, V> out;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    out.at[k] = narrow<G>(static_cast<wide_t<G>>((x_adv.at[k] - m.mean[channel]) / m.std[channel]));
    if (--left == 0) channel = channel + 1 == m.channels ? 0 : channel + 1, left = m.inner;
  }
  store(m.to + i, out);
}

// The loop of one block over elements [begin, end) of the batch, in packs of V; the Loop of sample_step. A thread's
// packs are `stride` packs apart. Without may_emit no code for a model input is compiled.
//   partial: [32], shared memory, for sums
template <class T, class G, int V, bool may_emit>
struct PackLoop {
  PgdBatch<T, G> p;
  int64_t begin, end;
  int stride;
  double (*partial)[kWarp];

  // Calls f(x_adv, grad, x, index) for each of this thread's packs, at the end for single elements as packs of one.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    for (int64_t i = begin + int64_t{threadIdx.x} * V; i < end; i += int64_t{stride} * V) {
      if (i + V <= end) {
        const auto a = load<V>(p.x_adv + i);
        const auto g = load<V>(p.grad + i);
        const auto x = load<V>(p.x + i);
        f(a, g, x, i);
      } else {
#pragma unroll 1  // at most V - 1 elements: not worth the code
        for (int64_t j = i; j < end; ++j) f(Pack<T, 1>{p.x_adv[j]}, Pack<G, 1>{p.grad[j]}, Pack<T, 1>{p.x[j]}, j);
      }
    }
  }

  template <class F>
  __device__ __forceinline__ Sums sum(F f) const {
    Sums total{0, 0};
    each([&](const auto& a, const auto& g, const auto& x, int64_t) {
      for (size_t k = 0; k < sizeof(a) / sizeof(T); ++k) {
        const Sums term = f(a.at[k], widen(g.at[k]), x.at[k]);
        total.first += term.first;
        total.second += term.second;
      }
    });
    return {block_sum(total.first, *partial), block_sum(total.second, *partial)};
  }

  template <class F>
  __device__ __forceinline__ void update(F f) const {
    each([&](auto a, const auto& g, const auto& x, int64_t i) {
      for (size_t k = 0; k < sizeof(a) / sizeof(T); ++k) a.at[k] = f(a.at[k], widen(g.at[k]), x.at[k]);
      store(p.x_adv + i, a);
      if (may_emit && p.model_input.to) normalize(p.model_input, a, i);
    });
  }
};

constexpr int kLinfThreads = 256;  // of a block; not measured

// An Linf step, one pack per thread: block b has chunk b % chunks of sample b / chunks. Compiled both with a model
// input and without, since its indices take so many registers that a quarter fewer warps fit (`make gpu-static`).
template <class T, class G, int V, bool may_emit>
__global__ void __launch_bounds__(kLinfThreads) pgd_linf_kernel(PgdBatch<T, G> p, unsigned chunks) {
  const int64_t sample = blockIdx.x / chunks, chunk = blockIdx.x % chunks, width = kLinfThreads * V;
  const int64_t begin = sample * p.size + chunk * width, last = (sample + 1) * p.size;
  const T eps = p.eps[sample * p.eps_stride], alpha = p.alpha[sample * p.alpha_stride];
  const PackLoop<T, G, V, may_emit> loop{p, begin, begin + width < last ? begin + width : last, kLinfThreads, nullptr};
  loop.update([=](T a, auto g, T x) { return linf_step(a, g, x, eps, alpha, p.low, p.high); });
}

// Threads of a block for samples of at least four packs per thread, else 256. Not measured.
constexpr int kMaxThreads = 512;

// An L2 or L1 step, one block per sample.
template <class T, class G, int V>
__global__ void __launch_bounds__(kMaxThreads, 2) pgd_sample_kernel(PgdBatch<T, G> p, Norm norm) {
  __shared__ double partial[kWarp];
  const int64_t sample = blockIdx.x, begin = sample * p.size;
  const PackLoop<T, G, V, true> loop{p, begin, begin + p.size, static_cast<int>(blockDim.x), &partial};
  sample_step(loop, norm, p.eps[sample * p.eps_stride], p.alpha[sample * p.alpha_stride], p.low, p.high);
}

// A step in packs of V elements, to which every array must be aligned.
template <class T, class G, int V>
void launch_pgd_step(PgdBatch<T, G> p, Norm norm, cudaStream_t stream) {
  if (norm == Norm::Linf) {
    const int64_t width = kLinfThreads * V, chunks = (p.size + width - 1) / width;
    const auto kernel = p.model_input.to ? pgd_linf_kernel<T, G, V, true> : pgd_linf_kernel<T, G, V, false>;
    cuda_launch("pgd_step_", kernel, p.batch * chunks, kLinfThreads, stream, p, static_cast<unsigned>(chunks));
  } else {
    const int threads = p.size / V >= 4 * kMaxThreads ? kMaxThreads : 256;
    cuda_launch("pgd_step_", pgd_sample_kernel<T, G, V>, p.batch, threads, stream, p, norm);
  }
}

// A step of a batch whose arrays are as above, aligned in any way.
template <class T, class G>
void launch_pgd_step(PgdBatch<T, G> p, Norm norm, cudaStream_t stream) {
  constexpr int V = kPack<T>;
  if (norm == Norm::Linf && p.eps_stride == 0 && p.alpha_stride == 0) p.size *= p.batch, p.batch = 1;
  const bool aligned = is_aligned<T, V>(p.x_adv) && is_aligned<G, V>(p.grad) && is_aligned<T, V>(p.x) &&
                       is_aligned<G, V>(p.model_input.to);
  if (aligned && (p.batch == 1 || p.size % V == 0)) {
    launch_pgd_step<T, G, V>(p, norm, stream);
  } else {
    launch_pgd_step<T, G, 1>(p, norm, stream);
  }
}

}  // namespace moe
