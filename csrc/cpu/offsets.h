// Reads and checks the indices of a batch sorted by expert: rows [offsets[e], offsets[e + 1]) belong to expert e.
#pragma once

#include "common/tensor.h"

namespace moe {

// The offsets as int64, after a check that they run from 0 to `rows` without decreasing.
//   offsets: int32 [num_experts + 1]; returns the same numbers
inline std::vector<int64_t> read_offsets(const Tensor& offsets, int64_t num_experts, int64_t rows) {
  MOE_CHECK(offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.size(0) == num_experts + 1,
            "offsets must be int32 of shape [", num_experts + 1, "], got ",
            torch::headeronly::toString(offsets.scalar_type()), " with ", offsets.numel(), " elements");
  const Tensor dense = as_contiguous(offsets);
  const int32_t* o = data<int32_t>(dense);
  std::vector<int64_t> out(o, o + num_experts + 1);
  MOE_CHECK(out.front() == 0 && out.back() == rows, "offsets must run from 0 to the number of rows ", rows, ", got ",
            out.front(), " to ", out.back());
  for (int64_t e = 0; e < num_experts; ++e) {
    MOE_CHECK(out[e] <= out[e + 1], "offsets must not decrease, got ", out[e], " then ", out[e + 1], " at expert ", e);
  }
  return out;
}

// Checks that every index lies in [0, limit).
//   rows: int32 [count]
inline void check_rows(const Tensor& rows, int64_t count, int64_t limit) {
  MOE_CHECK(rows.scalar_type() == ScalarType::Int && rows.numel() == count, "rows must be int32 of shape [", count,
            "], got ", torch::headeronly::toString(rows.scalar_type()), " with ", rows.numel(), " elements");
  const Tensor dense = as_contiguous(rows);
  const int32_t* index = data<int32_t>(dense);
  for (int64_t j = 0; j < count; ++j) {
    MOE_CHECK(index[j] >= 0 && index[j] < limit, "rows must lie in [0, ", limit, "), got ", index[j]);
  }
}

// Calls f(expert, first_row, count) for every expert that has rows.
//   offsets: [E + 1]
template <class F>
void for_each_expert(const std::vector<int64_t>& offsets, F&& f) {
  for (size_t e = 0; e + 1 < offsets.size(); ++e) {
    if (offsets[e + 1] > offsets[e]) f(static_cast<int64_t>(e), offsets[e], offsets[e + 1] - offsets[e]);
  }
}

}  // namespace moe
