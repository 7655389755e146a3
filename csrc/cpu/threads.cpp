#include "threads.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <cstdlib>

namespace fastseq {

// Central barrier. The last thread to arrive opens the next generation, the others wait for it. The counters sit on
// lines of their own: arrivals would otherwise evict the line that all the others are reading.
struct alignas(64) Barrier {
  alignas(64) int arrived = 0;
  alignas(64) Progress generations;
};

namespace {

// A step's barrier takes 0.1 to 0.2 us when every thread has a core. When one has none, spinning on keeps it from
// getting one, and each barrier would last a scheduler's time slice.
constexpr int kSpins = 4096;

// Teams of other threads of the process: OpenMP does not count them, every Python thread would get a full team, and
// teams that do not fit on the cores stall each other at every barrier.
int active_teams = 0;

// OpenMP's pool does not survive fork: a team in the child would wait for threads that do not exist.
bool forked = false;

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How many threads to ask for: a team can only be formed outside of any other.
int clamp_threads(int threads) {
  if (threads <= 1 || forked || omp_in_parallel()) return 1;
  const int limit = omp_get_thread_limit();
  return threads < limit ? threads : limit;
}

}  // namespace

void Team::wait() const {
  if (size == 1) return;
  // Read before arriving: no generation can open until this thread has arrived.
  const int64_t next = __atomic_load_n(&barrier->generations.steps, __ATOMIC_RELAXED) + 1;
  if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) == size) {
    __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
    barrier->generations.set(next);
    return;
  }
  barrier->generations.wait(next);
}

void Progress::wait(int64_t done) const {
  for (int spins = 0; __atomic_load_n(&steps, __ATOMIC_ACQUIRE) < done;) {
    if (spins < kSpins) {
      ++spins;
      relax();
    } else {
      sched_yield();
    }
  }
}

void parallel(int threads, void (*body)(void* context, const Team& team), void* context) {
  threads = clamp_threads(threads);
  if (threads > 1) {
    const bool alone = __atomic_fetch_add(&active_teams, 1, __ATOMIC_ACQUIRE) == 0;
    if (alone) {
      Barrier barrier;
#pragma omp parallel num_threads(threads)
      body(context, Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
    }
    __atomic_sub_fetch(&active_teams, 1, __ATOMIC_RELEASE);
    if (alone) return;
  }
  body(context, Team{0, 1, nullptr});
}

// Large work space lies on huge pages where the system leaves that to programs: fewer page faults and TLB misses took
// the LSTM's backward at (B, T, I, H) = (64, 50, 1024, 1024) from 81 to 84 % of the FMA peak (Zen 3).
void* allocate(int64_t bytes) {
  constexpr int64_t kLine = 64, kHugePage = 2 << 20;
  if (bytes < 0 || bytes > INT64_MAX - kHugePage) return nullptr;
  const int64_t align = bytes < 2 * kHugePage ? kLine : kHugePage;
  // aligned_alloc wants a multiple of the alignment, and may answer null to zero bytes.
  const auto rounded = static_cast<size_t>(bytes == 0 ? align : (bytes + align - 1) / align * align);
  void* memory = std::aligned_alloc(static_cast<size_t>(align), rounded);
  if (memory && align == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
  return memory;
}

void release(void* memory) { std::free(memory); }

}  // namespace fastseq
