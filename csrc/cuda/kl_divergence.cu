// KL(softmax(clean) || softmax(adv)) of each row of logits: checks and launches.
#include "common/kl_arguments.h"
#include "cuda/kl_divergence.cuh"
#include "cuda/tensor.h"

namespace moe {
namespace {

// clean_logits, adv_logits: [B, C]; returns [B]
Tensor kl_divergence(const Tensor& clean_logits, const Tensor& adv_logits) {
  check_logits(clean_logits, adv_logits);
  check_device(clean_logits, {adv_logits});
  const CudaStream stream(clean_logits);
  const Tensor clean = as_contiguous(clean_logits), adv = as_contiguous(adv_logits);
  Tensor out = new_tensor(clean, {clean.size(0)}, accumulate_type(clean.scalar_type()));
  dispatch_native(clean.scalar_type(), "clean_logits", [&](auto zero) {
    using T = decltype(zero);
    launch_kl_divergence(data<T>(clean), data<T>(adv), mutable_data<wide_t<T>>(out), clean.size(0), clean.size(1),
                         stream);
  });
  return out;
}

// grad: [B], clean_logits, adv_logits: [B, C]; returns their gradients [B, C], each [0] where it is not needed
std::tuple<Tensor, Tensor> kl_divergence_backward(const Tensor& grad, const Tensor& clean_logits,
                                                  const Tensor& adv_logits, bool clean_needs, bool adv_needs) {
  check_logits(clean_logits, adv_logits);
  check_divergence_grad(grad, clean_logits);
  check_device(clean_logits, {grad, adv_logits});
  const CudaStream stream(clean_logits);
  const Tensor clean = as_contiguous(clean_logits), adv = as_contiguous(adv_logits), dense_grad = as_contiguous(grad);
  Tensor dclean = new_tensor(clean, clean_needs ? shape(clean) : Shape{0});
  Tensor dadv = new_tensor(adv, adv_needs ? shape(adv) : Shape{0});
  dispatch_native(clean.scalar_type(), "clean_logits", [&](auto zero) {
    using T = decltype(zero);
    launch_kl_divergence_backward(data<wide_t<T>>(dense_grad), data<T>(clean), data<T>(adv),
                                  clean_needs ? mutable_data<T>(dclean) : nullptr,
                                  adv_needs ? mutable_data<T>(dadv) : nullptr, clean.size(0), clean.size(1), stream);
  });
  return {dclean, dadv};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) {
  m.impl("kl_divergence", TORCH_BOX(&moe::kl_divergence));
  m.impl("kl_divergence_backward", TORCH_BOX(&moe::kl_divergence_backward));
}
