// The thread team seen from C++, where regions can be nested and teams are known. Prints what failed; built by
// test_threads.py together with csrc/cpu/base/threads.cpp.
#include <omp.h>
#include <sched.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "cpu/base/threads.h"

using namespace fastseq;

static int failures = 0;

static void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("failed: %s\n", what);
}

static constexpr int kMost = 64;

struct Rounds {
  int size = 0;
  int ranks[kMost] = {};
  int places[kMost * 16] = {};
  bool ordered = true;
};

// In each round a thread writes its place and reads its neighbor's: both barriers have to hold.
static void rounds(void* context, const Team& team) {
  Rounds& r = *static_cast<Rounds*>(context);
  __atomic_add_fetch(&r.ranks[team.rank], 1, __ATOMIC_RELAXED);
  if (team.rank == 0) r.size = team.size;
  for (int round = 1; round <= 500; ++round) {
    r.places[team.rank * 16] = round;
    team.wait();
    if (r.places[(team.rank + 1) % team.size * 16] != round) r.ordered = false;
    team.wait();
  }
}

static int run_rounds(int threads) {
  Rounds r;
  parallel(threads, rounds, &r);
  expect(r.ordered, "a barrier keeps the rounds in order");
  for (int rank = 0; rank < kMost; ++rank) expect(r.ranks[rank] == (rank < r.size), "each rank runs once");
  return r.size;
}

static void size_of(void* context, const Team& team) {
  if (team.rank == 0) *static_cast<int*>(context) = team.size;
}

static void nested(void* context, const Team& team) {
  int size = 0;
  parallel(4, size_of, &size);
  if (size != 1) __atomic_add_fetch(static_cast<int*>(context), 1, __ATOMIC_RELAXED);
  team.wait();
}

// CPU time of this thread, in seconds: no measure of how busy the machine is.
static double cpu_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

struct Waits {
  double cpu[kMost] = {};
  int size = 0;
  Progress progress;
};

// All but one wait for one that sleeps: at a barrier, then for its progress.
static void wait_for_a_sleeper(void* context, const Team& team) {
  Waits& w = *static_cast<Waits*>(context);
  const timespec pause = {0, 150'000'000};
  team.wait();
  const double start = cpu_time();
  if (team.rank == 0) {
    w.size = team.size;
    nanosleep(&pause, nullptr);
    team.wait();
    nanosleep(&pause, nullptr);
    w.progress.set(1);
  } else {
    team.wait();
    w.progress.wait(1);
    w.cpu[team.rank] = cpu_time() - start;
  }
}

// All threads on one core: of those that wait at a barrier, none can be let through by one that runs.
static void share_a_core(void* context, const Team& team) {
  Waits& w = *static_cast<Waits*>(context);
  cpu_set_t all, one;
  sched_getaffinity(0, sizeof all, &all);
  CPU_ZERO(&one);
  for (int cpu = 0; CPU_COUNT(&one) == 0; ++cpu)
    if (CPU_ISSET(cpu, &all)) CPU_SET(cpu, &one);
  sched_setaffinity(0, sizeof one, &one);
  if (team.rank == 0) w.size = team.size;
  team.wait();
  const double start = cpu_time();
  for (int step = 0; step < 500; ++step) team.wait();
  w.cpu[team.rank] = cpu_time() - start;
  sched_setaffinity(0, sizeof all, &all);
}

// What waiting costs where the others come late.
static int check_waits() {
  Waits sleeper;
  parallel(4, wait_for_a_sleeper, &sleeper);
  expect(sleeper.size == 4, "four threads");
  for (double cpu : sleeper.cpu) expect(cpu < 0.02, "waiting for 0.3 s takes less than 0.02 s of CPU time");

  Waits shared;
  parallel(4, share_a_core, &shared);
  expect(shared.size == 4, "four threads");
  double total = 0;
  for (double cpu : shared.cpu) total += cpu;
  expect(total < 0.06, "500 barriers of four threads on one core take less than 0.06 s of CPU time");
  return failures != 0;
}

int main(int count, char** arguments) {
  if (count == 1) return check_waits();
  const int most = std::atoi(arguments[1]);  // what OMP_THREAD_LIMIT allows
  for (int threads : {-1, 0, 1, 2, 3, 4, 7, 16}) {
    const int size = run_rounds(threads);
    expect(size >= 1 && size <= (threads < 1 ? 1 : threads) && size <= most, "a team is at most as large as asked for");
    if (!omp_get_dynamic()) expect(size == (threads < 1 ? 1 : threads < most ? threads : most), "and not smaller");
  }

  int wrong = 0;
  parallel(4, nested, &wrong);
  expect(wrong == 0, "a team inside a team is one thread");
#pragma omp parallel num_threads(3)
  {
    int size = 0;
    parallel(4, size_of, &size);
    if (size != 1) __atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
  }
  expect(wrong == 0, "a team inside a region of another is one thread");
  expect(run_rounds(2) == (most < 2 ? most : 2) || omp_get_dynamic(), "teams are given again afterwards");

  for (int64_t bytes : {0, 1, 63, 64, 65, 1 << 20}) {
    void* memory = allocate(bytes);
    expect(memory && reinterpret_cast<uintptr_t>(memory) % 64 == 0, "memory is aligned");
    std::memset(memory, 1, static_cast<size_t>(bytes));
    release(memory);
  }
  expect(!allocate(-1) && !allocate(INT64_MAX) && !allocate(INT64_MAX - 64), "no memory is null");
  release(nullptr);

  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    failures = 0;
    expect(run_rounds(4) == 1, "a team in a forked child is one thread");
    std::fflush(stdout);
    _exit(failures != 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(status == 0, "the forked child ends well");
  return failures != 0;
}
