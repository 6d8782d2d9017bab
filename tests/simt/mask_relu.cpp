// mask_relu FOLDER op dtype count shift low high slope: x -> y, bits; grad, bits -> out; high and slope may be none
#include "cuda/mask_relu.cuh"

#include "driver.h"

std::optional<double> read_optional(const std::string& text) {
  return text == "none" ? std::nullopt : std::optional(std::stod(text));
}

template <class T>
void run(char** argv) {
  const std::string folder = argv[1], op = argv[2];
  const moe::Rectifier<moe::wide_t<T>> rectifier(std::stod(argv[6]), read_optional(argv[7]), read_optional(argv[8]));
  const int64_t count = std::stol(argv[4]), shift = std::stol(argv[5]);
  if (op == "mask_relu_forward") {
    auto x = simt::read<T>(folder + "/x", shift);
    auto [y, bits] = simt::in_every_order([&] {
      auto result = std::tuple(simt::poisoned<T>(count, shift), simt::poisoned<uint8_t>((count + 7) / 8));
      moe::launch_mask_relu(x.data(), std::get<0>(result).data(), std::get<1>(result).data(), count, rectifier,
                            nullptr);
      return result;
    });
    simt::write(folder + "/y", y);
    simt::write(folder + "/bits", bits);
  } else {
    auto grad = simt::read<T>(folder + "/grad", shift);
    auto bits = simt::read<uint8_t>(folder + "/bits");
    auto out = simt::in_every_order([&] {
      auto result = simt::poisoned<T>(count, shift);
      moe::launch_mask_relu_backward(grad.data(), bits.data(), result.data(), count, rectifier, nullptr);
      return result;
    });
    simt::write(folder + "/out", out);
  }
}

int main(int, char** argv) {
  simt::with_float(argv[3], [&](auto zero) { run<decltype(zero)>(argv); });
}
