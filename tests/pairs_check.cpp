// Attention in pairs of bfloat16 against attention in float32, whatever the machine multiplies itself. Prints what
// failed; built by test_attention_kernels.py together with csrc/cpu/base/threads.cpp.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define FASTSEQ_ISA pairs_check
#include "cpu/attention/backward-inl.h"
#include "cpu/attention/forward-inl.h"

using namespace fastseq;
using namespace fastseq::pairs_check;

using Values = std::vector<BFloat16>;

struct Case {
  int64_t queries, keys, head_dim, value_dim, left, right, key_length;
  double softcap, dropout_p;
};

// Numbers in (-2, 2).
static Values draw(int64_t count, uint32_t seed) {
  Values values(count);
  for (BFloat16& value : values) {
    seed = seed * 1664525u + 1013904223u;
    const float number = float(seed >> 8) / float(1 << 22) - 2;
    uint32_t word;
    std::memcpy(&word, &number, sizeof word);
    value.bits = uint16_t(word >> 16);
  }
  return values;
}

struct Results {
  Values out, dq, dk, dv;
  std::vector<float> dbias;
};

template <class O>
static Results run(const Case& c) {
  constexpr int64_t B = 2, N = 4, kKvHeads = 2;
  const int64_t k_lengths[B] = {c.keys, c.key_length};
  Values q = draw(B * N * c.queries * c.head_dim, 1), k = draw(B * kKvHeads * c.keys * c.head_dim, 2);
  Values v = draw(B * kKvHeads * c.keys * c.value_dim, 3), dout = draw(B * N * c.queries * c.value_dim, 4);
  Values bias = draw(c.queries * c.keys, 5);
  std::vector<double> lse(B * N * c.queries);
  const auto heads = [](Values& a, int64_t count, int64_t rows, int64_t width) {
    return Heads{a.data(), count * rows * width, rows * width, width};
  };
  const BFloat16 poison{0x7fc0};
  Results r{Values(dout.size(), poison), Values(q.size(), poison), Values(k.size(), poison), Values(v.size(), poison),
            std::vector<float>(bias.size(), NAN)};
  AttentionParams p{};
  p.batch = B, p.heads = N, p.kv_heads = kKvHeads, p.queries = c.queries, p.keys = c.keys;
  p.head_dim = c.head_dim, p.value_dim = c.value_dim, p.scale = 0.3, p.left = c.left, p.right = c.right;
  p.k_lengths = k_lengths, p.softcap = c.softcap, p.dropout_p = c.dropout_p, p.seed = 7, p.threads = 2;
  p.bias = bias.data(), p.bias_strides[2] = p.dbias_strides[2] = c.keys, p.bias_strides[3] = p.dbias_strides[3] = 1;
  p.q = heads(q, N, c.queries, c.head_dim), p.dq = heads(r.dq, N, c.queries, c.head_dim);
  p.k = heads(k, kKvHeads, c.keys, c.head_dim), p.dk = heads(r.dk, kKvHeads, c.keys, c.head_dim);
  p.v = heads(v, kKvHeads, c.keys, c.value_dim), p.dv = heads(r.dv, kKvHeads, c.keys, c.value_dim);
  p.out = heads(r.out, N, c.queries, c.value_dim), p.dout = heads(dout, N, c.queries, c.value_dim);
  p.lse = lse.data(), p.lse_strides[0] = N * c.queries, p.lse_strides[1] = c.queries, p.lse_strides[2] = 1;
  p.dbias = r.dbias.data();
  AttentionForward<BFloat16, O>::run(p);
  AttentionBackward<BFloat16, O>::run(p);
  return r;
}

static float value_of(BFloat16 x) { return to_compute(x); }
static float value_of(float x) { return x; }

// What is rounded to 8 bits on the way is at most a few units of the largest result apart.
template <class A>
static bool agree(const A& a, const A& b) {
  float largest = 0, difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(value_of(a[i])) || std::isnan(value_of(b[i]))) return false;
    largest = std::fmax(largest, std::fabs(value_of(a[i])));
    difference = std::fmax(difference, std::fabs(value_of(a[i]) - value_of(b[i])));
  }
  return difference <= largest / 64;
}

int main() {
  const Case cases[] = {
      {64, 64, 32, 32, INT64_MAX, INT64_MAX, 64, 0, 0},
      {65, 63, 7, 33, INT64_MAX, 0, 63, 0, 0},
      {129, 700, 40, 17, 5, 0, 699, 0, 0},
      {97, 1, 1, 1, INT64_MAX, INT64_MAX, 0, 0, 0},
      {63, 301, 65, 80, INT64_MAX, INT64_MAX, 55, 2, 0.5},
      {130, 131, 96, 8, 64, 3, 129, 0, 0.1},
  };
  int failures = 0;
  for (const Case& c : cases) {
    const Results pairs = run<BFloat16>(c), widened = run<float>(c);
    const auto expect = [&](bool holds, const char* name) {
      if (holds) return;
      ++failures;
      std::printf("failed: %s of L %ld S %ld D %ld E %ld\n", name, long(c.queries), long(c.keys), long(c.head_dim),
                  long(c.value_dim));
    };
    expect(agree(widened.out, pairs.out), "out");
    expect(agree(widened.dq, pairs.dq), "dq");
    expect(agree(widened.dk, pairs.dk), "dk");
    expect(agree(widened.dv, pairs.dv), "dv");
    expect(agree(widened.dbias, pairs.dbias), "dbias");
  }
  return failures;
}
