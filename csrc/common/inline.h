// How functions are marked that are compiled for the host and for a GPU.
#pragma once

#ifdef __CUDACC__
#define MOE_INLINE __device__ __forceinline__
#else
#define MOE_INLINE inline __attribute__((always_inline))
#endif
