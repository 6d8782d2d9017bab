// The Python module moe_kernels._C: facts about this build. The operators register themselves when it is loaded.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of the CPU kernels.";
  m.attr("compiler") = std::string("g++ ") + __VERSION__;
  m.attr("simd") = MOE_KERNELS_SIMD;
  m.attr("built_with_torch") = MOE_KERNELS_TORCH;
  m.attr("built_with_cuda") = MOE_KERNELS_CUDA;  // of the CUDA library, if there is one
  m.attr("cuda_operators") = MOE_KERNELS_CUDA_OPERATORS;
  m.attr("cuda_archs") = MOE_KERNELS_CUDA_ARCHS;
}
