// Sums of the rows of each expert, and of rows that share an index. Every sum has a fixed order, so that the result is
// bitwise the same for any number of threads.
#include <algorithm>

#include "common/tensor.h"
#include "cpu/offsets.h"

namespace moe {
namespace {

// Columns that a task sums, in accumulators that stay in L1. 64 and 1024 take 1.28 and 0.83 of the time on two threads
// (tuned-constants.md); with 1024 there are fewer tasks.
constexpr int64_t kColumns = 256;
// Rows summed before they join the total, so that rounding errors grow with n / 16. 4 and 64 take 1.29 and 0.92 of the
// time (tuned-constants.md).
constexpr int64_t kRows = 16;

// x: [N, D], offsets: int32 [E + 1]; returns [E, D]
Tensor expert_sum(const Tensor& x, const Tensor& offsets) {
  const int64_t num_experts = offsets.size(0) - 1, width = x.size(1);
  const auto ranges = read_offsets(offsets, num_experts, x.size(0));
  const Tensor dense = as_contiguous(x);
  Tensor out = new_tensor(x, {num_experts, width});
  const int64_t blocks = (width + kColumns - 1) / kColumns;
  dispatch_float(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    const T* src = data<T>(dense);
    T* dst = mutable_data<T>(out);
    torch::stable::parallel_for(0, num_experts * blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t e = task / blocks, c0 = task % blocks * kColumns, n = std::min(kColumns, width - c0);
        acc_t<T> sum[kColumns] = {};
        for (int64_t j = ranges[e]; j < ranges[e + 1]; j += kRows) {
          acc_t<T> part[kColumns] = {};
          for (int64_t i = j; i < std::min(j + kRows, ranges[e + 1]); ++i) {
            const T* row = src + i * width + c0;
            for (int64_t c = 0; c < n; ++c) part[c] += static_cast<acc_t<T>>(row[c]);
          }
          for (int64_t c = 0; c < n; ++c) sum[c] += part[c];
        }
        for (int64_t c = 0; c < n; ++c) dst[e * width + c0 + c] = static_cast<T>(sum[c]);
      }
    });
  });
  return out;
}

// Row r of the result is the sum of x[j] over the j with index[j] == r, in rising order of j.
//   x: [N, D], index: int32 [N] in [0, num_rows); returns [num_rows, D]
Tensor index_sum(const Tensor& x, const Tensor& index, int64_t num_rows) {
  const int64_t count = x.size(0), width = x.size(1);
  check_rows(index, count, num_rows);
  const Tensor dense = as_contiguous(x), dense_index = as_contiguous(index);
  const int32_t* idx = data<int32_t>(dense_index);
  Tensor out = new_tensor(x, {num_rows, width});
  dispatch_float(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    const T* src = data<T>(dense);
    T* dst = mutable_data<T>(out);
    // Each task owns a band of columns and walks all rows, so no two tasks write one element.
    const int64_t blocks = (width + kColumns - 1) / kColumns;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t c0 = block * kColumns, n = std::min(kColumns, width - c0);
        std::vector<acc_t<T>> sum(num_rows * n, acc_t<T>(0));
        for (int64_t j = 0; j < count; ++j) {
          const T* row = src + j * width + c0;
          acc_t<T>* s = sum.data() + idx[j] * n;
          for (int64_t c = 0; c < n; ++c) s[c] += static_cast<acc_t<T>>(row[c]);
        }
        for (int64_t r = 0; r < num_rows; ++r) {
          for (int64_t c = 0; c < n; ++c) dst[r * width + c0 + c] = static_cast<T>(sum[r * n + c]);
        }
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("expert_sum", TORCH_BOX(&moe::expert_sum));
  m.impl("index_sum", TORCH_BOX(&moe::index_sum));
}
