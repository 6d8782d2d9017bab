// What every operator needs of torch: aliases, checks, allocation, the switch over dtypes, calls into ATen. Through
// torch's stable ABI alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace moe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

// Throws an error of one line, a ValueError in Python. Not to be called inside parallel_for, which loses the message:
// what a user can get wrong is checked before.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

#define MOE_CHECK(condition, ...)               \
  do {                                          \
    if (!(condition)) ::moe::fail(__VA_ARGS__); \
  } while (0)

inline Shape shape(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }
inline Shape strides(const Tensor& t) { return {t.strides().begin(), t.strides().end()}; }

// An uninitialised tensor [sizes] on the device of `like`, of its dtype unless another is given.
inline Tensor new_tensor(const Tensor& like, const Shape& sizes, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// Calls the operator `name.overload`, such as aten::linear.out, behind which is the vendor's GEMM, and returns its
// first n_out results: one as a Tensor, several as an array.
template <size_t n_out = 1, class... Args>
auto call_aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  static_assert(n_out <= sizeof...(Args));
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  if constexpr (n_out == 1) {
    return torch::stable::detail::to<Tensor>(stack[0]);
  } else {
    std::array<Tensor, n_out> out;
    for (size_t i = 0; i < n_out; ++i) out[i] = torch::stable::detail::to<Tensor>(stack[i]);
    return out;
  }
}

// Switches autograd off for the current thread while it lives: worker threads start with it on.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

// t: any shape -> t, or a contiguous copy
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The arithmetic type of a storage type: 16-bit floats are computed in float.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;
inline ScalarType accumulate_type(ScalarType t) { return t == ScalarType::Double ? t : ScalarType::Float; }

// to = value, rounded. It can be vectorised, which the assignment of a 16-bit float, a struct, cannot.
template <class T>
inline void store(T& to, acc_t<T> value) {
  if constexpr (sizeof(T) == 2) {
    to.x = T(value).x;
  } else {
    to = value;
  }
}

// Operations on elements that are worth a thread. A `combine` of 256 x 2 x 256 takes 0.70 of the time with 4096
// and 1.10 with 262144 where threads spin between calls, 0.97 and 0.32 where they sleep (tuned-constants.md).
constexpr int64_t kTaskWork = 32768;

// The fewest items of a parallel_for's task, where an item takes `work` operations on elements.
inline int64_t grain(int64_t work) { return std::max<int64_t>(1, kTaskWork / std::max<int64_t>(1, work)); }

// The string argument of an operator, which is freed. torch's own conversion (2.11 to 2.13) leaks it in every call.
inline std::string take_string(StringHandle handle) {
  const char* chars;
  size_t length;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &chars));
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  std::string out(chars, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return out;
}

// Calls f with a zero of the C++ type that `dtype` names. `argument` is the name in the error message.
template <class F>
void dispatch_float(ScalarType dtype, const char* argument, F&& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    default:
      fail(argument, " must be float64, float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  }
}

// The elements of a tensor of any shape, in memory order.
template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace moe
