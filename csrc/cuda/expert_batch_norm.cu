// Batch normalisation with statistics per expert: checks, allocation and launches. It is not checked that the offsets
// cover the images, since the host would have to wait for the device: that is up to the caller.
#include "common/layout.h"
#include "cuda/expert_batch_norm.cuh"
#include "cuda/tensor.h"

namespace moe {
namespace {

// A contiguous copy of a table in the dtype of the statistics of x; pointer() is null where there is none.
//   t: [E, C] or none, x: [N, C, *]
struct Table {
  OptionalTensor dense;

  Table(const OptionalTensor& t, const Tensor& x) {
    if (t) dense = as_contiguous(torch::stable::to(*t, accumulate_type(x.scalar_type())));
  }
  template <class A>
  const A* pointer() const {
    return dense ? data<A>(*dense) : nullptr;
  }
};

// x: [N, C, *], offsets: int32 [E + 1], contiguous
NormBatch norm_batch(const Tensor& x, const Tensor& offsets, bool channels_last) {
  const int64_t experts = offsets.size(0) - 1, channels = x.size(1), images = x.size(0);
  const int64_t pixels = x.numel() == 0 ? 0 : x.numel() / (images * channels);
  return {data<int32_t>(offsets), experts, channels, pixels, images, channels_last || pixels <= 1};
}

// Uninitialised: [E, C] statistics or gradients, [E, C] coefficients, and partial sums for each tile and channel.
Tensor new_table(const Tensor& x, const NormBatch& b) {
  return new_tensor(x, {b.experts, b.channels}, accumulate_type(x.scalar_type()));
}
Tensor new_coefficients(const Tensor& x, const NormBatch& b) {
  return new_tensor(x, {b.experts, b.channels, 4}, accumulate_type(x.scalar_type()));
}
Tensor new_partial(const Tensor& x, const NormBatch& b) {
  return new_tensor(x, {norm_partial_rows(b), b.channels, 2}, ScalarType::Double);
}

// offsets: int32 [E + 1] -> the same, contiguous
Tensor dense_offsets(const Tensor& offsets) {
  MOE_CHECK(offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.numel() > 0,
            "offsets must be int32 of shape [E + 1]");
  return as_contiguous(offsets);
}

// y = (x - mean) / sqrt(var + eps) * weight + bias for each expert, with the statistics of the batch in training (0 for
// an expert without images), else with the running ones.
//   x: [N, C, *], weight, bias: [E, C] or none, running_mean, running_var: [E, C], unread in training
//   offsets: int32 [E + 1]
//   returns y of the shape and layout of x, and the statistics that were used, mean and var [E, C]
std::tuple<Tensor, Tensor, Tensor> expert_batch_norm_forward(const Tensor& x, const OptionalTensor& weight,
                                                             const OptionalTensor& bias,
                                                             const OptionalTensor& running_mean,
                                                             const OptionalTensor& running_var, const Tensor& offsets,
                                                             bool training, double eps) {
  check_device(x, {weight, bias, running_mean, running_var, offsets});
  const CudaStream stream(x);
  const bool channels_last = is_channels_last(x);
  const Tensor dense = as_layout(x, channels_last), ends = dense_offsets(offsets);
  const NormBatch b = norm_batch(x, ends, channels_last);
  const Table scale(weight, x), shift(bias, x), given_mean(running_mean, x), given_var(running_var, x);
  Tensor y = new_tensor(x, shape(x), channels_last), mean = new_table(x, b), var = new_table(x, b);
  const Tensor coefficients = new_coefficients(x, b);
  const OptionalTensor partial = training ? OptionalTensor(new_partial(x, b)) : std::nullopt;
  dispatch_native(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    using A = wide_t<T>;
    launch_norm_forward(b, data<T>(dense), scale.pointer<A>(), shift.pointer<A>(), given_mean.pointer<A>(),
                        given_var.pointer<A>(), eps, partial ? mutable_data<Pair>(*partial) : nullptr,
                        mutable_data<NormCoefficients<A>>(coefficients), mutable_data<T>(y), mutable_data<A>(mean),
                        mutable_data<A>(var), stream);
  });
  return {y, mean, var};
}

// The gradients of bias and weight, sums of grad and of grad * (x - mean) / sqrt(var + eps).
//   grad, x: [N, C, *], mean, var: [E, C], offsets: int32 [E + 1]; returns dbias [E, C], dweight [E, C]
std::tuple<Tensor, Tensor> expert_batch_norm_param_grad(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                        const Tensor& var, const Tensor& offsets, double eps) {
  check_device(grad, {x, mean, var, offsets});
  const CudaStream stream(grad);
  const bool channels_last = is_channels_last(grad);
  const Tensor dense_grad = as_layout(grad, channels_last), dense = as_layout(x, channels_last);
  const Tensor ends = dense_offsets(offsets);
  const NormBatch b = norm_batch(grad, ends, channels_last);
  const Table centre(mean, x), variance(var, x);
  Tensor dbias = new_table(x, b), dweight = new_table(x, b);
  const Tensor partial = new_partial(x, b);
  dispatch_native(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    using A = wide_t<T>;
    launch_norm_param_grad(b, data<T>(dense_grad), data<T>(dense), centre.pointer<A>(), variance.pointer<A>(), eps,
                           mutable_data<Pair>(partial), mutable_data<A>(dbias), mutable_data<A>(dweight), stream);
  });
  return {dbias, dweight};
}

// The gradient of x, through the statistics too where they are the batch's own: then x, mean and the results of
// expert_batch_norm_param_grad are given.
//   grad: [N, C, *], x: [N, C, *] or none, weight, mean, dbias, dweight: [E, C] or none, var: [E, C]
//   offsets: int32 [E + 1]; returns dx of the shape and layout of grad
Tensor expert_batch_norm_input_grad(const Tensor& grad, const OptionalTensor& x, const OptionalTensor& weight,
                                    const OptionalTensor& mean, const Tensor& var, const OptionalTensor& dbias,
                                    const OptionalTensor& dweight, const Tensor& offsets, double eps) {
  check_device(grad, {x, weight, mean, var, dbias, dweight, offsets});
  const CudaStream stream(grad);
  const bool channels_last = is_channels_last(grad);
  const Tensor dense_grad = as_layout(grad, channels_last), ends = dense_offsets(offsets);
  const OptionalTensor dense = x ? OptionalTensor(as_layout(*x, channels_last)) : std::nullopt;
  const NormBatch b = norm_batch(grad, ends, channels_last);
  const Table scale(weight, grad), centre(x ? mean : std::nullopt, grad), variance(var, grad), sum(dbias, grad),
      scaled_sum(dweight, grad);
  Tensor dx = new_tensor(grad, shape(grad), channels_last);
  const Tensor coefficients = new_coefficients(grad, b);
  dispatch_native(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    using A = wide_t<T>;
    launch_norm_input_grad(b, data<T>(dense_grad), dense ? data<T>(*dense) : nullptr, scale.pointer<A>(),
                           centre.pointer<A>(), variance.pointer<A>(), sum.pointer<A>(), scaled_sum.pointer<A>(), eps,
                           mutable_data<NormCoefficients<A>>(coefficients), mutable_data<T>(dx), stream);
  });
  return dx;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) {
  m.impl("expert_batch_norm_forward", TORCH_BOX(&moe::expert_batch_norm_forward));
  m.impl("expert_batch_norm_param_grad", TORCH_BOX(&moe::expert_batch_norm_param_grad));
  m.impl("expert_batch_norm_input_grad", TORCH_BOX(&moe::expert_batch_norm_input_grad));
}
