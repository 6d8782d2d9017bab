// Work cut into blocks that depend on the data alone, so that any number of threads gives bitwise the same result.
#pragma once

#include <algorithm>
#include <atomic>

#include "cpu/offsets.h"

namespace moe {

// Rows of a GEMM's block: a GEMM packs its weight anew for every call, so few blocks; threads share them, so several.
constexpr int64_t kGemmRows = 256;
constexpr int64_t kGemmBand = 512;  // rows of a weight gradient's block, whose sum is over the batch

// Views made without the dispatcher, whose calls take as long as a small GEMM. They do not keep t alive.
inline Tensor view_at(const Tensor& t, int64_t offset, const Shape& sizes, const Shape& strides) {
  void* data = const_cast<void*>(t.const_data_ptr());
  return torch::stable::from_blob(data, sizes, strides, t.device(), t.scalar_type(), offset);
}

// t[begin : begin + count]
inline Tensor rows_of(const Tensor& t, int64_t begin, int64_t count) {
  Shape sizes = shape(t);
  sizes[0] = count;
  return view_at(t, begin * t.stride(0), sizes, strides(t));
}
// t[i]
inline Tensor item_of(const Tensor& t, int64_t i) {
  const Shape sizes = shape(t), steps = strides(t);
  return view_at(t, i * steps[0], {sizes.begin() + 1, sizes.end()}, {steps.begin() + 1, steps.end()});
}
inline OptionalTensor item_of(const OptionalTensor& t, int64_t i) {
  return t ? OptionalTensor(item_of(*t, i)) : std::nullopt;
}
inline Tensor transposed(const Tensor& matrix) {
  return view_at(matrix, 0, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

struct Block {
  int64_t expert, begin, count;
};

// The rows of every expert in blocks of at most `size`.
inline std::vector<Block> row_blocks(const std::vector<int64_t>& offsets, int64_t size) {
  std::vector<Block> blocks;
  for_each_expert(offsets, [&](int64_t e, int64_t begin, int64_t count) {
    for (int64_t i = 0; i < count; i += size) blocks.push_back({e, begin + i, std::min(size, count - i)});
  });
  return blocks;
}

// The same in even blocks of about kGemmRows.
inline std::vector<Block> gemm_blocks(const std::vector<int64_t>& offsets) {
  std::vector<Block> blocks;
  for_each_expert(offsets, [&](int64_t e, int64_t begin, int64_t count) {
    const int64_t parts = std::max<int64_t>(1, (count + kGemmRows / 2) / kGemmRows);
    const auto part = [&](int64_t i) { return i * count / parts; };
    for (int64_t i = 0; i < parts; ++i) blocks.push_back({e, begin + part(i), part(i + 1) - part(i)});
  });
  return blocks;
}

// Calls work(i) for every i < count, in parallel: a thread that is done takes the next. Each makes its work by start().
template <class Start>
void share(int64_t count, const Start& start) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    auto work = start();
    for (int64_t i = next++; i < count; i = next++) work(i);
  });
}

// Runs f on every block, in parallel; ATen calls in it use one thread and record no gradient.
template <class F>
void for_each_block(const std::vector<Block>& blocks, F&& f) {
  share(static_cast<int64_t>(blocks.size()), [&] {
    return [&](int64_t i) {
      NoGrad guard;
      f(blocks[i]);
    };
  });
}

}  // namespace moe
