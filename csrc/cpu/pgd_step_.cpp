// One step of projected gradient descent, in place: step, projection onto the eps-ball around x, bounds.
#include <cmath>
#include <limits>

#include "common/pgd_arguments.h"
#include "common/pgd_math.h"

namespace moe {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

// One sample of `size` elements, or a piece of one.
template <class T, class G>
struct Sample {
  T* x_adv;
  const G* grad;
  const T* x;
  int64_t size;
  T eps, alpha, low, high;
};

template <class T, class G>
void linf(Sample<T, G> s) {
#pragma omp simd
  for (int64_t i = 0; i < s.size; ++i) {
    s.x_adv[i] = linf_step(s.x_adv[i], acc_t<G>(s.grad[i]), s.x[i], s.eps, s.alpha, s.low, s.high);
  }
}

// Sums f(i) over the sample.
template <class F>
double sum(int64_t size, F f) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < size; ++i) total += f(i);
  return total;
}

// Michelot's active set: the tau with sum(max(|delta| - tau, 0)) = eps, or 0 inside the ball. The set only shrinks.
template <class F>
double l1_threshold(int64_t size, double eps, F delta) {
  double tau = 0, active = std::numeric_limits<double>::infinity();
  for (;;) {
    double count = 0, excess = -eps;
#pragma omp simd reduction(+ : count, excess)
    for (int64_t i = 0; i < size; ++i) {
      const double m = std::fabs(delta(i)) - tau;
      count += m > 0 ? 1. : 0.;
      excess += m > 0 ? m : 0.;
    }
    if (count == 0 || (tau == 0 && excess <= 0)) return tau;
    tau += excess / count;
    if (count >= active) return tau;
    active = count;
  }
}

template <class T, class G>
void l2_or_l1(Sample<T, G> s, bool l2) {
  const double norm = sum(s.size, [=](int64_t i) {
    const double g = static_cast<double>(acc_t<G>(s.grad[i])), m = l2 ? g * g : std::fabs(g);
    return m == m ? m : 0;
  });
  const double factor = step_factor(s.alpha, l2 ? std::sqrt(norm) : norm);
  auto delta = [=](int64_t i) { return stepped_delta(s.x_adv[i], acc_t<G>(s.grad[i]), s.x[i], factor); };
  double scale = 1, tau = 0;
  if (l2) {
    const double length = std::sqrt(sum(s.size, [=](int64_t i) { return delta(i) * delta(i); }));
    if (length > s.eps) scale = s.eps / length;
  } else {
    tau = l1_threshold(s.size, s.eps, delta);
  }
#pragma omp simd
  for (int64_t i = 0; i < s.size; ++i) {
    s.x_adv[i] = perturbed(s.x[i], static_cast<T>(scale * shrink(delta(i), tau)), s.low, s.high);
  }
}

template <class T, class G>
void run(const PgdArguments& a) {
  T* x_adv = mutable_data<T>(a.x_adv);
  const G* grad = data<G>(a.grad);
  const T *x = data<T>(a.x), *eps = data<T>(a.eps), *alpha = data<T>(a.alpha);
  const bool many_eps = a.eps.numel() > 1, many_alpha = a.alpha.numel() > 1;
  // The elements [first, last) of sample b.
  auto sample = [&](int64_t b, int64_t first, int64_t last) {
    const int64_t at = b * a.size + first;
    return Sample<T, G>{x_adv + at,
                        grad + at,
                        x + at,
                        last - first,
                        eps[many_eps * b],
                        alpha[many_alpha * b],
                        static_cast<T>(a.low),
                        static_cast<T>(a.high)};
  };
  if (a.norm == Norm::Linf) {
    torch::stable::parallel_for(0, a.batch * a.size, kGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last;) {
        const int64_t b = i / a.size, begin = i % a.size, end = std::min(a.size, begin + last - i);
        linf(sample(b, begin, end));
        i += end - begin;
      }
    });
  } else {
    torch::stable::parallel_for(0, a.batch, std::max<int64_t>(1, kGrain / a.size), [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) l2_or_l1(sample(b, 0, a.size), a.norm == Norm::L2);
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
