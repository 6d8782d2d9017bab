// mask_relu FOLDER op dtype count shift: x -> y, bits; grad, bits -> out
#include "cuda/mask_relu.cuh"

#include "driver.h"

template <class T>
void run(char** argv) {
  const std::string folder = argv[1], op = argv[2];
  const int64_t count = std::stol(argv[4]), shift = std::stol(argv[5]);
  if (op == "mask_relu_forward") {
    auto x = simt::read<T>(folder + "/x", shift);
    auto [y, bits] = simt::in_every_order([&] {
      auto result = std::tuple(simt::poisoned<T>(count, shift), simt::poisoned<uint8_t>((count + 7) / 8));
      moe::launch_mask_relu(x.data(), std::get<0>(result).data(), std::get<1>(result).data(), count, nullptr);
      return result;
    });
    simt::write(folder + "/y", y);
    simt::write(folder + "/bits", bits);
  } else {
    auto grad = simt::read<T>(folder + "/grad", shift);
    auto bits = simt::read<uint8_t>(folder + "/bits");
    auto out = simt::in_every_order([&] {
      auto result = simt::poisoned<T>(count, shift);
      moe::launch_mask_relu_backward(grad.data(), bits.data(), result.data(), count, nullptr);
      return result;
    });
    simt::write(folder + "/out", out);
  }
}

int main(int, char** argv) {
  simt::with_float(argv[3], [&](auto zero) { run<decltype(zero)>(argv); });
}
