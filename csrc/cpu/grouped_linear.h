// The operands of a grouped linear layer as the GEMM reads them: the rows of a batch sorted by expert, and each
// expert's weight and bias.
#pragma once

#include "cpu/gemm.h"

namespace moe {

// The rows of the sorted batch: slot j holds row rows[j] of x, or row j where there are no rows.
//   x: [T, columns], rows: [N] or none
template <class T>
class SortedRows {
 public:
  SortedRows(const Tensor& x, const OptionalTensor& rows)
      : x_(x.stride(1) == 1 ? x : as_contiguous(x)),
        rows_(rows ? OptionalTensor(as_contiguous(*rows)) : std::nullopt) {}

  // The slots from `slot` on: [N - slot, columns].
  Matrix<T> from(int64_t slot) const {
    if (rows_) return {data<T>(x_), x_.stride(0), 1, data<int32_t>(*rows_) + slot};
    return {data<T>(x_) + slot * x_.stride(0), x_.stride(0), 1};
  }

 private:
  Tensor x_;
  OptionalTensor rows_;
};

// A linear map for each expert. A weight with contiguous rows or columns is read where it lies; any other is copied.
//   weight: [E, out, in], bias: [E, out] or none
template <class T>
class LinearMaps {
 public:
  LinearMaps(const Tensor& weight, const OptionalTensor& bias)
      : weight_(weight.stride(1) == 1 || weight.stride(2) == 1 ? weight : as_contiguous(weight)),
        bias_(bias ? OptionalTensor(as_contiguous(*bias)) : std::nullopt),
        out_(weight.size(1)),
        in_(weight.size(2)) {}

  // Rows [b.begin, b.begin + b.count) of y: x weight[b.expert]^T + bias[b.expert].
  //   x: [b.count, in], y: [N, out], contiguous
  void apply(const Block& b, const Matrix<T>& x, const Tensor& y) const {
    const bool column_major = weight_.stride(2) != 1 && weight_.stride(1) == 1;
    const Matrix<T> transposed_weight{data<T>(weight_) + b.expert * weight_.stride(0),
                                      column_major ? weight_.stride(2) : 1, column_major ? 1 : weight_.stride(1)};
    gemm(b.count, out_, in_, x, transposed_weight, bias_ ? data<T>(*bias_) + b.expert * out_ : nullptr,
         mutable_data<T>(y) + b.begin * out_, out_);
  }

 private:
  Tensor weight_;
  OptionalTensor bias_;
  int64_t out_, in_;
};

}  // namespace moe
