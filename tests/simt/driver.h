// What a driver of one operator needs: raw arrays from files, and one run for every order of the threads.
#pragma once

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace simt {

// An array whose first element lies `shift` elements into its allocation, which ends with its last element.
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

template <class T>
void write(const std::string& path, Array<T>& array) {
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<char*>(array.data()), array.size() * sizeof(T));
}

// The result of run() -> Array, which must be the same bits for every order of the threads.
template <class Run>
auto in_every_order(Run run) {
  order = 0;
  auto result = run();
  for (order = 1; order < 3; ++order) {
    auto other = run();
    if (result.size() && std::memcmp(result.data(), other.data(), result.size() * sizeof(*result.data()))) {
      fail("the result depends on the order of the threads");
    }
  }
  return result;
}

// Calls f with a value of the named floating type.
template <class F>
void with_float(const std::string& dtype, F f) {
  if (dtype == "float64") f(double{});
  if (dtype == "float32") f(float{});
  if (dtype == "bfloat16") f(__nv_bfloat16{});
  if (dtype == "float16") f(__half{});
}

}  // namespace simt
