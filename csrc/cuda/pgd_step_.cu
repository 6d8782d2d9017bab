// One step of projected gradient descent, in place: checks and launches.
#include "common/pgd_arguments.h"
#include "cuda/pgd_step_.cuh"
#include "cuda/tensor.h"

namespace moe {
namespace {

// One step in the dtypes T of x_adv and G of grad.
template <class T, class G>
void run(const PgdArguments& a, cudaStream_t stream) {
  launch_pgd_step(PgdBatch<T, G>{mutable_data<T>(a.x_adv), data<G>(a.grad), data<T>(a.x), data<T>(a.eps),
                                 data<T>(a.alpha), a.batch, a.size, a.eps.numel() > 1, a.alpha.numel() > 1,
                                 static_cast<T>(a.low), static_cast<T>(a.high), a.normalized<T, G>()},
                  a.norm, stream);
}

// x_adv: [B, ...], the user's tensor, which receives the result
void step(const PgdArguments& a, Tensor& x_adv, cudaStream_t stream) {
  if (x_adv.numel() == 0) return;
  dispatch_native(a.grad.scalar_type(), "grad", [&](auto g) {
    using G = decltype(g);
    x_adv.scalar_type() == ScalarType::Double ? run<double, G>(a, stream) : run<float, G>(a, stream);
  });
  a.write_back(x_adv);
}

// x_adv, grad, x: [B, ...], eps, alpha: [1] or [B], bounds: (low, high)
void pgd_step_(Tensor x_adv, const Tensor& grad, const Tensor& x, const Tensor& eps, const Tensor& alpha,
               const std::string& norm, const std::vector<double>& bounds) {
  check_device(x_adv, {grad, x, eps, alpha});
  const CudaStream stream(x_adv);
  step(PgdArguments(x_adv, grad, x, eps, alpha, norm, bounds), x_adv, stream);
}

// The same step; also returns the model's next input (x_adv - mean) / std, of the shape of x_adv in the dtype of grad.
//   x_adv, grad, x: [B, C, ...], eps, alpha: [1] or [B], bounds: (low, high), mean, std: [C]
Tensor pgd_step_normalized_(Tensor x_adv, const Tensor& grad, const Tensor& x, const Tensor& eps, const Tensor& alpha,
                            const std::string& norm, const std::vector<double>& bounds, const Tensor& mean,
                            const Tensor& std) {
  check_device(x_adv, {grad, x, eps, alpha, mean, std});
  const CudaStream stream(x_adv);
  const PgdArguments arguments(x_adv, grad, x, eps, alpha, norm, bounds, mean, std);
  step(arguments, x_adv, stream);
  return *arguments.model_input;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) {
  m.impl("pgd_step_", TORCH_BOX(&moe::pgd_step_));
  m.impl("pgd_step_normalized_", TORCH_BOX(&moe::pgd_step_normalized_));
}
