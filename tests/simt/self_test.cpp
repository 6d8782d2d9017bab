// self_test NAME: one small kernel, correct or with one planted fault; prints what it computed.
#include "cuda/launch.cuh"
#include "driver.h"

namespace {

constexpr int kThreads = 64;

// Each thread reads its neighbour's number; without the barrier, whether it is there yet depends on the order.
template <bool barrier>
void neighbour(int* out) {
  __shared__ int numbers[kThreads];
  numbers[threadIdx.x] = 0;
  __syncthreads();
  numbers[threadIdx.x] = threadIdx.x + 1;
  if (barrier) __syncthreads();
  out[threadIdx.x] = numbers[(threadIdx.x + 1) % kThreads];
}

// The value that the last block to run leaves.
void order_of_blocks(int* out) {
  if (threadIdx.x == 0) out[0] = blockIdx.x;
}

// A sum to which threads add in the order in which they run; every addition rounds.
void unordered_sum(int* out) {
  __shared__ float sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, 1.0f / (1 + threadIdx.x));
  __syncthreads();
  std::memcpy(&out[threadIdx.x], &sum, sizeof(sum));
}

void shared_overflow(int* out) {
  __shared__ int numbers[kThreads];
  numbers[threadIdx.x + (threadIdx.x == kThreads - 1)] = 1;
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x];
}

void dynamic_overflow(int* out) {
  int* numbers = simt::dynamic_shared<int>();
  numbers[threadIdx.x + 1] = 1;
  out[threadIdx.x] = numbers[threadIdx.x];
}

void global_overflow(int* out) { out[threadIdx.x + 1] = 1; }

void barrier_after_return(int* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

void two_barriers(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

void mask_names_returned_lane(int* out) {
  if (threadIdx.x % 32 == 7) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}

void mask_omits_the_caller(int* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0); }

void reads_lane_outside_the_mask(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}

void shuffle_meets_barrier(int* out) {
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __ballot_sync(0xffffffffu, 1);
  } else {
    __syncthreads();
  }
}

// Every operation once, with the value that a GPU gives.
void everything(int* out) {
  __shared__ int total;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int* counts = simt::dynamic_shared<int>();
  if (threadIdx.x == 0) total = 0, counts[0] = 0, counts[1] = 7;
  __syncthreads();
  int sum = threadIdx.x;
  for (int by = 1; by < 32; by *= 2) {
    const int below = __shfl_up_sync(~0u, sum, by);
    if (lane >= by) sum += below;
  }
  const int last = __shfl_sync(~0u, sum, 31);
  bool right = last == (warp ? 1520 : 496) && __shfl_down_sync(~0u, lane, 1, 8) == (lane % 8 == 7 ? lane : lane + 1);
  right &= __shfl_xor_sync(~0u, double(lane), 3) == (lane ^ 3);
  right &= __ballot_sync(~0u, lane % 2) == 0xaaaaaaaau && __any_sync(~0u, lane == 9) && !__all_sync(~0u, lane == 9);
  right &= __match_any_sync(~0u, lane % 2) == (lane % 2 ? 0xaaaaaaaau : 0x55555555u);
  if (lane < 4) right &= __shfl_sync(0xfu, lane, 2) == 2;
  __syncwarp();
  atomicAdd(&total, 1);
  atomicMax(&counts[0], static_cast<int>(threadIdx.x));
  atomicCAS(&counts[1], 7, warp);
  __syncthreads();
  right &= total == kThreads && counts[0] == kThreads - 1 && counts[1] < 2 && blockDim.x == kThreads;
  out[threadIdx.x] = right;
}

}  // namespace

int main(int, char** argv) {
  if (std::string(argv[1]) == "built_for_another_gpu") moe::cuda_check(cudaErrorNoKernelImageForDevice, "combine");
  const std::pair<const char*, void (*)(int*)> kernels[] = {
      {"everything", everything},
      {"neighbour", neighbour<true>},
      {"race", neighbour<false>},
      {"order_of_blocks", order_of_blocks},
      {"unordered_sum", unordered_sum},
      {"shared_overflow", shared_overflow},
      {"dynamic_overflow", dynamic_overflow},
      {"global_overflow", global_overflow},
      {"barrier_after_return", barrier_after_return},
      {"two_barriers", two_barriers},
      {"mask_names_returned_lane", mask_names_returned_lane},
      {"mask_omits_the_caller", mask_omits_the_caller},
      {"reads_lane_outside_the_mask", reads_lane_outside_the_mask},
      {"shuffle_meets_barrier", shuffle_meets_barrier},
  };
  for (const auto& [name, kernel] : kernels) {
    if (std::string(argv[1]) != name) continue;
    auto out = simt::in_every_order([kernel = kernel] {
      simt::Array<int> result{std::vector<int>(kThreads), 0};
      cudaLaunchConfig_t config = {dim3(2), dim3(kThreads), kThreads * sizeof(int), nullptr};
      cudaLaunchKernelEx(&config, kernel, result.data());
      return result;
    });
    for (int v : out.memory) std::printf("%d ", v);
  }
}
