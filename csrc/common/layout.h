// The two memory layouts of images, contiguous and channels-last. A tensor that is both counts as contiguous.
#pragma once

#include "common/tensor.h"

namespace moe {

using torch::headeronly::MemoryFormat;

// t: any shape; true for [N, C, H, W] whose channels are innermost in memory
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline MemoryFormat memory_format(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// t: any shape -> t, or a copy in the given layout, which is [N, C, H, W] if channels_last
inline Tensor as_layout(const Tensor& t, bool channels_last) {
  return torch::stable::contiguous(t, memory_format(channels_last));
}

// An uninitialised tensor [sizes] of the dtype and device of `like`, in the given layout.
inline Tensor new_tensor(const Tensor& like, const Shape& sizes, bool channels_last) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              memory_format(channels_last));
}

// Checks that x can be overwritten in the order of its memory.
inline void check_dense(const Tensor& x) {
  MOE_CHECK(x.is_contiguous() || is_channels_last(x), "x must be contiguous or channels-last, as it is overwritten");
}

// Checks a mask of one bit for each of `count` elements.
//   bits: uint8 [ceil(count / 8)]
inline void check_bits(const Tensor& bits, int64_t count) {
  const int64_t bytes = (count + 7) / 8;
  MOE_CHECK(bits.scalar_type() == ScalarType::Byte && bits.numel() == bytes, "bits must be uint8 of shape [", bytes,
            "], got ", torch::headeronly::toString(bits.scalar_type()), " with ", bits.numel(), " elements");
}

}  // namespace moe
