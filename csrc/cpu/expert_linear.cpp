// Grouped matrix products of a batch sorted by expert. Each block is a GEMM on one thread, cpu/gemm.h's or ATen's.
#include "cpu/grouped_linear.h"

namespace moe {
namespace {

// The rows that slots [begin, begin + count) of the sorted batch hold: a view of x, or a gathered copy.
//   x: [T, in], rows: [N] or none; returns [count, in]
Tensor slot_rows(const Tensor& x, const OptionalTensor& rows, int64_t begin, int64_t count) {
  if (!rows) return rows_of(x, begin, count);
  return call_aten("aten::index_select", "", x, int64_t{0}, rows_of(*rows, begin, count));
}

// y[j] = weight[e] x[rows[j]] + bias[e] for the rows j of expert e.
//   x: [T, in], weight: [E, out, in], bias: [E, out] or none, offsets: [E + 1], rows: [N], or none and N = T
//   returns [N, out]
Tensor expert_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
                     const OptionalTensor& rows) {
  const int64_t num_rows = rows ? rows->size(0) : x.size(0);
  if (rows) check_rows(*rows, num_rows, x.size(0));
  const auto blocks = gemm_blocks(read_offsets(offsets, weight.size(0), num_rows));
  Tensor out = new_tensor(x, {num_rows, weight.size(1)});
  if (!vendor_gemm_is_faster(x.scalar_type(), blocks)) {
    dispatch_narrow(x.scalar_type(), "x", [&](auto zero) {
      const LinearMaps<decltype(zero)> maps(weight, bias);
      const SortedRows<decltype(zero)> source(x, rows);
      for_each_block(blocks, [&](const Block& b) { maps.apply(b, source.from(b.begin), out); });
    });
    return out;
  }
  for_each_block(blocks, [&](const Block& b) {
    const Tensor source = slot_rows(x, rows, b.begin, b.count), matrix = item_of(weight, b.expert);
    const Tensor target = rows_of(out, b.begin, b.count);
    if (bias) {
      call_aten("aten::linear", "out", source, matrix, item_of(bias, b.expert), target);
    } else {
      call_aten("aten::mm", "out", source, transposed(matrix), target);
    }
  });
  return out;
}

// The gradient of the weight; an expert without rows gets zeros. A block is some rows of an expert's [out, in].
//   grad: [N, out], x: [T, in], offsets: [E + 1], rows: [N], or none and N = T
//   returns [E, out, in]
Tensor expert_linear_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& offsets,
                                 const OptionalTensor& rows) {
  const int64_t num_experts = offsets.size(0) - 1, width = grad.size(1);
  const auto ranges = read_offsets(offsets, num_experts, grad.size(0));
  std::vector<Block> blocks;
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t i = 0; i < width; i += kWeightGradRows) blocks.push_back({e, i, std::min(kWeightGradRows, width - i)});
  }
  if (rows) check_rows(*rows, grad.size(0), x.size(0));
  Tensor out = new_tensor(grad, {num_experts, width, x.size(1)});
  if (!vendor_gemm_is_faster(grad.scalar_type(), blocks)) {
    dispatch_narrow(grad.scalar_type(), "x", [&](auto zero) {
      using T = decltype(zero);
      const SortedRows<T> sorted_grad(grad, std::nullopt), sorted_x(x, rows);
      for_each_block(blocks, [&](const Block& b) {
        const int64_t first = ranges[b.expert], count = ranges[b.expert + 1] - first, row = b.expert * width + b.begin;
        gemm<T>(b.count, x.size(1), count, sorted_grad.from(first).transposed(b.begin), sorted_x.from(first), nullptr,
                mutable_data<T>(out) + row * x.size(1), x.size(1));
      });
    });
    return out;
  }
  const Tensor gathered = rows ? slot_rows(x, rows, 0, grad.size(0)) : x;
  for_each_block(blocks, [&](const Block& b) {
    Tensor target = rows_of(item_of(out, b.expert), b.begin, b.count);
    const int64_t first = ranges[b.expert], count = ranges[b.expert + 1] - first;
    if (count == 0) {
      torch::stable::zero_(target);
      return;
    }
    const Tensor columns = rows_of(transposed(rows_of(grad, first, count)), b.begin, b.count);
    call_aten("aten::mm", "out", columns, rows_of(gathered, first, count), target);
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("expert_linear", TORCH_BOX(&moe::expert_linear));
  m.impl("expert_linear_weight_grad", TORCH_BOX(&moe::expert_linear_weight_grad));
}
