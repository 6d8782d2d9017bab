// Shared by the drivers of the operators: raw arrays from files, and a run for every order of blocks and threads.
#pragma once

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace simt {

// An array that begins `shift` elements into its allocation and ends with it.
template <class T>
struct Array {
  std::vector<T> memory;
  size_t shift;

  T* data() { return memory.data() + shift; }
  size_t size() const { return memory.size() - shift; }
};

template <class T>
Array<T> read(const std::string& path, size_t shift = 0) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  Array<T> array{std::vector<T>(bytes.size() / sizeof(T) + shift), shift};
  if (!bytes.empty()) std::memcpy(array.data(), bytes.data(), bytes.size());
  return array;
}

// An array for results: every byte 0xff, NaN in each floating type.
template <class T>
Array<T> poisoned(size_t size, size_t shift = 0) {
  Array<T> array{std::vector<T>(size + shift), shift};
  if (size + shift) std::memset(static_cast<void*>(array.memory.data()), 0xff, (size + shift) * sizeof(T));
  return array;
}

template <class T>
void write(const std::string& path, Array<T>& array) {
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<char*>(array.data()), array.size() * sizeof(T));
}

template <class T>
bool same_bits(Array<T>& a, Array<T>& b) {
  return a.size() == 0 || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}
template <class... T, size_t... i>
bool same_bits(std::tuple<T...>& a, std::tuple<T...>& b, std::index_sequence<i...>) {
  return (same_bits(std::get<i>(a), std::get<i>(b)) && ...);
}
template <class... T>
bool same_bits(std::tuple<T...>& a, std::tuple<T...>& b) {
  return same_bits(a, b, std::index_sequence_for<T...>());
}

// The result of run(), an Array or a tuple of them, which must be the same bits for every order of blocks and threads.
template <class Run>
auto in_every_order(Run run) {
  order = 0;
  auto result = run();
  for (order = 1; order < 3; ++order) {
    auto other = run();
    if (!same_bits(result, other)) fail("the result depends on the order of blocks and threads");
  }
  return result;
}

// Calls f with a value of the named floating-point type, one of those supported on a GPU.
template <class F>
void with_float(const std::string& dtype, F f) {
  if (dtype == "float32") return f(float{});
  if (dtype == "bfloat16") return f(__nv_bfloat16{});
  if (dtype == "float16") return f(__half{});
  fail("no driver takes %s", dtype.c_str());
}

}  // namespace simt
