// The Python module moe_kernels._C: facts about this build, from which Python chooses the libraries with the operators.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

// The best level that this CPU has; `built`, the only one, where there are no levels.
std::string best_cpu_level([[maybe_unused]] const std::string& built) {
#ifdef __x86_64__
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v3 && v4 ? "x86-64-v4" : v3 ? "x86-64-v3" : "x86-64";
#else
  return built;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of the kernels.";
  m.attr("compiler") = std::string("g++ ") + __VERSION__;
  m.attr("cpu_levels") = MOE_KERNELS_CPU_LEVELS;  // those that were built, the lowest first
  m.attr("best_cpu_level") = best_cpu_level(MOE_KERNELS_CPU_LEVELS);
  m.attr("built_with_torch") = MOE_KERNELS_TORCH;
  m.attr("built_with_cuda") = MOE_KERNELS_CUDA;  // the toolkit's release, empty if there is no CUDA library
  m.attr("cuda_operators") = MOE_KERNELS_CUDA_OPERATORS;
  m.attr("cuda_archs") = MOE_KERNELS_CUDA_ARCHS;
}
