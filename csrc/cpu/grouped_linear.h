// The operands of a grouped linear layer, as the GEMM reads them: the rows of a batch sorted by expert, and each
// expert's weight and bias.
#pragma once

#include "cpu/gemm.h"

namespace moe {

// The rows of x [T, columns] that sorted slots read: x[j], or x[rows[j]].
template <class T>
class SortedRows {
 public:
  SortedRows(const Tensor& x, const OptionalTensor& rows)
      : x_(x.stride(1) == 1 ? x : as_contiguous(x)),
        rows_(rows ? OptionalTensor(as_contiguous(*rows)) : std::nullopt) {}

  Matrix<T> from(int64_t slot) const {
    if (rows_) return {data<T>(x_), x_.stride(0), 1, data<int32_t>(*rows_) + slot};
    return {data<T>(x_) + slot * x_.stride(0), x_.stride(0), 1};
  }

 private:
  Tensor x_;
  OptionalTensor rows_;
};

// A linear map for each expert: weight [E, out, in] and bias [E, out] or none, of which `multiply` can read any.
template <class T>
class LinearMaps {
 public:
  LinearMaps(const Tensor& weight, const OptionalTensor& bias)
      : weight_(weight.stride(1) == 1 || weight.stride(2) == 1 ? weight : as_contiguous(weight)),
        bias_(bias ? OptionalTensor(as_contiguous(*bias)) : std::nullopt),
        out_(weight.size(1)),
        in_(weight.size(2)) {}

  // The rows of out [N, out] in a block, from as many rows of x.
  void apply(const Block& b, const Matrix<T>& x, const Tensor& out) const {
    const bool turned = weight_.stride(2) != 1 && weight_.stride(1) == 1;
    const Matrix<T> matrix{data<T>(weight_) + b.expert * weight_.stride(0), turned ? weight_.stride(2) : 1,
                           turned ? 1 : weight_.stride(1)};
    multiply(b.count, out_, in_, x, matrix, bias_ ? data<T>(*bias_) + b.expert * out_ : nullptr,
             mutable_data<T>(out) + b.begin * out_, out_);
  }

 private:
  Tensor weight_;
  OptionalTensor bias_;
  int64_t out_, in_;
};

}  // namespace moe
