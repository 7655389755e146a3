// y = x W^T + bias from packed weights (Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication"):
// a panel of weights stays in a cache while the rows of a block pass by it.
#pragma once

#include "cpu/base/threads.h"
#include "cpu/gemm/gemm.h"
#include "rows/sequence.h"

namespace fastseq::FASTSEQ_ISA {

template <class S>
struct Linear {
  using T = Compute<S>;
  using V = Vec<T>;
  using Element = typename PanelOf<S>::Element;

  // Tiles of 6 rows x 2 vectors (4 with 32 registers): 2 % faster at 1024 rows than 4 x 3 (Zen 3), and less of the last
  // panel is empty.
  static constexpr int kVectors = kRegisters / 8;
  static constexpr int64_t kColumns = kVectors * V::kLanes;
  static constexpr int64_t kBlockRows = 48;  // of an item, in L2 beside a panel; their sums are in L1
  static constexpr int64_t kMostPanels = 8;  // of an item
  static constexpr int kItems = 4;           // for each thread, at least, where there are panels enough

  const LinearParams& p;
  const int64_t rows, panels, stride;
  int64_t block_rows = 0, blocks = 0, group = 0, groups = 0;
  Queue queue;

  explicit Linear(const LinearParams& params)
      : p(params),
        rows(p.steps * p.batch),
        panels(ceil_div(p.outputs, kColumns)),
        stride(panel_depth<S>(p.inputs) * kColumns) {}

  // The bias (panels, kColumns), then the weights (panels, panel_depth, kColumns).
  static int64_t panels_bytes(const LinearParams& p) {
    const Linear linear(p);
    return linear.panels * (kColumns * int64_t(sizeof(T)) + linear.stride * int64_t(sizeof(Element)));
  }

  static void pack(const LinearParams& p, void* panels) {
    struct Context {
      Linear linear;
      void* memory;
    } context{Linear(p), panels};
    const auto work = [](void* pointer, const Team& team) {
      const auto& [linear, memory] = *(const Context*)pointer;
      const Share share = Share::of(linear.panels, team);
      for (int64_t panel = share.begin; panel < share.end; ++panel) linear.pack_panel(panel, memory);
    };
    parallel(int(max(1, min(p.threads, min(context.linear.panels, panels_bytes(p) >> 18)))), work, &context);
  }

  static Status forward(const LinearParams& p) {
    constexpr double kFlopsPerThread = 2.5e5;  // fewer do not pay for waking a thread
    Linear linear(p);
    const double flops = 2.0 * linear.rows * p.inputs * p.outputs;
    const int threads = int(max(1, min(p.threads, flops < 1e15 ? int64_t(flops / kFlopsPerThread) : p.threads)));
    linear.block_rows = min(linear.rows, kBlockRows);
    linear.blocks = ceil_div(linear.rows, linear.block_rows);
    linear.group = max(1, min(kMostPanels, linear.panels * linear.blocks / (kItems * threads)));
    linear.groups = ceil_div(linear.panels, linear.group);
    parallel(threads, [](void* context, const Team&) { ((Linear*)context)->work(); }, &linear);
    return kOk;
  }

 private:
  T* bias_of(void* memory, int64_t panel) const { return (T*)memory + panel * kColumns; }
  Element* weights_of(void* memory, int64_t panel) const { return (Element*)bias_of(memory, panels) + panel * stride; }

  void pack_panel(int64_t panel, void* memory) const {
    for (int64_t lane = 0; lane < kColumns; lane += V::kLanes) {
      const int64_t unit = panel * kColumns + lane, units = max(0, min(V::kLanes, p.outputs - unit));
      pack_column((const S*)p.weight + unit * p.inputs, p.inputs, units, p.inputs, weights_of(memory, panel) + lane,
                  kColumns);
      store(bias_of(memory, panel) + lane, p.bias && units ? load_first((const S*)p.bias + unit, units) : V(T(0)));
    }
  }

  // Items are taken by whoever is free; each output is one sum, whoever computes it.
  void work() {
    for (int64_t item; (item = queue.take()) < blocks * groups;) {
      const int64_t first = item / groups * block_rows, begin = item % groups * group;
      multiply(first, min(block_rows, rows - first), begin, min(panels, begin + group));
    }
  }

  // Rows [first, first + count) times the panels [begin, end).
  void multiply(int64_t first, int64_t count, int64_t begin, int64_t end) const {
    alignas(64) T sums[kBlockRows * kColumns];
    const S* x[kBlockRows];
    for (int64_t m = 0; m < count; ++m) x[m] = nth_row<const S>(p.x, p.batch, first + m);
    void* const memory = (void*)p.panels;
    for (int64_t panel = begin; panel < end; ++panel) {
      multiply_rows<kVectors, S>(x, count, 1, p.inputs, weights_of(memory, panel), stride, bias_of(memory, panel), sums,
                                 kColumns, 0);
      const int64_t column = panel * kColumns, columns = min(kColumns, p.outputs - column);
      for (int64_t m = 0; m < count; ++m) {
        S* y = (S*)p.y + (first + m) * p.outputs + column;
        for (int64_t c = 0; c < columns; c += V::kLanes) store_first(y + c, load(sums + m * kColumns + c), columns - c);
      }
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA
