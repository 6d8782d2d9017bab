// The arguments of pgd_step_ on every device: checked, and brought into one layout.
#pragma once

#include <string>

#include "common/layout.h"
#include "common/pgd_math.h"
#include "common/tensor.h"

namespace moe {

// t, or a copy with the strides of `layout`.
//   t, layout: one shape
inline Tensor laid_out_like(const Tensor& t, const Tensor& layout) {
  const Shape steps = strides(layout);
  if (strides(t) == steps) return t;
  Tensor out =
      call_aten("aten::new_empty_strided", "", t, shape(t), steps, std::optional<ScalarType>(),
                std::optional<torch::stable::Layout>(), std::optional<torch::stable::Device>(), std::optional<bool>());
  return torch::stable::copy_(out, t);
}

// `batch` samples of `size` elements each, dense in memory. Given mean and std, a tensor for the model's input as well.
//   x_adv, grad, x: [B, ...] in one layout; eps, alpha: [1] or [B] in the dtype of x
//   mean, std: [C] in the dtype of x, or none; model_input: like x_adv in the dtype of grad, or none
struct PgdArguments {
  Norm norm;
  int64_t batch, size;
  Tensor x_adv, grad, x, eps, alpha;
  double low, high;
  OptionalTensor mean, std, model_input;
  int64_t inner = 1;  // neighbouring elements of one channel: 1 if channels-last, else the pixels of an image

  PgdArguments(const Tensor& x_adv_, const Tensor& grad_, const Tensor& x_, const Tensor& eps_, const Tensor& alpha_,
               const std::string& norm_, const std::vector<double>& bounds, const OptionalTensor& mean_ = std::nullopt,
               const OptionalTensor& std_ = std::nullopt)
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
    const bool channels_last = is_channels_last(x_adv);
    if (mean_) {
      MOE_CHECK(x_adv.dim() > 1, "x_adv must be [B, C, ...] to be normalised");
      for (const OptionalTensor& t : {mean_, std_}) {
        MOE_CHECK(shape(*t) == Shape{x_adv.size(1)} && t->scalar_type() == dtype, "mean and std must be [",
                  x_adv.size(1), "] in the dtype of x_adv");
      }
      mean = as_contiguous(*mean_), std = as_contiguous(*std_);
      model_input = torch::stable::empty(shape(x_adv), grad.scalar_type(), std::nullopt, x_adv.device(), std::nullopt,
                                         memory_format(channels_last));
      for (int64_t d = 2; d < x_adv.dim() && !channels_last; ++d) inner *= x_adv.size(d);
    }
    if (x_adv.numel() == 0) return;
    x_adv = as_layout(x_adv, channels_last);
    grad = laid_out_like(grad, x_adv);
    x = laid_out_like(x, x_adv);
  }

  // Where the model input goes and how it is normalised; nowhere without mean and std.
  template <class T, class G>
  ModelInput<T, G> normalized() const {
    if (!model_input) return {};
    return {mutable_data<G>(*model_input), data<T>(*mean), data<T>(*std), mean->numel(), inner};
  }

  // Copies the result to target [B, ...], the user's x_adv, unless the step was made there.
  void write_back(Tensor& target) const {
    if (x_adv.data_ptr() != target.data_ptr()) torch::stable::copy_(target, x_adv);
  }
};

}  // namespace moe
