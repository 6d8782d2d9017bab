// The second half of an expert MLP and the backward through its activation, which is never stored: it is computed from
// the pre-activation a few rows at a time.
#include "common/blocks.h"

namespace moe {
namespace {

using torch::stable::narrow;
using torch::stable::select;

constexpr int64_t kElements = 1 << 14;  // activations of a block: its temporaries stay in L2
constexpr int64_t kTerms = 64;          // products summed before they join the total: rounding errors grow with n / 64

// An activation and its gradient: the vectorised functions of ATen, where they are more than a comparison.
class Activation {
 public:
  explicit Activation(const std::string& name) : name_(name), gated_(name == "swiglu" || name == "geglu") {
    if (gated_) name_ = name == "swiglu" ? "silu" : "gelu";
    MOE_CHECK(name_ == "relu" || name_ == "relu2" || name_ == "gelu" || name_ == "silu",
              "activation must be relu, gelu, silu, relu2, swiglu or geglu, got ", name);
  }

  bool gated() const { return gated_; }

  // z [N, n], or [N, 2 n] if gated -> [N, n]
  Tensor operator()(const Tensor& z) const {
    if (!gated_) return forward(z);
    Tensor both = z;
    const int64_t n = z.size(1) / 2;
    return call_aten("aten::mul", "Tensor", forward(as_contiguous(narrow(both, 1, 0, n))), narrow(both, 1, n, n));
  }

  Tensor forward(const Tensor& z) const {
    if (name_ == "gelu") return call_aten("aten::gelu", "", z, std::string("none"));
    if (name_ == "silu") return call_aten("aten::silu", "", z);
    const Tensor positive = call_aten("aten::relu", "", z);
    return name_ == "relu" ? positive : call_aten("aten::square", "", positive);
  }

  Tensor backward(const Tensor& grad, const Tensor& z) const {
    if (name_ == "gelu") return call_aten("aten::gelu_backward", "", grad, z, std::string("none"));
    if (name_ == "silu") return call_aten("aten::silu_backward", "", grad, z);
    const Tensor dense = as_contiguous(z);
    Tensor out = new_tensor(grad, shape(grad));
    dispatch_float(z.scalar_type(), "z", [&](auto zero) {
      using T = decltype(zero);
      using A = acc_t<T>;
      const T *g = data<T>(grad), *src = data<T>(dense);
      T* dst = mutable_data<T>(out);
      const A linear = name_ == "relu" ? 1 : 0, square = 1 - linear;
      for (int64_t i = 0; i < z.numel(); ++i) {
        const A v = static_cast<A>(src[i]), slope = linear + 2 * square * v;
        dst[i] = static_cast<T>(v <= 0 ? A(0) : slope * static_cast<A>(g[i]));
      }
    });
    return out;
  }

 private:
  std::string name_;
  bool gated_;
};

// Inner product of n terms, in the order of the columns.
template <class T>
acc_t<T> dot(const T* a, const T* b, int64_t n) {
  acc_t<T> total = 0;
  for (int64_t c0 = 0; c0 < n; c0 += kTerms) {
    acc_t<T> part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t c = c0; c < std::min(c0 + kTerms, n); ++c) {
      part += static_cast<acc_t<T>>(a[c]) * static_cast<acc_t<T>>(b[c]);
    }
    total += part;
  }
  return total;
}

// z [N, n] or [N, 2 n], weight [E, d, n], bias [E, d], offsets [E + 1] -> [N, d]; with weights and position [T, k]
// their combination [T, d]
Tensor expert_mlp_output(const Tensor& z, const Tensor& weight, const OptionalTensor& bias, const Tensor& offsets,
                         StringHandle activation_name, const OptionalTensor& weights, const OptionalTensor& position,
                         const OptionalTensor&) {
  const Activation activation(take_string(activation_name));
  const auto blocks = row_blocks(read_offsets(offsets, weight.size(0), z.size(0)), kGemmRows);
  const Tensor pre = as_contiguous(z);
  Tensor y = new_tensor(z, {z.size(0), weight.size(1)});
  for_each_block(blocks, [&](const Block& b) {
    Tensor source = pre, target = y;
    call_aten("aten::linear", "out", activation(narrow(source, 0, b.begin, b.count)), select(weight, 0, b.expert),
              bias ? OptionalTensor(select(*bias, 0, b.expert)) : std::nullopt, narrow(target, 0, b.begin, b.count));
  });
  return weights ? call_aten("moe_kernels::combine", "", y, *weights, *position) : y;
}

// da [N, n], z [N, n] or [N, 2 n] of a gated activation, weights [N] -> dz like z, weights * act(z) [N, n], <da,
// act(z)> [N]; empty where not needed.
std::tuple<Tensor, Tensor, Tensor> expert_mlp_hidden_grad(const Tensor& da, const Tensor& z, const Tensor& weights,
                                                          StringHandle activation_name, bool z_needs, bool weight_needs,
                                                          bool weights_needs) {
  const Activation activation(take_string(activation_name));
  const int64_t count = da.size(0), n = da.size(1), width = activation.gated() ? 2 * n : n;
  MOE_CHECK(z.dim() == 2 && z.size(0) == count && z.size(1) == width, "z must be [", count, ", ", width, "]");
  MOE_CHECK(weights.numel() == count && weights.scalar_type() == accumulate_type(da.scalar_type()), "weights must be ",
            count, " numbers in the precision of the sums");
  const Tensor grad = as_contiguous(da), pre = as_contiguous(z), scale = as_contiguous(weights);
  const Shape none{0};
  Tensor dz = new_tensor(z, z_needs ? Shape{count, width} : none);
  Tensor weighted = new_tensor(da, weight_needs ? Shape{count, n} : none);
  Tensor dweights = new_tensor(weights, weights_needs ? Shape{count} : none);
  const int64_t rows = std::max<int64_t>(1, kElements / std::max<int64_t>(1, n));
  for_each_block(row_blocks({0, count}, rows), [&](const Block& b) {
    Tensor source = pre;
    source = narrow(source, 0, b.begin, b.count);
    const Tensor first = as_contiguous(narrow(source, 1, 0, n));
    const Tensor a = activation.forward(first), scaled = new_tensor(da, {b.count, n});
    dispatch_float(da.scalar_type(), "da", [&](auto zero) {
      using T = decltype(zero);
      using A = acc_t<T>;
      const A* s = data<A>(scale) + b.begin;
      const T* g = data<T>(grad) + b.begin * n;
      const T* second = activation.gated() ? data<T>(pre) + b.begin * width + n : nullptr;
      T *act = mutable_data<T>(a), *sg = mutable_data<T>(scaled);
      T* dz_rows = z_needs ? mutable_data<T>(dz) + b.begin * width : nullptr;
      for (int64_t i = 0; i < b.count; ++i) {
        for (int64_t c = 0; c < n && z_needs; ++c) {
          const A v = s[i] * static_cast<A>(g[i * n + c]);
          sg[i * n + c] = static_cast<T>(second ? v * static_cast<A>(second[i * width + c]) : v);
          if (second) dz_rows[i * width + n + c] = static_cast<T>(v * static_cast<A>(act[i * n + c]));
        }
        for (int64_t c = 0; c < n && second; ++c) {
          act[i * n + c] = static_cast<T>(static_cast<A>(act[i * n + c]) * static_cast<A>(second[i * width + c]));
        }
        if (weights_needs) mutable_data<A>(dweights)[b.begin + i] = dot(g + i * n, act + i * n, n);
        T* out = weight_needs ? mutable_data<T>(weighted) + (b.begin + i) * n : nullptr;
        for (int64_t c = 0; c < n && weight_needs; ++c) out[c] = static_cast<T>(s[i] * static_cast<A>(act[i * n + c]));
      }
    });
    if (!z_needs) return;
    Tensor target = dz;
    target = narrow(target, 0, b.begin, b.count);
    target = narrow(target, 1, 0, n);
    torch::stable::copy_(target, activation.backward(scaled, first));
  });
  return {dz, weighted, dweights};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("expert_mlp_output", TORCH_BOX(&moe::expert_mlp_output));
  m.impl("expert_mlp_hidden_grad", TORCH_BOX(&moe::expert_mlp_hidden_grad));
}
