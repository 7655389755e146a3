// C = A B for operands that lie in a cache: row tiles x panels of columns, each a run of the micro-kernel.
#pragma once

#include "cpu/gemm/micro_kernel-inl.h"

namespace fastseq::FASTSEQ_ISA {

// A tile of registers: kRows rows x kColumns columns. Two vectors of 16 registers, or four of 32, leave room for 6
// rows.
template <class T>
struct Tile {
  static constexpr int kVectors = kRegisters / 8, kRows = rows_for(kVectors), kColumns = kVectors * kLanes<T>;
  static constexpr int64_t floor(int64_t n) { return n / kColumns * kColumns; }
  static constexpr int64_t ceil(int64_t n) { return ceil_div(n, kColumns) * kColumns; }
};

// What products of a storage type multiply: bfloat16 as it is where the machine multiplies pairs of it, else widened.
template <class S>
using Operand = std::conditional_t<std::is_same_v<S, BFloat16> && kMultipliesPairs, BFloat16, Compute<S>>;

// A: element (m, k) is data[m * row + k * step]; of bfloat16, k + 1 is beside an even k.
template <class O>
struct Left {
  const O* data;
  int64_t row, step;
};

// B: columns p * kColumns ... of row k are data[p * panel + k * step ...]; of bfloat16, those of rows 2k and 2k + 1.
template <class O>
struct Right {
  const typename PanelOf<O>::Element* data;
  int64_t panel, step;
};

// What becomes of the values that C has: they are ignored, added to, or multiplied by a factor of the row and added to.
enum class Before { kIgnored, kAdded, kScaled };

template <Before kBefore, class O>
void multiply(int64_t rows, int64_t panels, int64_t depth, Left<O> a, Right<O> b, Compute<O>* c, int64_t c_row,
              const Compute<O>* factors = nullptr) {
  using T = Compute<O>;
  constexpr int NV = Tile<T>::kVectors, kRows = Tile<T>::kRows;
  const EvenSplit split(rows, kRows);
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t part = 0; part < split.parts; ++part)
      with_constant<kRows>(split.count(part), [&](auto mr) {
        constexpr int MR = decltype(mr)::value;
        const int64_t first = split.begin(part);
        const O* row[MR];
        Vec<T> acc[MR][NV];
        FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) {
          row[m] = a.data + (first + m) * a.row;
          FASTSEQ_UNROLL for (int j = 0; j < NV; ++j) acc[m][j] = Vec<T>(0);
        }
        accumulate<MR, 1, NV>(depth, row, a.step, b.data + panel * b.panel, 0, b.step, acc);
        FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) FASTSEQ_UNROLL for (int j = 0; j < NV; ++j) {
          T* out = c + (first + m) * c_row + panel * Tile<T>::kColumns + j * kLanes<T>;
          if constexpr (kBefore == Before::kAdded) acc[m][j] = load(out) + acc[m][j];
          if constexpr (kBefore == Before::kScaled) acc[m][j] = fma(load(out), Vec<T>(factors[first + m]), acc[m][j]);
          store(out, acc[m][j]);
        }
      });
}

// A product over any depth, without what C had before: sums over blocks of kBlock terms are added up, as in gemm.h.
template <class O>
void multiply_in_blocks(int64_t rows, int64_t panels, int64_t depth, Left<O> a, Right<O> b, Compute<O>* c,
                        int64_t c_row) {
  multiply<Before::kIgnored>(rows, panels, min(kBlock, depth), a, b, c, c_row);
  for (int64_t k = kBlock; k < depth; k += kBlock)
    multiply<Before::kAdded>(rows, panels, min(kBlock, depth - k), Left<O>{a.data + k * a.step, a.row, a.step},
                             Right<O>{b.data + k / PanelOf<O>::kDepth * b.step, b.panel, b.step}, c, c_row);
}

// ---- operands from rows of storage

// Rows times `scale`, with zeros up to the next multiple of kColumns columns.
template <class S>
void copy_rows(const S* rows, int64_t stride, int64_t count, int64_t width, Compute<S> scale, Compute<S>* out,
               int64_t out_row) {
  using T = Compute<S>;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < Tile<T>::ceil(width); c += kLanes<T>)
      store(out + i * out_row + c,
            c < width ? load_first(rows + i * stride + c, width - c) * Vec<T>(scale) : Vec<T>(T(0)));
}

// Panels of columns: out[c / kColumns * panel + i * kColumns + c % kColumns], zero beyond the width.
template <class S>
void pack_columns(const S* rows, int64_t stride, int64_t count, int64_t width, Compute<S>* out, int64_t panel) {
  using T = Compute<S>;
  constexpr int64_t kColumns = Tile<T>::kColumns;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t first = 0; first < width; first += kColumns)
      FASTSEQ_UNROLL for (int j = 0; j < Tile<T>::kVectors; ++j) {
        const int64_t c = first + j * kLanes<T>;
        store(out + first / kColumns * panel + i * kColumns + j * kLanes<T>,
              c < width ? load_first(rows + i * stride + c, width - c) : Vec<T>(T(0)));
      }
}

// Panels of rows: out[i / kColumns * (width * kColumns) + c * kColumns + i % kColumns], zero beyond the last row.
template <class S>
void pack_rows(const S* rows, int64_t stride, int64_t count, int64_t width, Compute<S>* out) {
  using T = Compute<S>;
  constexpr int64_t kColumns = Tile<T>::kColumns;
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < Tile<T>::ceil(count); i += lanes) {
    T* column = out + i / kColumns * (width * kColumns) + i % kColumns;
    for (int64_t c = 0; c < width; c += lanes) {
      Vec<T> block[lanes];
      load_transposed(rows + i * stride + c, stride, count - i, width - c, block);
      FASTSEQ_UNROLL for (int j = 0; j < lanes; ++j) if (j < width - c) store(column + (c + j) * kColumns, block[j]);
    }
  }
}

// ---- the same in pairs, whose second half is 0 where there is none. Inlined, they were an eighth of attention's code.

// Panels of rows of pairs of columns, (width / 2, kColumns) words each.
__attribute__((noinline)) inline void pack_rows(const BFloat16* rows, int64_t stride, int64_t count, int64_t width,
                                                uint32_t* out) {
  constexpr int64_t kColumns = Tile<float>::kColumns;
  constexpr int lanes = kLanes<float>;
  const int64_t depth = panel_depth<BFloat16>(width);
  for (int64_t i = 0; i < Tile<float>::ceil(count); i += lanes) {
    uint32_t* column = out + i / kColumns * (depth * kColumns) + i % kColumns;
    for (int64_t pair = 0; pair < depth; pair += lanes) {
      Vec<float> block[lanes];
      FASTSEQ_UNROLL for (int u = 0; u < lanes; ++u) block[u] =
          i + u < count ? load_pairs(rows + (i + u) * stride + 2 * pair, width - 2 * pair) : Vec<float>(0);
      transpose(block);
      for (int64_t j = 0; j < min(lanes, depth - pair); ++j)
        std::memcpy(column + (pair + j) * kColumns, &block[j].raw, sizeof block[j].raw);
    }
  }
}

// Panels of columns of pairs of rows: the word of rows i and i + 1 in column c is
// out[c / kColumns * panel + i / 2 * step + c % kColumns].
__attribute__((noinline)) inline void pack_columns(const BFloat16* rows, int64_t stride, int64_t count, int64_t width,
                                                   uint32_t* out, int64_t panel, int64_t step = Tile<float>::kColumns) {
  constexpr int64_t kColumns = Tile<float>::kColumns;
  constexpr int lanes = kLanes<float>;
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t c = 0; c < Tile<float>::ceil(width); c += lanes) {
      const BFloat16* first = rows + i * stride + c;
      const Vec<float> low = c < width ? load_first(first, width - c) : Vec<float>(0);
      const Vec<float> high = c < width && i + 1 < count ? load_first(first + stride, width - c) : Vec<float>(0);
      const Words pairs = ((Words)low.raw >> 16) | (Words)high.raw;
      std::memcpy(out + c / kColumns * panel + i / 2 * step + c % kColumns, &pairs, sizeof pairs);
    }
}

// A row of results in storage, in place or elsewhere.
inline void narrow(const float* row, int64_t columns, BFloat16* out) {
  for (int64_t c = 0; c < columns; c += kLanes<float>) store(out + c, load(row + c));
}

// Rows of results as words of pairs of rows, those of the rows i and i + 1 from out + i / 2 * stride on; in place or
// elsewhere.
inline void narrow_pairs(const float* rows, int64_t stride, int64_t count, int64_t columns, uint32_t* out) {
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t c = 0; c < columns; c += kLanes<float>) {
      const float* first = rows + i * stride + c;
      const Words low = round_to_bfloat16(load(first));
      const Words pairs = low | round_to_bfloat16(i + 1 < count ? load(first + stride) : Vec<float>(0)) << 16;
      std::memcpy(out + i / 2 * stride + c, &pairs, sizeof pairs);
    }
}

}  // namespace fastseq::FASTSEQ_ISA
