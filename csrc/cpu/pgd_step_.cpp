// One step of projected gradient descent, in place: the step, the projection onto the eps-ball around x, the bounds.
#include "common/pgd_arguments.h"
#include "common/pgd_math.h"

namespace moe {
namespace {

// Fewest elements of a task. For 98304 elements 2^12 and 2^18 take 0.96 and 1.51 of the time where threads spin between
// calls, 1.00 and 0.38 where they sleep (tuned-constants.md).
constexpr int64_t kGrain = 1 << 15;

// The elements of one sample, or some neighbouring ones of them; the Loop of sample_step.
//   x_adv, grad, x: [size]
template <class T, class G>
struct Loop {
  T* x_adv;
  const G* grad;
  const T* x;
  int64_t size;

  template <class F>
  Sums sum(F f) const {
    const Loop s = *this;
    double first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
    for (int64_t i = 0; i < s.size; ++i) {
      const Sums term = f(s.x_adv[i], acc_t<G>(s.grad[i]), s.x[i]);
      first += term.first;
      second += term.second;
    }
    return {first, second};
  }

  template <class F>
  void update(F f) {
    const Loop s = *this;
#pragma omp simd
    for (int64_t i = 0; i < s.size; ++i) s.x_adv[i] = f(s.x_adv[i], acc_t<G>(s.grad[i]), s.x[i]);
  }
};

// Writes the model input of elements [first, last) of the batch, one channel's neighbouring elements after the other's.
//   x_adv: [batch * size]
template <class T, class G>
void normalize(const ModelInput<T, G>& m, const T* x_adv, int64_t first, int64_t last) {
  int64_t c = first / m.inner % m.channels, end = (first / m.inner + 1) * m.inner;
  for (int64_t i = first; i < last; end += m.inner, c = c + 1 == m.channels ? 0 : c + 1) {
    const T mean = m.mean[c], std = m.std[c];
    const int64_t stop = std::min(end, last);
    G* to = m.to;
#pragma omp simd
    for (int64_t j = i; j < stop; ++j) store(to[j], static_cast<acc_t<G>>((x_adv[j] - mean) / std));
    i = stop;
  }
}

// One step of all samples: Linf element by element, shared among threads; L2 and L1 a sample at a time.
template <class T, class G>
void run(const PgdArguments& a) {
  T* x_adv = mutable_data<T>(a.x_adv);
  const G* grad = data<G>(a.grad);
  const T *x = data<T>(a.x), *eps = data<T>(a.eps), *alpha = data<T>(a.alpha);
  const bool many_eps = a.eps.numel() > 1, many_alpha = a.alpha.numel() > 1;
  const T low = static_cast<T>(a.low), high = static_cast<T>(a.high);
  const ModelInput<T, G> model_input = a.normalized<T, G>();
  auto emit = [&](int64_t first, int64_t last) {
    if (model_input.to) normalize(model_input, x_adv, first, last);
  };
  // The elements [first, last) of sample b.
  auto piece = [&](int64_t b, int64_t first, int64_t last) {
    const int64_t at = b * a.size + first;
    return Loop<T, G>{x_adv + at, grad + at, x + at, last - first};
  };
  if (a.norm == Norm::Linf) {
    torch::stable::parallel_for(0, a.batch * a.size, kGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last;) {
        const int64_t b = i / a.size, begin = i % a.size, end = std::min(a.size, begin + last - i);
        const T radius = eps[many_eps * b], step = alpha[many_alpha * b];
        piece(b, begin, end).update([=](T old, acc_t<G> g, T clean) {
          return linf_step(old, g, clean, radius, step, low, high);
        });
        emit(i, i + end - begin);
        i += end - begin;
      }
    });
  } else {
    torch::stable::parallel_for(0, a.batch, std::max<int64_t>(1, kGrain / a.size), [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        Loop<T, G> sample = piece(b, 0, a.size);
        sample_step(sample, a.norm, eps[many_eps * b], alpha[many_alpha * b], low, high);
        emit(b * a.size, (b + 1) * a.size);
      }
    });
  }
}

// t: any number of elements, contiguous
template <class T>
void check_not_negative(const char* name, const Tensor& t) {
  for (int64_t i = 0; i < t.numel(); ++i) {
    MOE_CHECK(data<T>(t)[i] >= 0, name, " must be at least 0, got ", data<T>(t)[i]);
  }
}

// x_adv: [B, ...], the user's tensor, which receives the result
void step(const PgdArguments& a, Tensor& x_adv) {
  auto with = [&](auto zero) {
    using T = decltype(zero);
    check_not_negative<T>("eps", a.eps);
    check_not_negative<T>("alpha", a.alpha);
    for (int64_t c = 0; a.std && c < a.std->numel(); ++c) {
      MOE_CHECK(data<T>(*a.std)[c] > 0, "std must be greater than 0, got ", data<T>(*a.std)[c]);
    }
    if (x_adv.numel() == 0) return;
    dispatch_float(a.grad.scalar_type(), "grad", [&](auto g) { run<T, decltype(g)>(a); });
  };
  x_adv.scalar_type() == ScalarType::Double ? with(double{}) : with(float{});
  a.write_back(x_adv);
}

// x_adv, grad, x: [B, ...], eps, alpha: [1] or [B], bounds: (low, high)
void pgd_step_(Tensor x_adv, const Tensor& grad, const Tensor& x, const Tensor& eps, const Tensor& alpha,
               const std::string& norm, const std::vector<double>& bounds) {
  step(PgdArguments(x_adv, grad, x, eps, alpha, norm, bounds), x_adv);
}

// The same step; also returns the model's next input (x_adv - mean) / std, of the shape of x_adv in the dtype of grad.
//   x_adv, grad, x: [B, C, ...], eps, alpha: [1] or [B], bounds: (low, high), mean, std: [C]
Tensor pgd_step_normalized_(Tensor x_adv, const Tensor& grad, const Tensor& x, const Tensor& eps, const Tensor& alpha,
                            const std::string& norm, const std::vector<double>& bounds, const Tensor& mean,
                            const Tensor& std) {
  const PgdArguments arguments(x_adv, grad, x, eps, alpha, norm, bounds, mean, std);
  step(arguments, x_adv);
  return *arguments.model_input;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("pgd_step_", TORCH_BOX(&moe::pgd_step_));
  m.impl("pgd_step_normalized_", TORCH_BOX(&moe::pgd_step_normalized_));
}
