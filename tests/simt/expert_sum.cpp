// expert_sum FOLDER op dtype count rows width: x and offsets or index -> out
#include "cuda/expert_sum.cuh"

#include "driver.h"

template <class T>
void run(char** argv) {
  const std::string folder = argv[1], op = argv[2];
  const int64_t count = std::stol(argv[4]), rows = std::stol(argv[5]), width = std::stol(argv[6]);
  auto x = simt::read<T>(folder + "/x");
  auto offsets = simt::read<int32_t>(folder + "/offsets"), index = simt::read<int32_t>(folder + "/index");
  auto out = simt::in_every_order([&] {
    auto result = simt::poisoned<T>(rows * width);
    if (op == "expert_sum") {
      auto partial = simt::poisoned<moe::wide_t<T>>(moe::partial_rows(count, rows) * width);
      moe::launch_expert_sum(x.data(), offsets.data(), partial.data(), result.data(), count, rows, width, nullptr);
    } else {
      auto scratch = simt::poisoned<int32_t>(moe::index_sum_scratch(count, rows));
      moe::launch_index_sum(x.data(), index.data(), scratch.data(), result.data(), count, rows, width, nullptr);
    }
    return result;
  });
  simt::write(folder + "/out", out);
}

int main(int, char** argv) {
  simt::with_float(argv[3], [&](auto zero) { run<decltype(zero)>(argv); });
}
