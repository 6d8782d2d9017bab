// pgd_step_ FOLDER dtype grad_dtype batch size shift norm low high inner: x_adv, grad, x, eps, alpha, and mean and std
// for a model input -> out, model_input
// float64 takes a float64 gradient only: every pair of types costs two seconds of compilation.
#include "cuda/pgd_step_.cuh"

#include "driver.h"

template <class T, class G>
void run(char** argv) {
  const std::string folder = argv[1], norm = argv[7];
  const int64_t batch = std::stol(argv[4]), size = std::stol(argv[5]), shift = std::stol(argv[6]);
  auto grad = simt::read<G>(folder + "/grad", shift);
  auto x = simt::read<T>(folder + "/x", shift), eps = simt::read<T>(folder + "/eps");
  auto alpha = simt::read<T>(folder + "/alpha"), mean = simt::read<T>(folder + "/mean"),
       std = simt::read<T>(folder + "/std");
  const int64_t channels = mean.size(), inner = std::stol(argv[10]);
  auto results = simt::in_every_order([&] {
    auto x_adv = simt::read<T>(folder + "/x_adv", shift);
    auto input = simt::poisoned<G>(channels ? x.size() : 0, shift);
    const moe::ModelInput<T, G> model_input{channels ? input.data() : nullptr, mean.data(), std.data(), channels,
                                            inner};
    moe::launch_pgd_step(
        moe::PgdBatch<T, G>{x_adv.data(), grad.data(), x.data(), eps.data(), alpha.data(), batch, size, eps.size() > 1,
                            alpha.size() > 1, T(std::stod(argv[8])), T(std::stod(argv[9])), model_input},
        norm == "Linf" ? moe::Norm::Linf
        : norm == "L2" ? moe::Norm::L2
                       : moe::Norm::L1,
        nullptr);
    return std::tuple{x_adv, input};
  });
  simt::write(folder + "/out", std::get<0>(results));
  simt::write(folder + "/model_input", std::get<1>(results));
}

int main(int, char** argv) {
  if (std::string(argv[3]) == "float64") {
    std::string(argv[2]) == "float64" ? run<double, double>(argv) : run<float, double>(argv);
    return 0;
  }
  simt::with_float(argv[3], [&](auto g) { run<float, decltype(g)>(argv); });
}
