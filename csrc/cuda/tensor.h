// Tensors on a GPU: torch's current stream, the check that all are on one device, the switch over dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/tensor.h"

namespace moe {

// The current stream of a tensor's device. As long as this lives, that device is the current one.
class CudaStream {
 public:
  explicit CudaStream(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Checks that the others, of which some may be none, are on the device of the first.
inline void check_device(const Tensor& first, std::initializer_list<OptionalTensor> others) {
  for (const OptionalTensor& t : others) {
    MOE_CHECK(!t || (t->is_cuda() && t->get_device_index() == first.get_device_index()),
              "all tensors must be on the device of the first");
  }
}

// The CUDA toolkit's type for a C++ type of torch's, bit for bit the same.
template <class T>
struct Native {
  using type = T;
};
template <>
struct Native<torch::headeronly::BFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct Native<torch::headeronly::Half> {
  using type = __half;
};

// Calls f with a zero of the CUDA type that `dtype` names. `argument` is the name in the error message.
template <class F>
void dispatch_native(ScalarType dtype, const char* argument, F&& f) {
  dispatch_float(dtype, argument, [&](auto zero) { f(typename Native<decltype(zero)>::type{}); });
}

}  // namespace moe
