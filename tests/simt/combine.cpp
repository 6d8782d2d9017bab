// combine FOLDER op dtype rows k width shift: position and two of y, grad, weights -> out
#include "cuda/combine.cuh"

#include "driver.h"

template <class T>
void run(char** argv) {
  const std::string folder = argv[1], op = argv[2];
  const int64_t rows = std::stol(argv[4]), k = std::stol(argv[5]), width = std::stol(argv[6]),
                shift = std::stol(argv[7]);
  using A = moe::wide_t<T>;
  auto position = simt::read<int32_t>(folder + "/position");
  auto y = simt::read<T>(folder + "/y", shift), grad = simt::read<T>(folder + "/grad", shift);
  auto weights = simt::read<A>(folder + "/weights");
  const moe::Slots slots{position.data(), rows, k, width};
  if (op == "combine_weight_grad") {
    auto out = simt::in_every_order([&] {
      auto result = simt::poisoned<A>(rows * k);
      moe::launch_combine_weight_grad(slots, grad.data(), y.data(), result.data(), nullptr);
      return result;
    });
    return simt::write(folder + "/out", out);
  }
  auto out = simt::in_every_order([&] {
    auto result = simt::poisoned<T>((op == "combine" ? rows : rows * k) * width, shift);
    if (op == "combine") {
      moe::launch_combine(slots, y.data(), weights.data(), result.data(), nullptr);
    } else {
      moe::launch_combine_input_grad(slots, grad.data(), weights.data(), result.data(), nullptr);
    }
    return result;
  });
  simt::write(folder + "/out", out);
}

int main(int, char** argv) {
  simt::with_float(argv[3], [&](auto zero) { run<decltype(zero)>(argv); });
}
