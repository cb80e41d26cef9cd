// Memory that stays with its thread: fresh pages at every call would cost more than short calls do.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace mla {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // At least `bytes` aligned to 64; the contents of earlier calls are gone.
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(64, static_cast<std::size_t>(rounded));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return static_cast<char*>(memory_);
  }

  // Gives large memory back.
  void trim(int64_t most) {
    if (size_ <= most) return;
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace mla
