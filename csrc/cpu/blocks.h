// Work cut into blocks that depend on the data alone, so that the result is bitwise the same for any number of threads.
#pragma once

#include <algorithm>
#include <atomic>

#include "cpu/offsets.h"

namespace moe {

// Rows of a GEMM's block. Every block packs the weight anew, so there should be few; threads share them, so there
// should be several. With 256 rows instead of 128 `expert_linear` was a tenth faster with MKL's GEMM (AVX2,
// docs/facts.md); with ours 128 and 512 take 1.01 and 0.99 of the time (tuned-constants.md).
constexpr int64_t kGemmRows = 256;

// Rows of a block of a weight gradient [out, in], each of them a sum over the batch. 256 and 1024 take 1.04 and 0.97 of
// the time (tuned-constants.md).
constexpr int64_t kWeightGradRows = 512;

// A view [sizes] of t's memory with the given strides, from element `offset` of t on. It does not keep t alive. Made
// without the dispatcher, one call of which takes as long as a small GEMM.
inline Tensor view_at(const Tensor& t, int64_t offset, const Shape& sizes, const Shape& strides) {
  void* data = const_cast<void*>(t.const_data_ptr());
  return torch::stable::from_blob(data, sizes, strides, t.device(), t.scalar_type(), offset);
}

// t: [N, ...] -> t[begin : begin + count]: [count, ...], a view that does not keep t alive
inline Tensor rows_of(const Tensor& t, int64_t begin, int64_t count) {
  Shape sizes = shape(t);
  sizes[0] = count;
  return view_at(t, begin * t.stride(0), sizes, strides(t));
}
// t: [N, ...] -> t[i]: [...], a view that does not keep t alive
inline Tensor item_of(const Tensor& t, int64_t i) {
  const Shape sizes = shape(t), steps = strides(t);
  return view_at(t, i * steps[0], {sizes.begin() + 1, sizes.end()}, {steps.begin() + 1, steps.end()});
}
inline OptionalTensor item_of(const OptionalTensor& t, int64_t i) {
  return t ? OptionalTensor(item_of(*t, i)) : std::nullopt;
}
// matrix: [m, n] -> [n, m], a view that does not keep the matrix alive
inline Tensor transposed(const Tensor& matrix) {
  return view_at(matrix, 0, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

// Rows [begin, begin + count) of a sorted batch, all of one expert.
struct Block {
  int64_t expert, begin, count;
};

// The rows of every expert in blocks of `size`, of which an expert's last may be smaller.
//   offsets: [E + 1], rows [offsets[e], offsets[e + 1]) belong to expert e
inline std::vector<Block> row_blocks(const std::vector<int64_t>& offsets, int64_t size) {
  std::vector<Block> blocks;
  for_each_expert(offsets, [&](int64_t e, int64_t begin, int64_t count) {
    for (int64_t i = 0; i < count; i += size) blocks.push_back({e, begin + i, std::min(size, count - i)});
  });
  return blocks;
}

// The rows of every expert in equal blocks of about kGemmRows: 269 rows as blocks of 256 and 13 packed the weight twice
// and left a thread waiting; with equal blocks an MLP layer's step went from 120 to 105 ms (docs/facts.md).
//   offsets: [E + 1], rows [offsets[e], offsets[e + 1]) belong to expert e
inline std::vector<Block> gemm_blocks(const std::vector<int64_t>& offsets) {
  std::vector<Block> blocks;
  for_each_expert(offsets, [&](int64_t e, int64_t begin, int64_t count) {
    const int64_t parts = std::max<int64_t>(1, (count + kGemmRows / 2) / kGemmRows);
    const auto part = [&](int64_t i) { return i * count / parts; };
    for (int64_t i = 0; i < parts; ++i) blocks.push_back({e, begin + part(i), part(i + 1) - part(i)});
  });
  return blocks;
}

// Calls work(i) for every i in [0, count), in parallel, scheduled dynamically: a thread that has finished one takes the
// next. Each thread has a `work` of its own, with its own scratch memory, from make_work().
template <class MakeWork>
void dynamic_parallel_for(int64_t count, const MakeWork& make_work) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    auto work = make_work();
    for (int64_t i = next++; i < count; i = next++) work(i);
  });
}

// Calls f(block) for every block, in parallel; calls of ATen in it use one thread and record no gradient.
template <class F>
void for_each_block(const std::vector<Block>& blocks, F&& f) {
  dynamic_parallel_for(static_cast<int64_t>(blocks.size()), [&] {
    return [&](int64_t i) {
      NoGrad guard;
      f(blocks[i]);
    };
  });
}

}  // namespace moe
