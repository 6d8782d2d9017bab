// Scratch memory of the CPU kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace moe {

// An uninitialised array [count] that begins on a cache line, for work within one call. A thread keeps the memory of
// its last calls: writing to a page that the system hands out anew costs 0.5 to 2 us, which made a convolution of four
// small images four times slower (docs/facts.md).
class ScratchFloats {
 public:
  explicit ScratchFloats(int64_t count) : lines_(spare().take(count / kLine + 1)) {}
  ScratchFloats(ScratchFloats&&) = default;
  ScratchFloats& operator=(ScratchFloats&&) = delete;
  ~ScratchFloats() {
    if (lines_.data) spare().keep(std::move(lines_));
  }
  static ScratchFloats zeros(int64_t count) {
    ScratchFloats floats(count);
    std::fill(floats + 0, floats + count, 0.f);
    return floats;
  }
  operator float*() const { return lines_.data[0].values; }

 private:
  static constexpr int64_t kLine = 16;
  struct alignas(64) Line {
    float values[kLine];
  };
  struct Lines {
    std::unique_ptr<Line[]> data;
    int64_t count;
  };
  // The memory that a thread keeps: at most 16 MB, the oldest of which goes first. Neither this nor that a block of
  // more than four times the size asked for is not used was measured.
  class Spare {
   public:
    // At least `count` lines, the smallest kept block that will do or else new memory.
    Lines take(int64_t count) {
      auto best = lines_.end();
      for (auto it = lines_.begin(); it != lines_.end(); ++it) {
        if (it->count >= count && (best == lines_.end() || it->count < best->count)) best = it;
      }
      if (best == lines_.end() || best->count > 4 * count) return {std::unique_ptr<Line[]>(new Line[count]), count};
      Lines found = std::move(*best);
      lines_.erase(best);
      total_ -= found.count;
      return found;
    }
    // Takes back what take() gave.
    void keep(Lines lines) {
      total_ += lines.count;
      lines_.push_back(std::move(lines));
      for (; total_ > kMost; lines_.erase(lines_.begin())) total_ -= lines_.front().count;
    }

   private:
    static constexpr int64_t kMost = (16 << 20) / sizeof(Line);
    std::vector<Lines> lines_;
    int64_t total_ = 0;
  };
  static Spare& spare() {
    static thread_local Spare spare;
    return spare;
  }

  Lines lines_;
};

}  // namespace moe
