// The 16-bit brain float as the CUDA toolkit names it: storage and widening.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
