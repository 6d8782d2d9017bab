// One step of projected gradient descent, in place: step, projection onto the eps-ball around x, bounds.
#include "common/pgd_arguments.h"
#include "common/pgd_math.h"

namespace moe {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

// The elements of one sample, or of a piece of one.
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

template <class T, class G>
void run(const PgdArguments& a) {
  T* x_adv = mutable_data<T>(a.x_adv);
  const G* grad = data<G>(a.grad);
  const T *x = data<T>(a.x), *eps = data<T>(a.eps), *alpha = data<T>(a.alpha);
  const bool many_eps = a.eps.numel() > 1, many_alpha = a.alpha.numel() > 1;
  const T low = static_cast<T>(a.low), high = static_cast<T>(a.high);
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
        i += end - begin;
      }
    });
  } else {
    torch::stable::parallel_for(0, a.batch, std::max<int64_t>(1, kGrain / a.size), [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        Loop<T, G> sample = piece(b, 0, a.size);
        sample_step(sample, a.norm, eps[many_eps * b], alpha[many_alpha * b], low, high);
      }
    });
  }
}

template <class T>
void check_not_negative(const char* name, const Tensor& t) {
  for (int64_t i = 0; i < t.numel(); ++i) {
    MOE_CHECK(data<T>(t)[i] >= 0, name, " must be at least 0, got ", data<T>(t)[i]);
  }
}

// x_adv, grad, x [B, ...], eps, alpha [1] or [B]
void pgd_step_(Tensor x_adv, const Tensor& grad, const Tensor& x, const Tensor& eps, const Tensor& alpha,
               const std::string& norm, const std::vector<double>& bounds) {
  const PgdArguments arguments(x_adv, grad, x, eps, alpha, norm, bounds);
  auto with = [&](auto zero) {
    using T = decltype(zero);
    check_not_negative<T>("eps", arguments.eps);
    check_not_negative<T>("alpha", arguments.alpha);
    if (x_adv.numel() == 0) return;
    dispatch_float(grad.scalar_type(), "grad", [&](auto g) { run<T, decltype(g)>(arguments); });
  };
  x_adv.scalar_type() == ScalarType::Double ? with(double{}) : with(float{});
  arguments.write_back(x_adv);
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("pgd_step_", TORCH_BOX(&moe::pgd_step_)); }
