// Whole numbers, and how work is divided: into even parts, over the threads of a team, and to whoever is free.
#pragma once

#include <cstdint>

#include "cpu/base/threads.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `n` items in the fewest even parts of at most `most`.
struct EvenSplit {
  int64_t parts, size, larger;
  EvenSplit(int64_t n, int64_t most)
      : parts(ceil_div(n, most)), size(parts ? n / parts : 0), larger(n - parts * size) {}
  int64_t begin(int64_t part) const { return part * size + min(part, larger); }
  int64_t count(int64_t part) const { return size + (part < larger); }
};

// The items [begin, end) of one thread.
struct Share {
  int64_t begin, end;

  // Of items that take equally long: as many for each thread, next to each other.
  static Share of(int64_t items, int64_t rank, int64_t size) {
    return {items * rank / size, items * (rank + 1) / size};
  }
  static Share of(int64_t items, const Team& team) { return of(items, team.rank, team.size); }
};

// Items of unlike cost, for whoever is free.
struct Queue {
  int64_t next = 0;
  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

}  // namespace fastseq::FASTSEQ_ISA
