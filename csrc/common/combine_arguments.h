// The arguments of combine and its adjoints on every device: checks of their shapes, and contiguous copies.
#pragma once

#include "common/tensor.h"

namespace moe {

// position: int32 [T, k] with T * k = slots -> the same, contiguous
inline Tensor dense_position(const Tensor& position, int64_t slots) {
  MOE_CHECK(position.scalar_type() == ScalarType::Int && position.dim() == 2 && position.numel() == slots,
            "position must be int32 of shape [T, k] with T * k = ", slots, ", got ",
            torch::headeronly::toString(position.scalar_type()), " with ", position.numel(), " elements");
  return as_contiguous(position);
}

// weights: [T, k] -> the same, contiguous, in the dtype in which x is summed
inline Tensor dense_weights(const Tensor& weights, const Tensor& x) {
  return as_contiguous(torch::stable::to(weights, accumulate_type(x.scalar_type())));
}

// grad: [T, ...], y: [T * k, ...]; checks that both have one dtype
inline void check_weight_grad(const Tensor& grad, const Tensor& y) {
  MOE_CHECK(grad.scalar_type() == y.scalar_type(), "grad must have the dtype of y, ",
            torch::headeronly::toString(y.scalar_type()), ", got ", torch::headeronly::toString(grad.scalar_type()));
}

// x: [N, ...] -> the shape [rows, ...]
inline Shape with_rows(const Tensor& x, int64_t rows) {
  Shape sizes = shape(x);
  sizes[0] = rows;
  return sizes;
}

// x: [N, ...] -> the number of elements of a row
inline int64_t row_width(const Tensor& x) {
  int64_t width = 1;
  for (int64_t d = 1; d < x.dim(); ++d) width *= x.size(d);
  return width;
}

}  // namespace moe
