// Arithmetic that host and device share: how its functions are marked.
#pragma once

#ifdef __CUDACC__
#define MOE_INLINE __device__ __forceinline__
#else
#define MOE_INLINE inline __attribute__((always_inline))
#endif
