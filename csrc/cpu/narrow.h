// The floating-point types of at most 32 bits, which are computed in float where the CPU cannot compute in them.
#pragma once

#include "common/tensor.h"

namespace moe {

// Whether the CPU multiplies this type itself. Where it does not, the vendor's kernels emulate it: a bf16 GEMM of
// 2048 x 512 x 1024 takes 128 ms, the same in float 16 (AVX2, docs/facts.md).
inline bool multiplies_natively(ScalarType dtype) {
#ifdef __x86_64__
  static const bool bf16 = __builtin_cpu_supports("avx512bf16");
  if (dtype == ScalarType::BFloat16) return bf16;
  if (dtype == ScalarType::Half) return false;
#endif
  return true;
}

// t: any shape -> t, or a copy in float where the CPU does not multiply t's type itself
inline Tensor to_native_type(const Tensor& t) {
  return multiplies_natively(t.scalar_type()) ? t : torch::stable::to(t, ScalarType::Float);
}
inline OptionalTensor to_native_type(const OptionalTensor& t) {
  return t ? OptionalTensor(to_native_type(*t)) : std::nullopt;
}

// Calls f with a zero of the C++ type that `dtype` names, for operators that compute in float; refuses float64.
// `argument` is the name in the error message.
template <class F>
void dispatch_narrow(ScalarType dtype, const char* argument, F&& f) {
  MOE_CHECK(dtype != ScalarType::Double, argument, " must be float32, bfloat16 or float16, got ",
            torch::headeronly::toString(dtype));
  dispatch_float(dtype, argument, [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), double>) f(zero);
  });
}

}  // namespace moe
