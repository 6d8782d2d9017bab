// kl_divergence FOLDER op dtype rows classes clean_needs adv_needs: clean, adv -> out; grad, clean, adv -> dclean, dadv
#include "cuda/kl_divergence.cuh"

#include "driver.h"

template <class T>
void run(char** argv) {
  const std::string folder = argv[1], op = argv[2];
  const int64_t rows = std::stol(argv[4]), classes = std::stol(argv[5]);
  using A = moe::wide_t<T>;
  auto clean = simt::read<T>(folder + "/clean"), adv = simt::read<T>(folder + "/adv");
  if (op == "kl_divergence") {
    auto out = simt::in_every_order([&] {
      auto result = simt::poisoned<A>(rows);
      moe::launch_kl_divergence(clean.data(), adv.data(), result.data(), rows, classes, nullptr);
      return result;
    });
    return simt::write(folder + "/out", out);
  }
  const bool clean_needs = std::stoi(argv[6]), adv_needs = std::stoi(argv[7]);
  auto grad = simt::read<A>(folder + "/grad");
  auto [dclean, dadv] = simt::in_every_order([&] {
    auto result =
        std::tuple(simt::poisoned<T>(clean_needs * rows * classes), simt::poisoned<T>(adv_needs * rows * classes));
    moe::launch_kl_divergence_backward<T>(grad.data(), clean.data(), adv.data(),
                                          clean_needs ? std::get<0>(result).data() : nullptr,
                                          adv_needs ? std::get<1>(result).data() : nullptr, rows, classes, nullptr);
    return result;
  });
  simt::write(folder + "/dclean", dclean);
  simt::write(folder + "/dadv", dadv);
}

int main(int, char** argv) {
  simt::with_float(argv[3], [&](auto zero) { run<decltype(zero)>(argv); });
}
