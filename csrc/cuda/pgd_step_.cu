// One step of projected gradient descent, in place: checks and launch.
#include "common/cuda_stream.h"
#include "common/pgd_arguments.h"
#include "cuda/pgd_step_.cuh"

namespace moe {
namespace {

// The CUDA type with the bits of a torch scalar type.
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

template <class T, class G>
void run(const PgdArguments& a, cudaStream_t stream) {
  launch_pgd_step(
      PgdBatch<T, G>{mutable_data<T>(a.x_adv), data<G>(a.grad), data<T>(a.x), data<T>(a.eps), data<T>(a.alpha), a.batch,
                     a.size, a.eps.numel() > 1, a.alpha.numel() > 1, static_cast<T>(a.low), static_cast<T>(a.high)},
      a.norm, stream);
}

// x_adv, grad, x [B, ...], eps, alpha [1] or [B]
void pgd_step_(Tensor x_adv, const Tensor& grad, const Tensor& x, const Tensor& eps, const Tensor& alpha,
               const std::string& norm, const std::vector<double>& bounds) {
  for (const Tensor& t : {grad, x, eps, alpha}) {
    MOE_CHECK(t.is_cuda() && t.get_device_index() == x_adv.get_device_index(), "all must be on the device of x_adv");
  }
  const CudaStream stream(x_adv);
  const PgdArguments arguments(x_adv, grad, x, eps, alpha, norm, bounds);
  if (x_adv.numel() == 0) return;
  dispatch_float(grad.scalar_type(), "grad", [&](auto g) {
    using G = typename Native<decltype(g)>::type;
    x_adv.scalar_type() == ScalarType::Double ? run<double, G>(arguments, stream) : run<float, G>(arguments, stream);
  });
  arguments.write_back(x_adv);
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) { m.impl("pgd_step_", TORCH_BOX(&moe::pgd_step_)); }
