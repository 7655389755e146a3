// Attention forward without a matrix of scores (Milakov & Gimelshein 2018; Dao et al. 2022, "FlashAttention").
//
// Keys and values of a head are packed once into panels, by all threads. Then every block of query rows is an item: for
// each part of the keys and each tile of 6 rows, scores Q K^T in the L1 cache, their exponentials, and O += P V.
#pragma once

#include "cpu/attention/decode-inl.h"

namespace fastseq::FASTSEQ_ISA {

// O is what the products multiply: T, or bfloat16 in pairs.
template <class S, class O = Operand<S>>
struct AttentionForward {
  using T = Compute<S>;
  using G = Tile<T>;
  using Element = typename PanelOf<O>::Element;  // as large as T

  static constexpr bool kWidened = std::is_same_v<O, T>;
  // Keys of a part: 6 rows of their scores take 12 KB, and the sums are rescaled seldom.
  static constexpr int64_t kKeys = 512 * 4 / sizeof(T), kRow = kKeys + kLanes<T>;
  static constexpr int64_t kPackBlock = 128;        // keys that are packed at once
  static constexpr int64_t kSharedBytes = 8 << 20;  // packed heads that are worked on at once

  const AttentionParams& p;
  int64_t group, heads, query_blocks, wave;
  int64_t padded_value_dim, key_depth, slot_bytes, scratch_bytes;
  bool own_slots;
  char *slots = nullptr, *scratch = nullptr;
  Queue queue;

  AttentionForward(const AttentionParams& params, int threads)
      : p(params),
        group(p.heads / p.kv_heads),
        heads(p.batch * p.kv_heads),
        query_blocks(ceil_div(p.queries, kQueryBlock)),
        padded_value_dim(G::ceil(p.value_dim)),
        key_depth(panel_depth<O>(p.head_dim)),
        slot_bytes(Arena::bytes_of<Slot>(*this)),
        scratch_bytes(Arena::bytes_of<Scratch>(*this)),
        own_slots(heads >= 4 * threads) {
    const int64_t fitting = kSharedBytes / max(1, slot_bytes);
    wave = own_slots ? threads : max(1, min(heads, fitting));
  }

  static Status run(const AttentionParams& p) {
    if (few_queries(p)) return AttentionDecode<S>::run(p);
    const int threads = attention_threads(p);
    AttentionForward forward(p, threads);
    const int64_t slots = forward.wave * forward.slot_bytes;
    forward.slots = (char*)allocate(slots + threads * forward.scratch_bytes);
    if (!forward.slots) return kOutOfMemory;
    forward.scratch = forward.slots + slots;
    parallel(threads, [](void* context, const Team& team) { ((AttentionForward*)context)->work(team); }, &forward);
    release(forward.slots);
    return kOk;
  }

 private:
  // Of a head.
  struct Slot {
    Element *keys, *values;  // K as panels of rows, V as panels of columns

    Slot(const AttentionForward& f, Arena& arena) {
      keys = arena.take<Element>(G::ceil(f.p.keys) * f.key_depth);
      values = arena.take<Element>(panel_depth<O>(G::ceil(f.p.keys)) * f.padded_value_dim);
    }
  };
  Slot slot_of(int64_t index) const {
    Arena arena(slots + index * slot_bytes);
    return Slot(*this, arena);
  }

  // Of one thread.
  struct Scratch {
    T *q, *scores, *out;  // (kQueryBlock, D), scaled; (6, kRow); (kQueryBlock, padded E), not yet divided by the sum
    SoftmaxRows<T> softmax;
    T *next, *factors;  // of the rows of a tile
    uint32_t* words;

    static constexpr int64_t kRows = SoftmaxRows<T>::padded(G::kRows);
    Scratch(const AttentionForward& f, Arena& arena) : softmax(kQueryBlock, arena) {
      q = arena.take<T>(kQueryBlock * G::ceil(f.p.head_dim));
      scores = arena.take<T>(G::kRows * kRow);
      out = arena.take<T>(kQueryBlock * f.padded_value_dim);
      next = arena.take<T>(kRows);
      factors = arena.take<T>(kRows);
      words = arena.take<uint32_t>(Scores<S>::draw_size(kKeys));
    }
  };

  void work(const Team& team) {
    Arena arena(scratch + team.rank * scratch_bytes);
    const Scratch s(*this, arena);
    if (own_slots) {
      const Slot slot = slot_of(team.rank);
      for (int64_t head; (head = queue.take()) < heads;) {
        for (int64_t key = 0; key < p.keys; key += kPackBlock) pack(head, key, slot);
        for (int64_t item = 0; item < group * query_blocks; ++item) attend(head, item % group, item / group, slot, s);
      }
      return;
    }
    const int64_t pack_blocks = ceil_div(p.keys, kPackBlock);
    for (int64_t first = 0; first < heads; first += wave) {
      const int64_t count = min(wave, heads - first);
      for (int64_t unit = team.rank; unit < count * pack_blocks; unit += team.size)
        pack(first + unit / pack_blocks, unit % pack_blocks * kPackBlock, slot_of(unit / pack_blocks));
      if (team.rank == 0) queue.next = 0;
      team.wait();
      // The last rows first: with a causal mask, they see the most keys.
      for (int64_t item; (item = queue.take()) < count * group * query_blocks;) {
        const int64_t block = query_blocks - 1 - item / (count * group), head = item % (count * group) / group;
        attend(first + head, item % group, block, slot_of(head), s);
      }
      team.wait();
    }
  }

  // Keys [key, key + kPackBlock) of a head.
  void pack(int64_t head, int64_t key, const Slot& slot) const {
    const int64_t b = head / p.kv_heads, n = head % p.kv_heads;
    const Extent extent(p, b);
    const Range seen = extent.window(p).keys_of(0, extent.queries);
    const int64_t count = min(kPackBlock, extent.keys - key);
    if (count <= 0 || seen.end <= key || key + count <= seen.begin) return;
    pack_rows(row_of<const S>(p.k, b, n, extent.k_start + key), p.k.row_stride, count, p.head_dim,
              slot.keys + key * key_depth);
    pack_columns(row_of<const S>(p.v, b, n, extent.k_start + key), p.v.row_stride, count, p.value_dim,
                 slot.values + panel_depth<O>(key) * G::kColumns, value_panel());
  }

  int64_t value_panel() const { return panel_depth<O>(G::ceil(p.keys)) * G::kColumns; }

  // Rows [block * kQueryBlock, ...) of the `member`-th query head that uses this head of keys and values.
  void attend(int64_t head, int64_t member, int64_t block, const Slot& slot, const Scratch& s) const {
    const int64_t b = head / p.kv_heads, n = head % p.kv_heads * group + member, first = block * kQueryBlock;
    const Extent extent(p, b);
    const Scores<S> scores(p, extent, b, n);
    const int64_t rows = max(0, min(kQueryBlock, extent.queries - first));
    const Left<O> queries = load_queries(row_of<const S>(p.q, b, n, extent.q_start + first), rows, s);
    s.softmax.start(rows);
    fill(s.out, rows * padded_value_dim, T(0));
    const Range seen = scores.window.keys_of(first, rows);
    for (int64_t key = G::floor(seen.begin); key < seen.end; key += kKeys)
      add_keys(scores, queries, first, rows, {max(key, seen.begin), min(key + kKeys, seen.end)}, slot, s);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = extent.q_start + first + i;
      s.softmax.finish(i, s.out + i * padded_value_dim, p.value_dim, row_of<S>(p.out, b, n, row),
                       element_of(p.lse, p.lse_strides, b, n, row));
    }
    if (p.q_starts) return;
    const int64_t end = min(p.queries, first + kQueryBlock);
    zero_rows<S>(p.out, b, n, first + rows, end, p.value_dim);
    if (p.lse)
      for (int64_t i = first + rows; i < end; ++i) *element_of(p.lse, p.lse_strides, b, n, i) = -__builtin_inf();
  }

  // Query rows as an operand: times the scale, or as they are stored, and then their products are scaled.
  Left<O> load_queries(const S* rows, int64_t count, const Scratch& s) const {
    if constexpr (kWidened) {
      copy_rows(rows, p.q.row_stride, count, p.head_dim, T(p.scale), s.q, G::ceil(p.head_dim));
      return {s.q, G::ceil(p.head_dim), 1};
    } else {
      return {rows, p.q.row_stride, 1};
    }
  }

  // Adds the keys of a part, all of them in the kKeys from a multiple of kColumns on.
  void add_keys(const Scores<S>& scores, Left<O> queries, int64_t first, int64_t rows, Range part, const Slot& slot,
                const Scratch& s) const {
    constexpr int64_t kDepth = PanelOf<O>::kDepth;
    const EvenSplit split(rows, G::kRows);
    for (int64_t t = 0; t < split.parts; ++t) {
      const int64_t row = split.begin(t), count = split.count(t);
      const Range seen = scores.window.keys_of(first + row, count);
      const int64_t begin = max(part.begin, seen.begin), end = min(part.end, seen.end);
      if (begin >= end) continue;
      const int64_t key = G::floor(begin), columns = G::ceil(end) - key;
      scores.prefetch(first + row, count, key, end - key);
      multiply_in_blocks(count, columns / G::kColumns, p.head_dim,
                         Left<O>{queries.data + row * queries.row, queries.row, 1},
                         Right<O>{slot.keys + key * key_depth, key_depth * G::kColumns, G::kColumns}, s.scores, kRow);
      fill(s.next, Scratch::kRows, -T(__builtin_inff()));
      for (int64_t m = 0; m < count; ++m) {
        T* s_row = s.scores + m * kRow;
        if constexpr (!kWidened) scale_row(s_row, columns, T(p.scale));
        scores.apply(first + row + m, key, columns, s_row);
        s.next[m] = largest_of(s_row, columns);
      }
      s.softmax.raise(row, count, s.next, s.factors);
      for (int64_t m = 0; m < count; ++m) {
        T* p_row = s.scores + m * kRow;
        s.softmax.sum[row + m] += exponentiate(p_row, columns, s.next[m]);
        if (scores.drops()) {
          scores.draw(first + row + m, key, columns, s.words);
          for (int64_t c = 0; c < columns; c += kLanes<T>) store(p_row + c, scores.drop(load(p_row + c), s.words + c));
        }
        if constexpr (!kWidened) narrow(p_row, columns, (O*)p_row);
      }
      const int64_t from = begin / kDepth * kDepth;  // a pair may start with a key that nobody sees, its weight is 0
      multiply<Before::kScaled>(count, padded_value_dim / G::kColumns, end - from,
                                Left<O>{(const O*)s.scores + (from - key), kRow * kDepth, 1},
                                Right<O>{slot.values + from / kDepth * G::kColumns, value_panel(), G::kColumns},
                                s.out + row * padded_value_dim, padded_value_dim, s.factors);
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA
