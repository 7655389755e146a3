// Attention in pairs of bfloat16 against attention in float32, whatever the machine multiplies itself. Prints what
// failed; built by test_attention_kernels.py together with csrc/cpu/threads.cpp.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define FASTSEQ_ISA pairs_check
#include "cpu/attention_forward-inl.h"

using namespace fastseq;
using namespace fastseq::pairs_check;

struct Case {
  int64_t queries, keys, head_dim, value_dim, left, right, key_length;
  double dropout_p;
};

// (B, N, rows, width) of numbers in (-2, 2).
static std::vector<BFloat16> draw(int64_t count, uint32_t seed) {
  std::vector<BFloat16> values(count);
  for (BFloat16& value : values) {
    seed = seed * 1664525u + 1013904223u;
    const float number = float(seed >> 8) / float(1 << 22) - 2;
    uint32_t word;
    std::memcpy(&word, &number, sizeof word);
    value.bits = uint16_t(word >> 16);
  }
  return values;
}

static bool agree(const Case& c) {
  constexpr int64_t B = 2, N = 4, kKvHeads = 2;
  const int64_t k_lengths[B] = {c.keys, c.key_length};
  std::vector<BFloat16> q = draw(B * N * c.queries * c.head_dim, 1), k = draw(B * kKvHeads * c.keys * c.head_dim, 2),
                        v = draw(B * kKvHeads * c.keys * c.value_dim, 3);
  const auto heads = [](std::vector<BFloat16>& a, int64_t count, int64_t rows, int64_t width) {
    return Heads{a.data(), count * rows * width, rows * width, width};
  };
  AttentionParams p{};
  p.batch = B, p.heads = N, p.kv_heads = kKvHeads, p.queries = c.queries, p.keys = c.keys;
  p.head_dim = c.head_dim, p.value_dim = c.value_dim, p.scale = 0.3, p.left = c.left, p.right = c.right;
  p.k_lengths = k_lengths, p.dropout_p = c.dropout_p, p.seed = 7, p.threads = 2;
  p.q = heads(q, N, c.queries, c.head_dim), p.k = heads(k, kKvHeads, c.keys, c.head_dim);
  p.v = heads(v, kKvHeads, c.keys, c.value_dim);
  const BFloat16 poison{0x7fc0};
  std::vector<BFloat16> out[2];
  for (int pairs = 0; pairs < 2; ++pairs) {
    out[pairs].assign(B * N * c.queries * c.value_dim, poison);
    p.out = heads(out[pairs], N, c.queries, c.value_dim);
    (pairs ? AttentionForward<BFloat16, BFloat16>::run : AttentionForward<BFloat16, float>::run)(p);
  }
  // Of averages of values below 2, the weights and the result each rounded to 8 bits.
  for (size_t i = 0; i < out[0].size(); ++i)
    if (!(std::abs(to_compute(out[0][i]) - to_compute(out[1][i])) <= 2 * 2.0f / 128)) return false;
  return true;
}

int main() {
  const Case cases[] = {
      {64, 64, 32, 32, INT64_MAX, INT64_MAX, 64, 0},
      {65, 63, 7, 33, INT64_MAX, 0, 63, 0},
      {129, 700, 40, 17, 5, 0, 699, 0},
      {97, 1, 1, 1, INT64_MAX, INT64_MAX, 0, 0},
      {63, 1001, 65, 80, INT64_MAX, INT64_MAX, 55, 0.5},
      {130, 131, 96, 8, 64, 3, 129, 0.1},
  };
  int failures = 0;
  for (const Case& c : cases)
    if (!agree(c)) {
      ++failures;
      std::printf("failed: L %ld S %ld D %ld E %ld\n", long(c.queries), long(c.keys), long(c.head_dim),
                  long(c.value_dim));
    }
  return failures;
}
