// What all kernels use: storage types, accesses of 16 bytes, sums over a warp and a block. No torch header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace moe {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// A value of a storage type in the type in which it is computed.
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

// The type in which a storage type is computed.
template <class T>
using wide_t = decltype(widen(T{}));

// A computed value, rounded to the storage type.
template <class T>
__device__ __forceinline__ T narrow(wide_t<T> v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(v);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half(v);
  } else {
    return v;
  }
}

// N neighbouring elements, which are moved by accesses of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

// Elements of T in an access of 16 bytes.
template <class T>
constexpr int kPack = 16 / sizeof(T);

// p: [N], aligned like the pack -> the pack
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
// p: [N], aligned like the pack = the pack
template <class T, int N>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// Whether packs of N can be moved from and to p.
template <class T, int N>
bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Pack<T, N>) == 0;
}

// The sum of a value over the lanes of the warp, in a fixed order. Every lane receives it, and all must call.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// The sum of a value over the threads of the block, in a fixed order. Every thread receives it, and all must call; the
// block must be whole warps.
//   partial: [32], shared memory
__device__ __forceinline__ double block_sum(double value, double (&partial)[kWarp]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  value = warp_sum(value);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  value = warp_sum(lane < warps ? partial[lane] : 0.0);
  __syncthreads();
  return value;
}

}  // namespace moe
