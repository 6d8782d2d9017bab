// The second half of an expert MLP, and the backward through its activation. The activation is never stored as a whole:
// it is computed from the pre-activation z, a block of rows at a time.
#include "cpu/activation.h"
#include "cpu/grouped_linear.h"

namespace moe {
namespace {

// Sums that an inner product is spread over, so that rounding errors grow with n / 64. 16 and 256 take 0.98 and 1.01 of
// the time (tuned-constants.md).
constexpr int64_t kSums = 64;

// Calls f(activation, gated) for an activation's name. Gated (swiglu, geglu), the activation of the first half of a row
// of z is multiplied by the second half.
template <class F>
void dispatch_activation(const std::string& name, F&& f) {
  const bool gated = name == "swiglu" || name == "geglu";
  if (name == "relu") {
    f(Relu{}, gated);
  } else if (name == "relu2") {
    f(SquaredRelu{}, gated);
  } else if (name == "gelu" || name == "geglu") {
    f(Gelu{}, gated);
  } else if (name == "silu" || name == "swiglu") {
    f(Silu{}, gated);
  } else {
    fail("activation must be relu, gelu, silu, relu2, swiglu or geglu, got ", name);
  }
}

// The activations of a block of rows.
//   z: [N, n], or [N, 2 n] if gated; returns [b.count, n]
template <class Activation>
Tensor activated(const Tensor& z, const Block& b, int64_t n, bool gated) {
  Tensor out = new_tensor(z, {b.count, n});
  dispatch_float(z.scalar_type(), "z", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int64_t width = z.size(1);
    for (int64_t i = 0; i < b.count; ++i) {
      const T *first = data<T>(z) + (b.begin + i) * width, *second = first + n;
      T* to = mutable_data<T>(out) + i * n;
      if (gated) {
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) {
          store(to[c], Activation::at(static_cast<A>(first[c])).value * static_cast<A>(second[c]));
        }
      } else {
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) store(to[c], Activation::at(static_cast<A>(first[c])).value);
      }
    }
  });
  return out;
}

// y = weight[e] act(z) + bias[e] for the rows of expert e; given gates and position, also their combination.
//   z: [N, n], or [N, 2 n] if gated, weight: [E, d, n], bias: [E, d] or none, offsets: [E + 1]
//   gates: [T, k], position: [T, k] with T * k = N, or none; the last argument is for the backward alone
//   returns y [N, d], or its combination [T, d]
Tensor expert_mlp_output(const Tensor& z, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
                         StringHandle activation, const OptionalTensor& gates, const OptionalTensor& position,
                         const OptionalTensor&) {
  const auto blocks = gemm_blocks(read_offsets(offsets, weight.size(0), z.size(0)));
  const Tensor pre = as_contiguous(z);
  Tensor y = new_tensor(z, {z.size(0), weight.size(1)});
  dispatch_activation(take_string(activation), [&](auto act, bool gated) {
    if (!vendor_gemm_is_faster(z.scalar_type(), blocks)) {
      dispatch_narrow(z.scalar_type(), "x", [&](auto zero) {
        using T = decltype(zero);
        const LinearMaps<T> maps(weight, bias);
        for_each_block(blocks, [&](const Block& b) {
          const Tensor a = activated<decltype(act)>(pre, b, weight.size(2), gated);
          maps.apply(b, Matrix<T>{data<T>(a), weight.size(2), 1}, y);
        });
      });
      return;
    }
    for_each_block(blocks, [&](const Block& b) {
      const Tensor a = activated<decltype(act)>(pre, b, weight.size(2), gated);
      call_aten("aten::linear", "out", a, item_of(weight, b.expert), item_of(bias, b.expert),
                rows_of(y, b.begin, b.count));
    });
  });
  return gates ? call_aten("moe_kernels::combine", "", y, *gates, *position) : y;
}

// One row of the hidden gradient. `second` is the second half of a gated z, and dsecond its gradient.
//   da, z, second: [n] -> dz, dsecond, weighted: [n]
template <class T>
struct Row {
  const T *da, *z, *second;
  T *dz, *dsecond, *weighted;
};

// Writes dz, dsecond and weighted = gate * act(z) of a row; returns <da, act(z)>, summed in kSums interleaved sums that
// are then added as a tree.
template <class Activation, bool gated, class T>
acc_t<T> hidden_grad_row(const Row<T> row, int64_t n, acc_t<T> gate) {
  using A = acc_t<T>;
  A sum[kSums] = {};
  for (int64_t c0 = 0; c0 < n; c0 += kSums) {
    const int64_t count = std::min(kSums, n - c0);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = c0 + i;
      const Point<A> at = Activation::at(static_cast<A>(row.z[c]));
      const A g = static_cast<A>(row.da[c]), second = gated ? static_cast<A>(row.second[c]) : A(1);
      sum[i] += g * at.value * second;
      store(row.dz[c], gate * g * at.slope * second);
      if (gated) store(row.dsecond[c], gate * g * at.value);
      store(row.weighted[c], gate * at.value * second);
    }
  }
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

// The backward through gate * act(z).
//   da: [N, n], the gradient of act(z) without the gate; z: [N, n], or [N, 2 n] if gated; gates: [N]
//   returns dz like z; gates * act(z) [N, n], which the weight's gradient is computed from; and the gates' gradient
//   <da, act(z)> [N]; each [0] where nobody needs it
std::tuple<Tensor, Tensor, Tensor> expert_mlp_hidden_grad(const Tensor& da, const Tensor& z, const Tensor& gates,
                                                          StringHandle activation, bool z_needs, bool weight_needs,
                                                          bool gates_need) {
  const int64_t count = da.size(0), n = da.size(1);
  MOE_CHECK(gates.numel() == count && gates.scalar_type() == accumulate_type(da.scalar_type()), "weights must be ",
            count, " numbers in the precision of the sums");
  const Tensor grad = as_contiguous(da), pre = as_contiguous(z), scale = as_contiguous(gates);
  const Shape none{0};
  Tensor weighted = new_tensor(da, weight_needs ? Shape{count, n} : none);
  Tensor dgates = new_tensor(gates, gates_need ? Shape{count} : none), dz;
  dispatch_activation(take_string(activation), [&](auto act, bool gated) {
    const int64_t width = gated ? 2 * n : n;
    MOE_CHECK(z.dim() == 2 && z.size(0) == count && z.size(1) == width, "z must be [", count, ", ", width, "]");
    dz = new_tensor(z, z_needs ? Shape{count, width} : none);
    dispatch_float(da.scalar_type(), "da", [&](auto zero) {
      using T = decltype(zero);
      using A = acc_t<T>;
      const T *g = data<T>(grad), *src = data<T>(pre);
      const A* s = data<A>(scale);
      T *to_dz = mutable_data<T>(dz), *to_weighted = mutable_data<T>(weighted);
      A* to_dgates = mutable_data<A>(dgates);
      // An activation and its derivative are counted as 16 operations; not measured.
      torch::stable::parallel_for(0, count, grain(16 * n), [&](int64_t first, int64_t last) {
        std::vector<T> unwanted(width);  // receives what nobody needs
        for (int64_t i = first; i < last; ++i) {
          T* dz_row = z_needs ? to_dz + i * width : unwanted.data();
          T* weighted_row = weight_needs ? to_weighted + i * n : unwanted.data();
          const Row<T> row{g + i * n, src + i * width, src + i * width + n, dz_row, dz_row + n, weighted_row};
          const A dot = gated ? hidden_grad_row<decltype(act), true>(row, n, s[i])
                              : hidden_grad_row<decltype(act), false>(row, n, s[i]);
          if (gates_need) to_dgates[i] = dot;
        }
      });
    });
  });
  return {dz, weighted, dgates};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("expert_mlp_output", TORCH_BOX(&moe::expert_mlp_output));
  m.impl("expert_mlp_hidden_grad", TORCH_BOX(&moe::expert_mlp_hidden_grad));
}
