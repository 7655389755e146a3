// A team of threads for one kernel call. Compiled once; the only user of OpenMP, whose pool is the one torch uses.
#pragma once

#include <cstdint>

namespace fastseq {

struct Barrier;

// What a thread knows of the team it is in. `size` is what OpenMP really gave, which may be less than was asked for:
// partition by it, never by the number passed to `parallel`.
struct Team {
  int rank;
  int size;
  Barrier* barrier;

  // Returns once every thread of the team has called it; all writes before it are then visible to all.
  void wait() const;
};

// How far a thread has come, for the others of its team to wait on.
class Progress {
 public:
  int64_t steps() const { return __atomic_load_n(&state_, __ATOMIC_ACQUIRE) >> 1; }
  // Says that so many steps are done, and shows all writes before it to those who have waited for them.
  void set(int64_t done);
  // Returns once so many steps or more are done.
  void wait(int64_t done);

 private:
  int64_t state_ = 0;  // twice the steps, and 1 while a thread sleeps until they change
};

// Runs body(context, team) on a team of at most `threads`, and returns when all have finished. Inline with a team of
// one when `threads` is 1, inside another parallel region, while another caller holds a team, and in a forked child.
// The body must not throw, and its result must not depend on the size of the team.
void parallel(int threads, void (*body)(void* context, const Team& team), void* context);

// 64-byte aligned memory; null when there is none.
void* allocate(int64_t bytes);
void release(void* memory);

}  // namespace fastseq
