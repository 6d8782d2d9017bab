// Sums of the rows of each expert, and of rows that share an index: checks and launches. Whether offsets
// cover the rows and indices are in range is up to the caller: to check it the host would have to wait for the device.
#include "cuda/expert_sum.cuh"
#include "cuda/tensor.h"

namespace moe {
namespace {

// x: [N, D], offsets: int32 [E + 1]; returns [E, D]
Tensor expert_sum(const Tensor& x, const Tensor& offsets) {
  MOE_CHECK(offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.numel() > 0,
            "offsets must be int32 of shape [E + 1]");
  check_device(x, {offsets});
  const CudaStream stream(x);
  const int64_t rows = x.size(0), experts = offsets.size(0) - 1, width = x.size(1);
  const Tensor dense = as_contiguous(x), dense_offsets = as_contiguous(offsets);
  Tensor partial = new_tensor(x, {partial_rows(rows, experts), width}, accumulate_type(x.scalar_type()));
  Tensor out = new_tensor(x, {experts, width});
  dispatch_native(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    launch_expert_sum(data<T>(dense), data<int32_t>(dense_offsets), mutable_data<wide_t<T>>(partial),
                      mutable_data<T>(out), rows, experts, width, stream);
  });
  return out;
}

// Row r of the result is the sum of x[j] over the j with index[j] == r, in rising order of j.
//   x: [N, D], index: int32 [N] in [0, num_rows); returns [num_rows, D]
Tensor index_sum(const Tensor& x, const Tensor& index, int64_t num_rows) {
  const int64_t count = x.size(0), width = x.size(1);
  MOE_CHECK(count <= INT32_MAX, "index must have fewer than 2^31 elements, got ", count);
  MOE_CHECK(index.scalar_type() == ScalarType::Int && index.numel() == count, "index must be int32 of shape [", count,
            "]");
  MOE_CHECK(count <= INT32_MAX && num_rows < INT32_MAX, "index and the result must have fewer than 2^31 rows, got ",
            count, " and ", num_rows);
  check_device(x, {index});
  const CudaStream stream(x);
  const Tensor dense = as_contiguous(x), dense_index = as_contiguous(index);
  Tensor scratch = new_tensor(x, {index_sum_scratch(count, num_rows)}, ScalarType::Int);
  Tensor out = new_tensor(x, {num_rows, width});
  dispatch_native(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    launch_index_sum(data<T>(dense), data<int32_t>(dense_index), mutable_data<int32_t>(scratch), mutable_data<T>(out),
                     count, num_rows, width, stream);
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) {
  m.impl("expert_sum", TORCH_BOX(&moe::expert_sum));
  m.impl("index_sum", TORCH_BOX(&moe::index_sum));
}
