// Working memory of a thread, kept between calls: fresh pages would cost more than a small attention.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  // Starts anew with room for `floats`.
  void reset(int64_t floats) {
    used_ = 0;
    floats += kSlack;
    if (floats <= size_) return;
    std::free(memory_);
    size_ = 0;  // and stays so where there is not enough memory
    const int64_t size = (floats + 1023) / 1024 * 1024;
    memory_ = static_cast<Real*>(std::aligned_alloc(64, size * sizeof(Real)));
    if (!memory_) throw std::bad_alloc();
    size_ = size;
  }
  // `count` floats, 64 bytes aligned.
  Real* take(int64_t count) {
    Real* taken = memory_ + used_;
    used_ += (count + 15) / 16 * 16;
    return taken;
  }

 private:
  static constexpr int64_t kSlack = 1024;  // rounding of up to 64 takes
  Real* memory_ = nullptr;
  int64_t size_ = 0;
  int64_t used_ = 0;
};

inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
