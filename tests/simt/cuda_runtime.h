// CUDA blocks on the CPU: stands in for the toolkit's header, so that a .cuh compiles with g++ and runs under its
// sanitizers. The blocks run one after the other, the threads of a block as fibers of one OS thread: one runs until it
// waits or returns. simt::order chooses both orders, so that a result that depends on them shows. A block ends with a
// message on stderr and exit status 70 if threads wait for one that cannot come, or read a lane that takes no part.
// Shared memory is static, and so not cleared between blocks; dynamic shared memory is new and filled with 0xff.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using uint3 = dim3;
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 15;

inline int order = 0;  // of blocks and threads: 0 ascending, 1 descending, else a seed to shuffle (threads: each round)

template <class... Parts>
[[noreturn]] void fail(const char* format, Parts... parts) {
  std::fprintf(stderr, "simt: block %u: ", blockIdx.x);
  std::fprintf(stderr, format, parts...);
  std::fputc('\n', stderr);
  std::_Exit(70);
}

enum class State { kReady, kBarrier, kWarp, kDone };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  int line;          // of the barrier or warp operation at which it waits
  unsigned mask;     // of that warp operation
  uint64_t given;    // its operand
  uint64_t got[32];  // every lane's operand, once all have come
};

struct Block {
  std::vector<Thread> threads;
  std::function<void()> kernel;
  std::vector<char> dynamic_shared;
  ucontext_t scheduler;
  const void* scheduler_stack;
  size_t scheduler_stack_size;
  int current;
};

inline Block block;

// Switches from the scheduler to thread t, until that waits or returns.
inline void resume(int t) {
  Thread& thread = block.threads[t];
  block.current = t;
  threadIdx = uint3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, thread.stack.get(), kStack);
  swapcontext(&block.scheduler, &thread.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// Switches from the running thread back to the scheduler; returns when the wait is over.
inline void wait(State state, int line) {
  Thread& thread = block.threads[block.current];
  thread.state = state;
  thread.line = line;
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, block.scheduler_stack, block.scheduler_stack_size);
  swapcontext(&thread.context, &block.scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

inline void thread_main() {
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
  block.kernel();
  block.threads[block.current].state = State::kDone;
  __sanitizer_start_switch_fiber(nullptr, block.scheduler_stack, block.scheduler_stack_size);
  setcontext(&block.scheduler);
}

// Lets the threads continue that wait at the block's barrier, if all of them do.
inline bool release_barrier() {
  const auto count = [](State s) {
    return std::count_if(block.threads.begin(), block.threads.end(), [=](const Thread& t) { return t.state == s; });
  };
  const long waiting = count(State::kBarrier), done = count(State::kDone), all = block.threads.size();
  if (waiting == 0 || waiting + done < all) return false;
  const auto at = std::find_if(block.threads.begin(), block.threads.end(),
                               [](const Thread& t) { return t.state == State::kBarrier; });
  if (done > 0) fail("%ld threads wait at the barrier of line %d, %ld have returned", waiting, at->line, done);
  for (Thread& t : block.threads) {
    if (t.line != at->line) fail("threads wait at different barriers, lines %d and %d", at->line, t.line);
    t.state = State::kReady;
  }
  return true;
}

// Lets the lanes of thread t's warp operation continue, if every lane that its mask names waits there, too.
inline bool release_warp(int t) {
  const Thread& first = block.threads[t];
  if (first.state != State::kWarp) return false;
  const int base = t / kWarp * kWarp;
  Thread* lanes[kWarp];
  int count = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(first.mask >> lane & 1)) continue;
    if (base + lane >= static_cast<int>(block.threads.size())) fail("line %d: no lane %d here", first.line, lane);
    Thread& other = block.threads[base + lane];
    if (other.state == State::kDone) fail("line %d: lane %d of the mask has returned", first.line, lane);
    if (other.state != State::kWarp || other.line != first.line || other.mask != first.mask) return false;
    lanes[count++] = &other;
  }
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < count; ++j) lanes[i]->got[lanes[j] - &block.threads[base]] = lanes[j]->given;
    lanes[i]->state = State::kReady;
  }
  return true;
}

inline void run_block(std::mt19937& shuffle) {
  const int count = block.threads.size();
  for (Thread& t : block.threads) {
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, thread_main, 0);
    t.state = State::kReady;
  }
  std::vector<int> turn(count);
  std::iota(turn.begin(), turn.end(), 0);
  if (order == 1) std::reverse(turn.begin(), turn.end());
  for (;;) {
    if (order > 1) std::shuffle(turn.begin(), turn.end(), shuffle);
    for (int t : turn) {
      if (block.threads[t].state == State::kReady) resume(t);
    }
    const auto done = [](const Thread& t) { return t.state == State::kDone; };
    if (std::all_of(block.threads.begin(), block.threads.end(), done)) return;
    bool moved = release_barrier();
    for (int t = 0; t < count; ++t) moved |= release_warp(t);
    if (moved) continue;
    for (int t = 0; t < count; ++t) {
      const Thread& stuck = block.threads[t];
      if (stuck.state == State::kWarp) fail("thread %d waits at line %d for mask %08x", t, stuck.line, stuck.mask);
    }
  }
}

inline void run_grid(dim3 grid, dim3 threads, size_t shared_bytes, std::function<void()> kernel) {
  gridDim = grid;
  blockDim = threads;
  block.kernel = std::move(kernel);
  block.threads.resize(threads.x * threads.y * threads.z);
  std::mt19937 shuffle(order);
  std::vector<unsigned> turn(grid.x * grid.y * grid.z);
  std::iota(turn.begin(), turn.end(), 0);
  if (order == 1) std::reverse(turn.begin(), turn.end());
  if (order > 1) std::shuffle(turn.begin(), turn.end(), shuffle);
  for (unsigned i : turn) {
    blockIdx = uint3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
    block.dynamic_shared = std::vector<char>(shared_bytes, '\xff');
    run_block(shuffle);
  }
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(block.dynamic_shared.data());
}

// Every lane's operand of one warp operation, after all lanes of the mask have arrived.
template <class T>
const uint64_t* exchange(unsigned mask, T value, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Thread& self = block.threads[block.current];
  const int lane = block.current % kWarp;
  if (!(mask >> lane & 1)) fail("line %d: lane %d calls with a mask %08x that does not name it", line, lane, mask);
  self.mask = mask;
  self.given = 0;
  std::memcpy(&self.given, &value, sizeof(T));
  wait(State::kWarp, line);
  return self.got;
}

// The operand of lane `from`; its own where `from` leaves the segment of `width` lanes.
template <class T>
T shuffle(unsigned mask, T value, int from, bool in_segment, int line) {
  const uint64_t* lanes = exchange(mask, value, line);
  if (!in_segment) return value;
  if (!(mask >> from & 1)) fail("line %d: reads lane %d, which the mask %08x does not name", line, from, mask);
  std::memcpy(&value, &lanes[from], sizeof(T));
  return value;
}

inline int lane() { return block.current % kWarp; }

}  // namespace simt

inline void __syncthreads(int line = __builtin_LINE()) { simt::wait(simt::State::kBarrier, line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { simt::exchange(mask, 0, line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, int line = __builtin_LINE()) {
  return simt::shuffle(mask, value, simt::lane() / width * width + from % width, true, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32, int line = __builtin_LINE()) {
  return simt::shuffle(mask, value, simt::lane() - by, simt::lane() % width >= by, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32, int line = __builtin_LINE()) {
  return simt::shuffle(mask, value, simt::lane() + by, simt::lane() % width + by < width, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
  const int from = simt::lane() ^ bits;
  return simt::shuffle(mask, value, from, from / width <= simt::lane() / width, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const uint64_t* lanes = simt::exchange(mask, predicate, line);
  unsigned votes = 0;
  for (int i = 0; i < simt::kWarp; ++i) votes |= (mask >> i & 1 && lanes[i] != 0) ? 1u << i : 0;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == mask;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  const uint64_t* lanes = simt::exchange(mask, value, line);
  unsigned equal = 0;
  for (int i = 0; i < simt::kWarp; ++i) equal |= (mask >> i & 1 && lanes[i] == lanes[simt::lane()]) ? 1u << i : 0;
  return equal;
}

// With one OS thread, reading, changing and writing is atomic anyway.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidConfiguration,
  cudaErrorNoKernelImageForDevice,
  cudaErrorUnsupportedPtxVersion
};
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration" : "no kernel image for this device";
}
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const size_t threads = size_t{c->blockDim.x} * c->blockDim.y * c->blockDim.z;
  if (threads == 0 || threads > 1024 || c->gridDim.x == 0) return cudaErrorInvalidConfiguration;
  simt::run_grid(c->gridDim, c->blockDim, c->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
