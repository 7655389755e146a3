// Attention of a few queries to many keys, as in decoding with a cache: bound by memory, so keys and values are read
// where they lie, once for all query heads that share them. The keys of a head are split into chunks, so that all
// threads have work; the results of the chunks are merged in their order.
#pragma once

#include "cpu/attention/scores-inl.h"

namespace fastseq::FASTSEQ_ISA {

template <class S>
struct AttentionDecode {
  using T = Compute<S>;
  using V = Vec<T>;

  static constexpr int64_t kPart = 512;        // keys that are scored before their values are added
  static constexpr int64_t kUnit = 64;         // keys; parts and chunks start at multiples of it
  static constexpr int64_t kLeastChunk = 256;  // keys
  static constexpr int64_t kItems = 64;        // chunks of all heads together, where there are keys enough
  static constexpr int64_t kRow = kPart + V::kLanes;

  const AttentionParams& p;
  int64_t group, heads, most_rows, chunks, chunk_keys, q_row, padded_value_dim;
  int64_t part_bytes, scratch_bytes;
  char *parts = nullptr, *scratch = nullptr;
  Queue queue;

  explicit AttentionDecode(const AttentionParams& params)
      : p(params),
        group(p.heads / p.kv_heads),
        heads(p.batch * p.kv_heads),
        most_rows(group * p.queries),
        q_row(Tile<T>::ceil(p.head_dim)),
        padded_value_dim(ceil_div(p.value_dim, V::kLanes) * V::kLanes) {
    const int64_t wanted = max(1, min(ceil_div(kItems, heads), p.keys / kLeastChunk));
    chunk_keys = max(kUnit, ceil_div(ceil_div(p.keys, wanted), kUnit) * kUnit);
    chunks = max(1, ceil_div(p.keys, chunk_keys));
    part_bytes = Arena::bytes_of<Part>(*this);
    scratch_bytes = Arena::bytes_of<Scratch>(*this);
  }

  static Status run(const AttentionParams& p) {
    const int threads = attention_threads(p);
    AttentionDecode decode(p);
    const int64_t parts = decode.heads * decode.chunks * decode.part_bytes;
    decode.parts = (char*)allocate(parts + threads * decode.scratch_bytes);
    if (!decode.parts) return kOutOfMemory;
    decode.scratch = decode.parts + parts;
    parallel(threads, [](void* context, const Team& team) { ((AttentionDecode*)context)->work(team); }, &decode);
    release(decode.parts);
    return kOk;
  }

 private:
  // The result of a chunk.
  struct Part {
    SoftmaxRows<T> softmax;
    T* out;  // (rows, padded E)

    Part(const AttentionDecode& d, Arena& arena) : softmax(d.most_rows, arena) {
      out = arena.take<T>(d.most_rows * d.padded_value_dim);
    }
  };
  Part part_of(int64_t head, int64_t chunk) const {
    Arena arena(parts + (head * chunks + chunk) * part_bytes);
    return Part(*this, arena);
  }

  // Of one thread.
  struct Scratch {
    T *q, *scores;  // (rows, q_row), scaled; (rows, kRow)
    T *next, *factors;
    uint32_t* words;

    Scratch(const AttentionDecode& d, Arena& arena) {
      q = arena.take<T>(kFewRows * d.q_row);
      scores = arena.take<T>(kFewRows * kRow);
      next = arena.take<T>(SoftmaxRows<T>::padded(kFewRows));
      factors = arena.take<T>(SoftmaxRows<T>::padded(kFewRows));
      words = arena.take<uint32_t>(Scores<S>::draw_size(kPart));
    }
  };

  void work(const Team& team) {
    Arena arena(scratch + team.rank * scratch_bytes);
    const Scratch s(*this, arena);
    for (int64_t item; (item = queue.take()) < heads * chunks;) attend(item / chunks, item % chunks, s);
    team.wait();
    for (int64_t head = team.rank; head < heads; head += team.size) finish(head);
  }

  // Row r of a head of keys is query r % queries of the query head r / queries of its group.
  int64_t head_of(int64_t head, int64_t r, const Extent& extent) const {
    return head % p.kv_heads * group + r / extent.queries;
  }

  void attend(int64_t head, int64_t chunk, const Scratch& s) const {
    const int64_t b = head / p.kv_heads, n = head % p.kv_heads;
    const Extent extent(p, b);
    const int64_t rows = group * extent.queries;
    const Part part = part_of(head, chunk);
    part.softmax.start(rows);
    fill(part.out, rows * padded_value_dim, T(0));
    const Range seen = extent.window(p).keys_of(0, extent.queries);
    const int64_t begin = max(chunk * chunk_keys, seen.begin / kUnit * kUnit);
    const int64_t end = min((chunk + 1) * chunk_keys, seen.end);
    for (int64_t r = 0; r < rows; ++r)
      copy_rows(row_of<const S>(p.q, b, head_of(head, r, extent), extent.q_start + r % extent.queries), 0, 1,
                p.head_dim, T(p.scale), s.q + r * q_row, q_row);
    for (int64_t key = begin; key < end; key += kPart) {
      const int64_t count = min(kPart, end - key), columns = ceil_div(count, V::kLanes) * V::kLanes;
      dot_streamed(s.q, q_row, rows, p.head_dim, row_of<const S>(p.k, b, n, extent.k_start + key), p.k.row_stride,
                   count, s.scores, kRow);
      weigh(head, b, extent, key, count, columns, part, s);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < padded_value_dim; c += V::kLanes)
          store(part.out + r * padded_value_dim + c, load(part.out + r * padded_value_dim + c) * V(s.factors[r]));
      add_streamed(s.scores, kRow, rows, count, row_of<const S>(p.v, b, n, extent.k_start + key), p.v.row_stride,
                   p.value_dim, part.out, padded_value_dim);
    }
  }

  // Products become probabilities but for the factor of the row.
  void weigh(int64_t head, int64_t b, const Extent& extent, int64_t key, int64_t count, int64_t columns,
             const Part& part, const Scratch& s) const {
    const int64_t rows = group * extent.queries;
    fill(s.next, SoftmaxRows<T>::padded(rows), -T(__builtin_inff()));
    for (int64_t r = 0; r < rows; ++r) {
      T* row = s.scores + r * kRow;
      const Scores<S> scores(p, extent, b, head_of(head, r, extent));
      scores.apply(r % extent.queries, key, columns, row);
      fill(row + count, columns - count, -T(__builtin_inff()));
      s.next[r] = largest_of(row, columns);
    }
    part.softmax.raise(0, rows, s.next, s.factors);
    for (int64_t r = 0; r < rows; ++r) {
      T* row = s.scores + r * kRow;
      part.softmax.sum[r] += exponentiate(row, columns, s.next[r]);
      const Scores<S> scores(p, extent, b, head_of(head, r, extent));
      if (scores.drops()) {
        scores.draw(r % extent.queries, key, columns, s.words);
        for (int64_t c = 0; c < columns; c += V::kLanes) store(row + c, scores.drop(load(row + c), s.words + c));
      }
    }
  }

  // Merges the chunks of a head, in their order, into the first, and writes the rows.
  void finish(int64_t head) const {
    const int64_t b = head / p.kv_heads;
    const Extent extent(p, b);
    const Part total = part_of(head, 0);
    for (int64_t r = 0; r < group * extent.queries; ++r) {
      T* sum = total.out + r * padded_value_dim;
      OnlineSoftmax<V> state{V(total.softmax.largest[r]), V(total.softmax.sum[r])};
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const Part part = part_of(head, chunk);
        V own, other = state.merge({V(part.softmax.largest[r]), V(part.softmax.sum[r])}, own);
        for (int64_t c = 0; c < padded_value_dim; c += V::kLanes)
          store(sum + c, fma(load(part.out + r * padded_value_dim + c), other, load(sum + c) * own));
      }
      total.softmax.largest[r] = state.largest.raw[0];
      total.softmax.sum[r] = state.sum.raw[0];
      const int64_t n = head_of(head, r, extent), row = extent.q_start + r % extent.queries;
      total.softmax.finish(r, sum, p.value_dim, row_of<S>(p.out, b, n, row),
                           element_of(p.lse, p.lse_strides, b, n, row));
    }
    if (p.q_starts) return;
    for (int64_t n = head % p.kv_heads * group; n < (head % p.kv_heads + 1) * group; ++n) {
      zero_rows<S>(p.out, b, n, extent.queries, p.queries, p.value_dim);
      if (p.lse)
        for (int64_t i = extent.queries; i < p.queries; ++i)
          *element_of(p.lse, p.lse_strides, b, n, i) = -__builtin_inf();
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA
