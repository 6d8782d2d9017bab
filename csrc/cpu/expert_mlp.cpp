// The second half of an expert MLP and the backward through its activation, which is never stored: it is computed from
// the pre-activation a few rows at a time.
#include "cpu/activation.h"
#include "cpu/grouped_linear.h"

namespace moe {
namespace {

constexpr int64_t kTerms = 64;  // sums side by side of an inner product: rounding errors grow with n / 64

// Calls f with the activation that `name` names, and whether a second half of z multiplies it.
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

// The activations [b.count, n] of a block of z's rows, [N, n], or [N, 2 n] if gated.
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

// z [N, n] or [N, 2 n], weight [E, d, n], bias [E, d], offsets [E + 1] -> [N, d]; with weights and position [T, k]
// their combination [T, d]
Tensor expert_mlp_output(const Tensor& z, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
                         StringHandle activation, const OptionalTensor& weights, const OptionalTensor& position,
                         const OptionalTensor&) {
  const auto blocks = gemm_blocks(read_offsets(offsets, weight.size(0), z.size(0)));
  const Tensor pre = as_contiguous(z);
  Tensor y = new_tensor(z, {z.size(0), weight.size(1)});
  dispatch_activation(take_string(activation), [&](auto act, bool gated) {
    const bool done = dispatch_multiply(z.scalar_type(), blocks, [&](auto zero) {
      using T = decltype(zero);
      const LinearMaps<T> maps(weight, bias);
      for_each_block(blocks, [&](const Block& b) {
        const Tensor a = activated<decltype(act)>(pre, b, weight.size(2), gated);
        maps.apply(b, Matrix<T>{data<T>(a), weight.size(2), 1}, y);
      });
    });
    if (done) return;
    for_each_block(blocks, [&](const Block& b) {
      const Tensor a = activated<decltype(act)>(pre, b, weight.size(2), gated);
      call_aten("aten::linear", "out", a, item_of(weight, b.expert), item_of(bias, b.expert),
                rows_of(y, b.begin, b.count));
    });
  });
  return weights ? call_aten("moe_kernels::combine", "", y, *weights, *position) : y;
}

// One row of the hidden gradient: da, z, in the gated case the second half of z, and where the results go.
template <class T>
struct Row {
  const T *da, *z, *second;
  T *dz, *dsecond, *weighted;
};

// Writes a row of dz and of s * act(z); returns <da, act(z)>: kTerms sums side by side, then their tree.
template <class Activation, bool gated, class T>
acc_t<T> hidden_grad_row(const Row<T> row, int64_t n, acc_t<T> s) {
  using A = acc_t<T>;
  A sum[kTerms] = {};
  for (int64_t c0 = 0; c0 < n; c0 += kTerms) {
    const int64_t terms = std::min(kTerms, n - c0);
#pragma omp simd
    for (int64_t i = 0; i < terms; ++i) {
      const int64_t c = c0 + i;
      const Point<A> at = Activation::at(static_cast<A>(row.z[c]));
      const A g = static_cast<A>(row.da[c]), gate = gated ? static_cast<A>(row.second[c]) : A(1);
      sum[i] += g * at.value * gate;
      store(row.dz[c], s * g * at.slope * gate);
      if (gated) store(row.dsecond[c], s * g * at.value);
      store(row.weighted[c], s * at.value * gate);
    }
  }
  for (int64_t half = kTerms / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

// da [N, n], z [N, n] or [N, 2 n] of a gated activation, weights [N] -> dz like z, weights * act(z) [N, n], <da,
// act(z)> [N]; empty where not needed.
std::tuple<Tensor, Tensor, Tensor> expert_mlp_hidden_grad(const Tensor& da, const Tensor& z, const Tensor& weights,
                                                          StringHandle activation, bool z_needs, bool weight_needs,
                                                          bool weights_needs) {
  const int64_t count = da.size(0), n = da.size(1);
  MOE_CHECK(weights.numel() == count && weights.scalar_type() == accumulate_type(da.scalar_type()), "weights must be ",
            count, " numbers in the precision of the sums");
  const Tensor grad = as_contiguous(da), pre = as_contiguous(z), scale = as_contiguous(weights);
  const Shape none{0};
  Tensor weighted = new_tensor(da, weight_needs ? Shape{count, n} : none);
  Tensor dweights = new_tensor(weights, weights_needs ? Shape{count} : none), dz;
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
      A* to_dweights = mutable_data<A>(dweights);
      torch::stable::parallel_for(0, count, grain(16 * n), [&](int64_t first, int64_t last) {
        std::vector<T> unwanted(width);  // where a result goes that nobody needs
        for (int64_t i = first; i < last; ++i) {
          T* dz_row = z_needs ? to_dz + i * width : unwanted.data();
          T* weighted_row = weight_needs ? to_weighted + i * n : unwanted.data();
          const Row<T> row{g + i * n, src + i * width, src + i * width + n, dz_row, dz_row + n, weighted_row};
          const A dot = gated ? hidden_grad_row<decltype(act), true>(row, n, s[i])
                              : hidden_grad_row<decltype(act), false>(row, n, s[i]);
          if (weights_needs) to_dweights[i] = dot;
        }
      });
    });
  });
  return {dz, weighted, dweights};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("expert_mlp_output", TORCH_BOX(&moe::expert_mlp_output));
  m.impl("expert_mlp_hidden_grad", TORCH_BOX(&moe::expert_mlp_hidden_grad));
}
