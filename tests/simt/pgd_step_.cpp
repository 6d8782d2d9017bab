// pgd_step_ FOLDER dtype grad_dtype batch size shift norm low high: x_adv, grad, x, eps, alpha -> out
// float64 takes a float64 gradient only: every pair of types costs two seconds of compilation.
#include "cuda/pgd_step_.cuh"

#include "driver.h"

template <class T, class G>
void run(char** argv) {
  const std::string folder = argv[1], norm = argv[7];
  const int64_t batch = std::stol(argv[4]), size = std::stol(argv[5]), shift = std::stol(argv[6]);
  auto grad = simt::read<G>(folder + "/grad", shift);
  auto x = simt::read<T>(folder + "/x", shift), eps = simt::read<T>(folder + "/eps");
  auto alpha = simt::read<T>(folder + "/alpha");
  auto out = simt::in_every_order([&] {
    auto x_adv = simt::read<T>(folder + "/x_adv", shift);
    moe::launch_pgd_step(
        moe::PgdBatch<T, G>{x_adv.data(), grad.data(), x.data(), eps.data(), alpha.data(), batch, size, eps.size() > 1,
                            alpha.size() > 1, T(std::stod(argv[8])), T(std::stod(argv[9]))},
        norm == "Linf" ? moe::Norm::Linf
        : norm == "L2" ? moe::Norm::L2
                       : moe::Norm::L1,
        nullptr);
    return x_adv;
  });
  simt::write(folder + "/out", out);
}

int main(int, char** argv) {
  if (std::string(argv[3]) == "float64") {
    std::string(argv[2]) == "float64" ? run<double, double>(argv) : run<float, double>(argv);
    return 0;
  }
  simt::with_float(argv[3], [&](auto g) { run<float, decltype(g)>(argv); });
}
