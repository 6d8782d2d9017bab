// KL(softmax(clean) || softmax(adv)) of each row of logits, computed from logarithms of the probabilities.
#include <cmath>

#include "common/kl_arguments.h"

namespace moe {
namespace {

// Fewest logits of a task. For 25600 logits 512 and 32768 take 1.00 and 1.97 of the time (tuned-constants.md).
constexpr int64_t kGrain = 1 << 12;

// log(softmax) of one row. In double, since differences of logarithms cancel, and since short rows make that cheap.
//   row: [classes]
template <class T>
struct LogSoftmax {
  const T* logits;
  double top, log_sum;

  LogSoftmax(const T* row, int64_t classes) : logits(row), top(load(row[0])), log_sum(0) {
    for (int64_t c = 1; c < classes; ++c) top = std::max(top, load(row[c]));
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += std::exp(load(row[c]) - top);
    log_sum = std::log(sum);
  }

  static double load(T logit) { return static_cast<double>(static_cast<acc_t<T>>(logit)); }
  double operator[](int64_t c) const { return load(logits[c]) - top - log_sum; }
};

// The clean distribution p and the adversarial distribution q of one sample, over `classes` classes.
template <class T>
struct Row {
  int64_t classes;
  LogSoftmax<T> log_p, log_q;

  double p(int64_t c) const { return std::exp(log_p[c]); }
  double q(int64_t c) const { return std::exp(log_q[c]); }
  double ratio(int64_t c) const { return p(c) > 0 ? log_p[c] - log_q[c] : 0; }
  double divergence() const {
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += p(c) * ratio(c);
    return sum;
  }
};

// Calls f(b, Row) for every row b of the batch.
//   clean, adv: [B, C], contiguous
template <class T, class F>
void for_each_row(const Tensor& clean, const Tensor& adv, F&& f) {
  const int64_t classes = clean.size(1);
  const T *p = data<T>(clean), *q = data<T>(adv);
  torch::stable::parallel_for(0, clean.size(0), std::max<int64_t>(1, kGrain / classes),
                              [&](int64_t first, int64_t last) {
                                for (int64_t b = first; b < last; ++b) {
                                  f(b, Row<T>{classes, {p + b * classes, classes}, {q + b * classes, classes}});
                                }
                              });
}

// clean_logits, adv_logits: [B, C]; returns [B]
Tensor kl_divergence(const Tensor& clean_logits, const Tensor& adv_logits) {
  check_logits(clean_logits, adv_logits);
  const Tensor clean = as_contiguous(clean_logits), adv = as_contiguous(adv_logits);
  Tensor out = new_tensor(clean, {clean.size(0)}, accumulate_type(clean.scalar_type()));
  dispatch_float(clean.scalar_type(), "clean_logits", [&](auto zero) {
    using T = decltype(zero);
    auto* dst = mutable_data<acc_t<T>>(out);
    for_each_row<T>(clean, adv,
                    [&](int64_t b, const Row<T>& row) { dst[b] = static_cast<acc_t<T>>(row.divergence()); });
  });
  return out;
}

// grad: [B], clean_logits, adv_logits: [B, C]; returns their gradients [B, C], each [0] where it is not needed
std::tuple<Tensor, Tensor> kl_divergence_backward(const Tensor& grad, const Tensor& clean_logits,
                                                  const Tensor& adv_logits, bool clean_needs, bool adv_needs) {
  check_logits(clean_logits, adv_logits);
  check_divergence_grad(grad, clean_logits);
  const Tensor clean = as_contiguous(clean_logits), adv = as_contiguous(adv_logits), dense_grad = as_contiguous(grad);
  Tensor dclean = new_tensor(clean, clean_needs ? shape(clean) : Shape{0});
  Tensor dadv = new_tensor(adv, adv_needs ? shape(adv) : Shape{0});
  dispatch_float(clean.scalar_type(), "clean_logits", [&](auto zero) {
    using T = decltype(zero);
    const auto* g = data<acc_t<T>>(dense_grad);
    T *dp = mutable_data<T>(dclean), *dq = mutable_data<T>(dadv);
    for_each_row<T>(clean, adv, [&](int64_t b, const Row<T>& row) {
      const double divergence = clean_needs ? row.divergence() : 0;
      for (int64_t c = 0; c < row.classes; ++c) {
        if (clean_needs)
          dp[b * row.classes + c] =
              static_cast<T>(static_cast<acc_t<T>>(g[b] * row.p(c) * (row.ratio(c) - divergence)));
        if (adv_needs) dq[b * row.classes + c] = static_cast<T>(static_cast<acc_t<T>>(g[b] * (row.q(c) - row.p(c))));
      }
    });
  });
  return {dclean, dadv};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("kl_divergence", TORCH_BOX(&moe::kl_divergence));
  m.impl("kl_divergence_backward", TORCH_BOX(&moe::kl_divergence_backward));
}
