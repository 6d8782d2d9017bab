// expert_batch_norm FOLDER op dtype images channels pixels experts by_pixel training eps: arrays of an operator's
// arguments, of which those without a file are absent -> its results
#include "cuda/expert_batch_norm.cuh"

#include "driver.h"

template <class T>
void run(char** argv) {
  const std::string folder = argv[1], op = argv[2];
  const int64_t images = std::stol(argv[4]), channels = std::stol(argv[5]), pixels = std::stol(argv[6]),
                experts = std::stol(argv[7]);
  const bool by_pixel = std::stoi(argv[8]), training = std::stoi(argv[9]);
  const double eps = std::stod(argv[10]);
  using A = moe::wide_t<T>;
  auto offsets = simt::read<int32_t>(folder + "/offsets");
  auto x = simt::read<T>(folder + "/x"), grad = simt::read<T>(folder + "/grad");
  auto weight = simt::read<A>(folder + "/weight"), bias = simt::read<A>(folder + "/bias");
  auto mean = simt::read<A>(folder + "/mean"), var = simt::read<A>(folder + "/var");
  auto dbias = simt::read<A>(folder + "/dbias"), dweight = simt::read<A>(folder + "/dweight");
  const moe::NormBatch b{offsets.data(), experts, channels, pixels, images, by_pixel};
  const auto given = [](auto& array) { return array.size() ? array.data() : nullptr; };
  const auto results = simt::in_every_order([&] {
    const int64_t table = experts * channels, elements = images * channels * pixels;
    auto partial = simt::poisoned<moe::Pair>(moe::norm_partial_rows(b) * channels);
    auto coefficients = simt::poisoned<moe::NormCoefficients<A>>(table);
    auto out = std::tuple(simt::poisoned<T>(op == "param_grad" ? 0 : elements),
                          simt::poisoned<A>(op == "input_grad" ? 0 : table),
                          simt::poisoned<A>(op == "input_grad" ? 0 : table));
    T* y = std::get<0>(out).data();
    A *first = std::get<1>(out).data(), *second = std::get<2>(out).data();
    if (op == "forward") {
      moe::launch_norm_forward(b, x.data(), given(weight), given(bias), given(mean), given(var), eps,
                               training ? partial.data() : nullptr, coefficients.data(), y, first, second, nullptr);
    } else if (op == "param_grad") {
      moe::launch_norm_param_grad(b, grad.data(), x.data(), mean.data(), var.data(), eps, partial.data(), first, second,
                                  nullptr);
    } else {
      moe::launch_norm_input_grad(b, grad.data(), given(x), given(weight), given(mean), var.data(), given(dbias),
                                  given(dweight), eps, coefficients.data(), y, nullptr);
    }
    return out;
  });
  auto [y, first, second] = results;
  simt::write(folder + "/y", y);
  simt::write(folder + "/first", first);
  simt::write(folder + "/second", second);
}

int main(int, char** argv) {
  simt::with_float(argv[3], [&](auto zero) { run<decltype(zero)>(argv); });
}
