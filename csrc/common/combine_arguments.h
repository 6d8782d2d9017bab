// The arguments of combine and its adjoints, checked by shape and brought into one layout, for every device.
#pragma once

#include "common/tensor.h"

namespace moe {

// position [T, k] as a contiguous tensor of one int32 per slot.
inline Tensor dense_position(const Tensor& position, int64_t slots) {
  MOE_CHECK(position.scalar_type() == ScalarType::Int && position.dim() == 2 && position.numel() == slots,
            "position must be int32 of shape [T, k] with T * k = ", slots, ", got ",
            torch::headeronly::toString(position.scalar_type()), " with ", position.numel(), " elements");
  return as_contiguous(position);
}

// The weights [T, k] in the dtype that x is summed in.
inline Tensor dense_weights(const Tensor& weights, const Tensor& x) {
  return as_contiguous(torch::stable::to(weights, accumulate_type(x.scalar_type())));
}

inline void check_weight_grad(const Tensor& grad, const Tensor& y) {
  MOE_CHECK(grad.scalar_type() == y.scalar_type(), "grad must have the dtype of y, ",
            torch::headeronly::toString(y.scalar_type()), ", got ", torch::headeronly::toString(grad.scalar_type()));
}

// x's shape with `rows` rows.
inline Shape with_rows(const Tensor& x, int64_t rows) {
  Shape sizes = shape(x);
  sizes[0] = rows;
  return sizes;
}

// Elements of one row of x.
inline int64_t row_width(const Tensor& x) {
  int64_t width = 1;
  for (int64_t d = 1; d < x.dim(); ++d) width *= x.size(d);
  return width;
}

}  // namespace moe
