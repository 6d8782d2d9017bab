// Floating-point numbers of at most 32 bits on a CPU.
#pragma once

#include "common/tensor.h"

namespace moe {

// Whether the CPU multiplies these itself. Where it does not, the vendor's kernels take ten times as long as in float.
inline bool multiplies_natively(ScalarType dtype) {
#ifdef __x86_64__
  static const bool bf16 = __builtin_cpu_supports("avx512bf16");
  if (dtype == ScalarType::BFloat16) return bf16;
  if (dtype == ScalarType::Half) return false;
#endif
  return true;
}

// t, or its values as float where the CPU is slow to multiply them.
inline Tensor computable(const Tensor& t) {
  return multiplies_natively(t.scalar_type()) ? t : torch::stable::to(t, ScalarType::Float);
}
inline OptionalTensor computable(const OptionalTensor& t) { return t ? OptionalTensor(computable(*t)) : std::nullopt; }

// Calls f with a value of the C++ type, where all is computed in float.
template <class F>
void dispatch_narrow(ScalarType dtype, const char* argument, F&& f) {
  MOE_CHECK(dtype != ScalarType::Double, argument, " must be float32, bfloat16 or float16, got ",
            torch::headeronly::toString(dtype));
  dispatch_float(dtype, argument, [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), double>) f(zero);
  });
}

}  // namespace moe
