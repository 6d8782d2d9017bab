// The arguments of pgd_step_, checked and brought into one layout, for every device.
#pragma once

#include <algorithm>
#include <string>

#include "common/tensor.h"

namespace moe {

enum class Norm { Linf, L2, L1 };

// Whether each sample (index of the first dimension) is one gapless run of memory, the samples one after the other.
inline bool samples_are_dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> inner;  // (stride, size)
  int64_t sample_size = 1;
  for (int64_t d = 1; d < t.dim(); ++d) {
    sample_size *= t.size(d);
    if (t.size(d) != 1) inner.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(inner.begin(), inner.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : inner) {
    if (stride != expected) return false;
    expected *= size;
  }
  return t.size(0) == 1 || t.stride(0) == sample_size;
}

// t with the strides of `layout`, which has its shape: t itself where they agree, else a copy.
inline Tensor laid_out_like(const Tensor& t, const Tensor& layout) {
  if (t.strides() == layout.strides()) return t;
  const Shape strides(layout.strides().begin(), layout.strides().end());
  Tensor out =
      call_aten("aten::new_empty_strided", "", t, shape(t), strides, std::optional<ScalarType>(),
                std::optional<torch::stable::Layout>(), std::optional<torch::stable::Device>(), std::optional<bool>());
  return torch::stable::copy_(out, t);
}

// One dense block of `batch` samples of `size` elements. eps and alpha are [1] or [batch], in the dtype of x.
struct PgdArguments {
  Norm norm;
  int64_t batch, size;
  Tensor x_adv, grad, x, eps, alpha;
  double low, high;

  PgdArguments(const Tensor& x_adv_, const Tensor& grad_, const Tensor& x_, const Tensor& eps_, const Tensor& alpha_,
               const std::string& norm_, const std::vector<double>& bounds)
      : norm(norm_ == "Linf" ? Norm::Linf
             : norm_ == "L2" ? Norm::L2
                             : Norm::L1),
        batch(x_adv_.dim() > 0 ? x_adv_.size(0) : 0),
        size(batch > 0 ? x_adv_.numel() / batch : 0),
        x_adv(x_adv_),
        grad(grad_),
        x(x_),
        eps(as_contiguous(eps_)),
        alpha(as_contiguous(alpha_)) {
    const ScalarType dtype = x_adv.scalar_type();
    MOE_CHECK(x_adv.dim() > 0, "x_adv must be [B, ...], got a scalar");
    MOE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "x_adv must be float32 or float64, got ",
              torch::headeronly::toString(dtype));
    MOE_CHECK(norm_ == "Linf" || norm_ == "L2" || norm_ == "L1", "norm must be Linf, L2 or L1, got ", norm_);
    MOE_CHECK(bounds.size() == 2 && bounds[0] <= bounds[1], "bounds must be (low, high) with low <= high");
    MOE_CHECK(shape(grad) == shape(x_adv) && shape(x) == shape(x_adv), "grad and x must have the shape of x_adv");
    for (const Tensor& t : {x, eps, alpha}) {
      MOE_CHECK(t.scalar_type() == dtype, "x, eps and alpha must have the dtype of x_adv");
    }
    for (const Tensor& t : {eps, alpha}) {
      MOE_CHECK(t.numel() == 1 || t.numel() == batch, "eps and alpha must have 1 or ", batch, " elements, got ",
                t.numel());
    }
    low = bounds[0], high = bounds[1];
    if (x_adv.numel() == 0) return;
    if (!samples_are_dense(x_adv)) x_adv = torch::stable::contiguous(x_adv);
    grad = laid_out_like(grad, x_adv);
    x = laid_out_like(x, x_adv);
  }

  // Hands the result back where x_adv had to be copied.
  void write_back(Tensor& target) const {
    if (x_adv.data_ptr() != target.data_ptr()) torch::stable::copy_(target, x_adv);
  }
};

}  // namespace moe
