// Grouped matrix products of a batch sorted by expert; each expert's product is the vendor's GEMM.
#include "common/offsets.h"
#include "common/tensor.h"

namespace moe {
namespace {

using torch::stable::narrow;
using torch::stable::select;
using torch::stable::transpose;

// The rows of x that expert slots [begin, begin + count) read: a view, or a gathered copy.
Tensor slot_rows(const Tensor& x, const OptionalTensor& rows, int64_t begin, int64_t count) {
  Tensor source = x;
  if (!rows) return narrow(source, 0, begin, count);
  Tensor index = *rows;
  return call_aten("aten::index_select", "", x, int64_t{0}, narrow(index, 0, begin, count));
}

// x [T, in], weight [E, out, in], bias [E, out], offsets [E + 1], rows [N] -> [N, out]
Tensor expert_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
                     const OptionalTensor& rows) {
  const int64_t num_rows = rows ? rows->size(0) : x.size(0);
  const auto ranges = read_offsets(offsets, weight.size(0), num_rows);
  Tensor out = new_tensor(x, {num_rows, weight.size(1)});
  for_each_expert(ranges, [&](int64_t e, int64_t begin, int64_t count) {
    OptionalTensor b = bias ? OptionalTensor(select(*bias, 0, e)) : std::nullopt;
    call_aten("aten::linear", "out", slot_rows(x, rows, begin, count), select(weight, 0, e), b,
              narrow(out, 0, begin, count));
  });
  return out;
}

// grad [N, out], x [T, in] -> [E, out, in]; an expert without rows gets zeros.
Tensor expert_linear_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& offsets,
                                 const OptionalTensor& rows) {
  const int64_t num_experts = offsets.size(0) - 1;
  const auto ranges = read_offsets(offsets, num_experts, grad.size(0));
  Tensor out = new_tensor(grad, {num_experts, grad.size(1), x.size(1)});
  Tensor g = grad;
  for (int64_t e = 0; e < num_experts; ++e) {
    Tensor out_e = select(out, 0, e);
    const int64_t begin = ranges[e], count = ranges[e + 1] - begin;
    if (count == 0) {
      torch::stable::zero_(out_e);
    } else {
      call_aten("aten::mm", "out", transpose(narrow(g, 0, begin, count), 0, 1), slot_rows(x, rows, begin, count),
                out_e);
    }
  }
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("expert_linear", TORCH_BOX(&moe::expert_linear));
  m.impl("expert_linear_weight_grad", TORCH_BOX(&moe::expert_linear_weight_grad));
}
