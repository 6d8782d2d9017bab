// group_by_expert FOLDER dtype num_experts: experts -> order, position, offsets
#include "cuda/group_by_expert.cuh"

#include "driver.h"

template <class Id>
void run(char** argv) {
  const std::string folder = argv[1];
  const int64_t num_experts = std::stol(argv[3]);
  auto experts = simt::read<Id>(folder + "/experts");
  const int64_t slots = experts.size();
  auto [order, position, offsets] = simt::in_every_order([&] {
    auto scratch = simt::poisoned<int32_t>(moe::sort_scratch(slots, num_experts));
    auto result = std::tuple(simt::poisoned<int32_t>(slots), simt::poisoned<int32_t>(slots),
                             simt::poisoned<int32_t>(num_experts + 1));
    moe::launch_group_by_expert(experts.data(), slots, num_experts, scratch.data(), std::get<0>(result).data(),
                                std::get<1>(result).data(), std::get<2>(result).data(), nullptr);
    return result;
  });
  simt::write(folder + "/order", order);
  simt::write(folder + "/position", position);
  simt::write(folder + "/offsets", offsets);
}

int main(int, char** argv) { std::string(argv[2]) == "int64" ? run<int64_t>(argv) : run<int32_t>(argv); }
