// Checks of the arguments of kl_divergence, for every device.
#pragma once

#include "common/tensor.h"

namespace moe {

// clean, adv: [B, C]
inline void check_logits(const Tensor& clean, const Tensor& adv) {
  MOE_CHECK(clean.dim() == 2 && shape(clean) == shape(adv) && clean.scalar_type() == adv.scalar_type(),
            "clean_logits and adv_logits must both be [B, C] of one dtype");
  MOE_CHECK(clean.size(1) > 0, "clean_logits must have at least one class");
}

// grad: [B], clean: [B, C]
inline void check_divergence_grad(const Tensor& grad, const Tensor& clean) {
  MOE_CHECK(grad.numel() == clean.size(0) && grad.scalar_type() == accumulate_type(clean.scalar_type()),
            "grad must be [B] of the dtype of the divergence");
}

}  // namespace moe
