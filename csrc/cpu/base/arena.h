// Carves one piece of memory into arrays.
#pragma once

#include "cpu/base/share.h"

namespace fastseq::FASTSEQ_ISA {

// Arrays one after the other, each from the start of a cache line on. Without memory it only counts: what takes its
// arrays from an arena says by that how many bytes it needs.
class Arena {
 public:
  explicit Arena(void* memory = nullptr) : address_((uintptr_t)memory) {}

  template <class T>
  T* take(int64_t count) {
    T* array = (T*)(address_ + uintptr_t(bytes_));
    bytes_ += ceil_div(count * int64_t(sizeof(T)), 64) * 64;
    return array;
  }
  int64_t bytes() const { return bytes_; }

  // The bytes of a User(..., arena).
  template <class User, class... Args>
  static int64_t bytes_of(const Args&... args) {
    Arena arena;
    User(args..., arena);
    return arena.bytes();
  }

 private:
  uintptr_t address_;
  int64_t bytes_ = 0;
};

}  // namespace fastseq::FASTSEQ_ISA
