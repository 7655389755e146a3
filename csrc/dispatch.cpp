// Which table of kernels runs: the best that this machine has, or the lower one that FASTSEQ_ISA asks for.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fastseq {

#define ISA(name, runs_here)   \
  namespace name {             \
  extern const Kernels kTable; \
  }
#include "isas.def"
#undef ISA

namespace {

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

struct Tables {
  const Kernels* entries[8] = {};  // the last stays null

  Tables() {
    int count = 0;
#define ISA(name, runs_here) \
  if (runs_here) entries[count++] = &name::kTable;
#include "isas.def"
#undef ISA
  }
};

const Kernels* choose() {
  const char* wanted = std::getenv("FASTSEQ_ISA");
  const Kernels* best = nullptr;
  for (const Kernels* const* table = available_kernels(); *table; ++table)
    if (!wanted || !*wanted || std::strcmp(wanted, (*table)->isa) == 0) best = *table;
  return best;
}

}  // namespace

const Kernels* const* available_kernels() {
  static const Tables tables;
  return tables.entries;
}

const Kernels* default_kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace fastseq
