// Launches of kernels in plain C++, which throw where the launch fails. No torch header.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace moe {

// Throws unless `error` is success; `what` is the operator's name.
inline void cuda_check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string message = std::string(what) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    message +=
        "; moe_kernels was built for other GPUs (`python -m moe_kernels` lists them): build it again with this"
        " GPU's architecture in TORCH_CUDA_ARCH_LIST";
  }
  throw std::runtime_error(message);
}

// Launches kernel(arguments...) on `blocks` blocks of `threads` threads in one dimension, or not at all without blocks.
template <class... Parameters, class... Arguments>
void cuda_launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                 Arguments&&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::invalid_argument(std::string(name) + ": the batch is too large for one launch");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  cuda_check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

}  // namespace moe
