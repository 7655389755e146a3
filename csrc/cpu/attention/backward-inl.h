// Attention backward without a matrix of probabilities (Dao 2023, "FlashAttention-2"):
//
//   delta_i = <dout_i, out_i> - dlse_i      P = exp(S - lse)         dV = P'^T dO, P' being P after dropout
//   dS = P * (dropout'(dO V^T) - delta)     dQ = scale dS K          dK = scale dS^T Q
//
// An item is a head of keys and a share of the blocks of query rows that use it: it owns their dQ, and its dK and dV
// are sums of its own. Shares, and the order in which their sums are added up, follow from the shape alone, so the
// result is the same for any number of threads.
#pragma once

#include "cpu/attention/bias_gradient-inl.h"

namespace fastseq::FASTSEQ_ISA {

// O is what the products multiply: T, or bfloat16 in pairs.
template <class S, class O = Operand<S>>
struct AttentionBackward {
  using T = Compute<S>;
  using G = Tile<T>;
  using L = GradientLayout<T>;
  using Block = QueryBlock<S, O>;
  using Element = typename PanelOf<O>::Element;

  static constexpr bool kWidened = Block::kWidened;

  static constexpr int64_t kItems = 16;       // shares of all heads together, at least, where there are blocks enough
  static constexpr int64_t kPackBlock = 192;  // keys that are packed, or added up, at once
  // Keys, or rows, that are multiplied at once, so that the L1 cache holds their part of a tile. Where the window cuts
  // through the tile: fewer, as their products are cut to the rows, or keys, that they have in common.
  static constexpr int64_t kStripKeys = 48, kStripRows = 24, kCut = 12;

  const AttentionParams& p;
  const L layout;
  int64_t group, heads, query_blocks, shares, padded_keys, operand_bytes, sum_bytes, scratch_bytes;
  BiasGradient<S> bias;
  char *operands = nullptr, *sums = nullptr, *scratch = nullptr;
  Queue queue;

  explicit AttentionBackward(const AttentionParams& params)
      : p(params),
        layout(p),
        group(p.heads / p.kv_heads),
        heads(p.batch * p.kv_heads),
        query_blocks(ceil_div(p.queries, kQueryBlock)),
        shares(max(1, min(ceil_div(kItems, heads), group * query_blocks))),
        padded_keys(G::ceil(p.keys)),
        bias(p, shares) {
    operand_bytes = Arena::bytes_of<Operands>(*this);
    sum_bytes = Arena::bytes_of<Sums>(*this);
    scratch_bytes = Arena::bytes_of<Scratch>(*this);
  }

  static Status run(const AttentionParams& p) {
    if constexpr (!kWidened)
      if (few_queries(p)) return AttentionBackward<S, T>::run(p);
    const int threads = attention_threads(p);
    AttentionBackward backward(p);
    const int64_t operands = (backward.shares > 1 ? backward.heads : threads) * backward.operand_bytes;
    const int64_t sums = (backward.shares > 1 ? backward.heads * backward.shares : threads) * backward.sum_bytes;
    backward.operands = (char*)allocate(operands + sums + threads * backward.scratch_bytes);
    if (!backward.operands) return kOutOfMemory;
    if (p.dbias && backward.bias.allocate_turns() != kOk) {
      backward.bias.release_turns();
      release(backward.operands);
      return kOutOfMemory;
    }
    backward.sums = backward.operands + operands;
    backward.scratch = backward.sums + sums;
    parallel(threads, [](void* context, const Team& team) { ((AttentionBackward*)context)->work(team); }, &backward);
    backward.bias.release_turns();
    release(backward.operands);
    return kOk;
  }

 private:
  // Of a head of keys.
  struct Operands {
    Element *keys, *values, *key_rows;  // K and V as panels of rows, K as (padded S, key_row)

    Operands(const AttentionBackward& a, Arena& arena) {
      keys = arena.take<Element>(a.padded_keys * panel_depth<O>(a.p.head_dim));
      values = arena.take<Element>(a.padded_keys * panel_depth<O>(a.p.value_dim));
      key_rows = arena.take<Element>(panel_depth<O>(a.padded_keys) * a.layout.key_row);
    }
  };
  Operands operands_of(int64_t index) const {
    Arena arena(operands + index * operand_bytes);
    return Operands(*this, arena);
  }

  // Of a share.
  struct Sums {
    T *dk, *dv;  // (S, key_row), (S, value_row)
    T* dbias;    // (sum_planes, sum_row)

    Sums(const AttentionBackward& a, Arena& arena) {
      dk = arena.take<T>(a.padded_keys * a.layout.key_row);
      dv = arena.take<T>(a.padded_keys * a.layout.value_row);
      dbias = arena.take<T>(a.bias.sum_planes() * a.bias.sum_row());
    }
  };
  Sums sums_of(int64_t index) const {
    Arena arena(sums + index * sum_bytes);
    return Sums(*this, arena);
  }

  // Of a thread.
  struct Scratch {
    Block block;
    T* dq;  // (kQueryBlock, key_row)

    Scratch(const AttentionBackward& a, Arena& arena)
        : block(a.p, a.layout, arena), dq(arena.take<T>(kQueryBlock * a.layout.key_row)) {}
  };

  void work(const Team& team) {
    Arena arena(scratch + team.rank * scratch_bytes);
    const Scratch s(*this, arena);
    if (shares == 1) {
      const Operands own = operands_of(team.rank);
      for (int64_t head; (head = queue.take()) < heads;) {
        for (int64_t key = 0; key < p.keys; key += kPackBlock) pack(head, key, own);
        add_share(head, 0, own, sums_of(team.rank), s);
        for (int64_t key = 0; key < p.keys; key += kPackBlock) finish(head, key, team.rank);
      }
      return;
    }
    const int64_t blocks = ceil_div(p.keys, kPackBlock);
    for (int64_t unit = team.rank; unit < heads * blocks; unit += team.size)
      pack(unit / blocks, unit % blocks * kPackBlock, operands_of(unit / blocks));
    team.wait();
    for (int64_t item; (item = queue.take()) < heads * shares;)
      add_share(item / shares, item % shares, operands_of(item / shares), sums_of(item), s);
    team.wait();
    for (int64_t unit = team.rank; unit < heads * blocks; unit += team.size)
      finish(unit / blocks, unit % blocks * kPackBlock, unit / blocks * shares);
  }

  // Keys [key, key + kPackBlock) of a head.
  void pack(int64_t head, int64_t key, const Operands& operands) const {
    const int64_t b = head / p.kv_heads, n = head % p.kv_heads;
    const Extent extent(p, b);
    const int64_t count = min(kPackBlock, extent.keys - key);
    if (count <= 0) return;
    const S* k = row_of<const S>(p.k, b, n, extent.k_start + key);
    const S* v = row_of<const S>(p.v, b, n, extent.k_start + key);
    if (!few_queries(p)) {
      pack_rows(k, p.k.row_stride, count, p.head_dim, operands.keys + key * panel_depth<O>(p.head_dim));
      pack_rows(v, p.v.row_stride, count, p.value_dim, operands.values + key * panel_depth<O>(p.value_dim));
    }
    if (!p.dq.data) return;
    Element* rows = operands.key_rows + panel_depth<O>(key) * layout.key_row;
    if constexpr (kWidened)
      copy_rows(k, p.k.row_stride, count, p.head_dim, T(1), rows, layout.key_row);
    else
      pack_columns(k, p.k.row_stride, count, p.head_dim, rows, G::kColumns, layout.key_row);
  }

  // Every `shares`-th block of query rows: dQ of its rows, and their part of dK and dV.
  void add_share(int64_t head, int64_t share, const Operands& operands, const Sums& sums, const Scratch& s) const {
    const int64_t b = head / p.kv_heads;
    const Extent extent(p, b);
    fill(sums.dk, extent.keys * layout.key_row, T(0));
    fill(sums.dv, extent.keys * layout.value_row, T(0));
    bias.start_item(sums.dbias);
    for (int64_t unit = share; unit < group * query_blocks; unit += shares) {
      const int64_t n = head % p.kv_heads * group + unit / query_blocks, first = unit % query_blocks * kQueryBlock;
      const int64_t rows = max(0, min(kQueryBlock, extent.queries - first));
      const Scores<S> scores(p, extent, b, n);
      const Range seen = scores.window.keys_of(first, rows);
      const bool one_tile = seen.end <= G::floor(seen.begin) + kKeyBlock;
      const typename Block::Rows loaded = s.block.load_rows(extent, b, n, first, rows, !one_tile);
      const auto each_tile = [&](const auto& visit) __attribute__((always_inline)) {
        for (int64_t key = G::floor(seen.begin); key < seen.end; key += kKeyBlock)
          visit(key, min(key + kKeyBlock, seen.end), row_of<const S>(p.k, b, head % p.kv_heads, extent.k_start + key));
      };
      if (s.block.rounds_lse(rows)) {
        each_tile([&](int64_t key, int64_t end, const S* k_rows) {
          s.block.add_probabilities(scores, loaded, first, rows, key, G::ceil(end) - key,
                                    operands.keys + key * panel_depth<O>(p.head_dim), k_rows);
        });
        s.block.correct_lse(rows);
      }
      typename BiasGradient<S>::Turn turn{};
      if (p.dbias) turn = bias.start_unit(b, head % p.kv_heads, unit, sums.dbias);
      fill(s.dq, rows * layout.key_row, T(0));
      each_tile([&](int64_t key, int64_t end, const S* k_rows) {
        add_tile(scores, loaded, first, rows, key, end, operands, k_rows,
                 row_of<const S>(p.v, b, head % p.kv_heads, extent.k_start + key), sums, s);
        if (p.dbias) bias.add(turn, scores, s.block, first, rows, key, end);
      });
      if (p.dbias) bias.finish_unit(turn, extent, b, n, first, rows);
      if (!p.dq.data) continue;
      for (int64_t i = 0; i < rows; ++i)
        write_row(row_of<S>(p.dq, b, n, extent.q_start + first + i), s.dq + i * layout.key_row, p.head_dim, T(p.scale));
      if (!p.q_starts) zero_rows<S>(p.dq, b, n, first + rows, min(p.queries, first + kQueryBlock), p.head_dim);
    }
    bias.finish_item(b, head % p.kv_heads, share, sums.dbias);
  }

  // A block of query rows against the keys [key, end), the first of which is stored at `k_rows` and `v_rows`.
  void add_tile(const Scores<S>& scores, const typename Block::Rows& loaded, int64_t first, int64_t rows, int64_t key,
                int64_t end, const Operands& operands, const S* k_rows, const S* v_rows, const Sums& sums,
                const Scratch& s) const {
    constexpr int64_t kDepth = PanelOf<O>::kDepth;  // a pair may start with what nobody sees: its weight is 0
    const Block& block = s.block;
    block.differentiate(scores, loaded, first, rows, key, G::ceil(end) - key,
                        operands.keys + key * panel_depth<O>(p.head_dim),
                        operands.values + key * panel_depth<O>(p.value_dim), k_rows, v_rows);
    const auto sees_all = [&](int64_t i) {
      const Range seen = scores.window.keys_of(i, 1);
      return seen.begin <= key && end <= seen.end;
    };
    const bool whole = sees_all(first) && sees_all(first + rows - 1);
    const int64_t strip_keys = whole ? kStripKeys : kCut, strip_rows = whole ? kStripRows : kCut;
    for (int64_t j = key; j < end; j += strip_keys) {
      const int64_t count = min(strip_keys, end - j);
      const Range seeing = scores.window.queries_of(j, count);
      const int64_t i = max(seeing.begin - first, 0) / kDepth * kDepth, depth = min(seeing.end - first, rows) - i;
      if (depth <= 0) continue;
      if (p.dv.data)
        multiply<Before::kAdded>(count, layout.value_panels(), depth, block.weights_by_key(i, j - key),
                                 block.gradients_from(i), sums.dv + j * layout.value_row, layout.value_row);
      if (p.dk.data)
        multiply<Before::kAdded>(count, layout.key_panels(), depth, block.scores_by_key(i, j - key),
                                 block.queries_from(i), sums.dk + j * layout.key_row, layout.key_row);
    }
    if (!p.dq.data) return;
    for (int64_t i = 0; i < rows; i += strip_rows) {
      const int64_t count = min(strip_rows, rows - i);
      const Range seen = scores.window.keys_of(first + i, count);
      const int64_t j = max(seen.begin, key) / kDepth * kDepth, depth = min(seen.end, end) - j;
      if (depth <= 0) continue;
      multiply<Before::kAdded>(
          count, layout.key_panels(), depth, block.scores_by_row(i, j - key),
          Right<O>{operands.key_rows + panel_depth<O>(j) * layout.key_row, G::kColumns, layout.key_row},
          s.dq + i * layout.key_row, layout.key_row);
    }
  }

  // Adds up the shares of the keys [key, key + kPackBlock) of a head, in their order, and writes dK and dV.
  void finish(int64_t head, int64_t key, int64_t first_sum) const {
    const int64_t b = head / p.kv_heads, n = head % p.kv_heads, end = min(p.keys, key + kPackBlock);
    const Extent extent(p, b);
    const Sums total = sums_of(first_sum);
    const auto write = [&](const Heads& out, T* rows, int64_t row, int64_t width, T factor, const auto& rows_of) {
      for (int64_t j = key; j < min(end, extent.keys); ++j) {
        for (int64_t share = 1; share < shares; ++share) {
          const T* part = rows_of(sums_of(first_sum + share)) + j * row;
          for (int64_t c = 0; c < width; c += kLanes<T>)
            store(rows + j * row + c, load(rows + j * row + c) + load(part + c));
        }
        write_row(row_of<S>(out, b, n, extent.k_start + j), rows + j * row, width, factor);
      }
      if (!p.k_starts) zero_rows<S>(out, b, n, max(key, extent.keys), end, width);
    };
    const T scale = kWidened ? T(1) : T(p.scale);  // widened queries have it in them
    if (p.dk.data) write(p.dk, total.dk, layout.key_row, p.head_dim, scale, [](const Sums& sums) { return sums.dk; });
    if (p.dv.data) write(p.dv, total.dv, layout.value_row, p.value_dim, T(1), [](const Sums& sums) { return sums.dv; });
  }
};

}  // namespace fastseq::FASTSEQ_ISA
