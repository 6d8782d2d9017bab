// topk_route FOLDER op dtype rows experts k gate renormalize: logits -> weights, experts; grad, logits, experts -> out
#include "cuda/topk_route.cuh"

#include "driver.h"

template <class T>
void run(char** argv) {
  const std::string folder = argv[1], op = argv[2];
  const int64_t rows = std::stol(argv[4]);
  const int num_experts = std::stoi(argv[5]), k = std::stoi(argv[6]);
  const moe::Routing routing{rows, num_experts, k, moe::read_gate(argv[7], std::stoi(argv[8]))};
  using A = moe::wide_t<T>;
  auto logits = simt::read<T>(folder + "/logits");
  if (op == "topk_route") {
    auto [weights, experts] = simt::in_every_order([&] {
      auto result = std::tuple(simt::poisoned<A>(rows * k), simt::poisoned<int32_t>(rows * k));
      moe::launch_topk_route(routing, logits.data(), std::get<0>(result).data(), std::get<1>(result).data(), nullptr);
      return result;
    });
    simt::write(folder + "/weights", weights);
    simt::write(folder + "/experts", experts);
  } else {
    auto grad = simt::read<A>(folder + "/grad");
    auto experts = simt::read<int32_t>(folder + "/experts");
    auto out = simt::in_every_order([&] {
      auto result = simt::poisoned<T>(rows * num_experts);
      moe::launch_topk_route_backward(routing, grad.data(), logits.data(), experts.data(), result.data(), nullptr);
      return result;
    });
    simt::write(folder + "/out", out);
  }
}

int main(int, char** argv) {
  simt::with_float(argv[3], [&](auto zero) { run<decltype(zero)>(argv); });
}
