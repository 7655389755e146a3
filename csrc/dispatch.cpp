// Which table of kernels runs: the best that this machine has, or the lower one that FASTSEQ_ISA asks for.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fastseq {

// One table per ISA; CMakeLists.txt compiles csrc/cpu/table.cpp once for each of these names.
namespace baseline {
extern const Kernels kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
namespace avx512_bf16 {
extern const Kernels kTable;
}
#endif

namespace {

struct Candidate {
  const Kernels* table;
  bool (*runs_here)();
};

#if defined(__x86_64__)
// The builtin also asks whether the operating system saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Worst first.
const Candidate kCandidates[] = {
    {&baseline::kTable, [] { return true; }},
#if defined(__x86_64__)
    {&avx2::kTable, has_avx2},
    {&avx512::kTable, has_avx512},
    {&avx512_bf16::kTable, has_avx512_bf16},
#endif
};

const Kernels* choose() {
  const char* wanted = std::getenv("FASTSEQ_ISA");
  if (wanted && *wanted) return find_kernels(wanted);
  const Kernels* best = nullptr;
  for (const Candidate& candidate : kCandidates) {
    if (candidate.runs_here()) best = candidate.table;
  }
  return best;
}

}  // namespace

const Kernels* find_kernels(const char* isa) {
  for (const Candidate& candidate : kCandidates) {
    if (std::strcmp(isa, candidate.table->isa) == 0) return candidate.runs_here() ? candidate.table : nullptr;
  }
  return nullptr;
}

const Kernels* default_kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace fastseq
