// Grouped matrix products of a batch sorted by expert. The work is cut into blocks that depend on the data alone, and
// each block is one single-threaded vendor GEMM: bitwise the same result for any number of threads.
#include <algorithm>

#include "common/offsets.h"
#include "common/tensor.h"

namespace moe {
namespace {

using torch::stable::narrow;
using torch::stable::select;
using torch::stable::transpose;

constexpr int64_t kBlock = 128;  // rows of a block: enough for the GEMM's full speed, few enough to share among threads

struct Block {
  int64_t expert, begin, count;
};

// The rows of x that the sorted slots [begin, begin + count) read: a view, or a gathered copy.
Tensor slot_rows(const Tensor& x, const OptionalTensor& rows, int64_t begin, int64_t count) {
  Tensor source = x;
  if (!rows) return narrow(source, 0, begin, count);
  Tensor index = *rows;
  return call_aten("aten::index_select", "", x, int64_t{0}, narrow(index, 0, begin, count));
}

// Runs f on every block; ATen calls in it record no gradient, whatever thread they are on.
template <class F>
void for_each_block(const std::vector<Block>& blocks, F&& f) {
  torch::stable::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t first, int64_t last) {
    NoGrad guard;
    for (int64_t i = first; i < last; ++i) f(blocks[i]);
  });
}

// x [T, in], weight [E, out, in], bias [E, out], offsets [E + 1], rows [N] -> [N, out]
Tensor expert_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
                     const OptionalTensor& rows) {
  const int64_t num_rows = rows ? rows->size(0) : x.size(0);
  if (rows) check_rows(*rows, num_rows, x.size(0));
  std::vector<Block> blocks;
  for_each_expert(read_offsets(offsets, weight.size(0), num_rows), [&](int64_t e, int64_t begin, int64_t count) {
    for (int64_t i = 0; i < count; i += kBlock) blocks.push_back({e, begin + i, std::min(kBlock, count - i)});
  });
  Tensor out = new_tensor(x, {num_rows, weight.size(1)});
  for_each_block(blocks, [&](const Block& b) {
    Tensor target = out;
    call_aten("aten::linear", "out", slot_rows(x, rows, b.begin, b.count), select(weight, 0, b.expert),
              bias ? OptionalTensor(select(*bias, 0, b.expert)) : std::nullopt, narrow(target, 0, b.begin, b.count));
  });
  return out;
}

// grad [N, out], x [T, in] -> [E, out, in]; an expert without rows gets zeros. A block is a band of out.
Tensor expert_linear_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& offsets,
                                 const OptionalTensor& rows) {
  const int64_t num_experts = offsets.size(0) - 1, width = grad.size(1);
  const auto ranges = read_offsets(offsets, num_experts, grad.size(0));
  std::vector<Block> blocks;
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t i = 0; i < width; i += kBlock) blocks.push_back({e, i, std::min(kBlock, width - i)});
  }
  if (rows) check_rows(*rows, grad.size(0), x.size(0));
  const Tensor gathered = rows ? slot_rows(x, rows, 0, grad.size(0)) : x;
  Tensor out = new_tensor(grad, {num_experts, width, x.size(1)});
  for_each_block(blocks, [&](const Block& b) {
    Tensor target = select(out, 0, b.expert);
    target = narrow(target, 0, b.begin, b.count);
    const int64_t first = ranges[b.expert], count = ranges[b.expert + 1] - first;
    if (count == 0) {
      torch::stable::zero_(target);
      return;
    }
    Tensor g = grad;
    g = narrow(g, 0, first, count);
    call_aten("aten::mm", "out", transpose(narrow(g, 1, b.begin, b.count), 0, 1),
              slot_rows(gathered, std::nullopt, first, count), target);
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("expert_linear", TORCH_BOX(&moe::expert_linear));
  m.impl("expert_linear_weight_grad", TORCH_BOX(&moe::expert_linear_weight_grad));
}
