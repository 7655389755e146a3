// Vector lanes of one instruction set. The only file that knows intrinsics; everything else is written with Vec<T>.
//
// Compiled once per ISA into namespace fastseq::<isa>. The width follows the compiler flags. Vec wraps GCC's vector
// extensions in a struct so that the functors in math/ find `fma`, `sigmoid` and `tanh` by argument-dependent lookup.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define FASTSEQ_INLINE inline __attribute__((always_inline))
#define FASTSEQ_UNROLL _Pragma("GCC unroll 32")

namespace fastseq::FASTSEQ_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};

// The type that a storage type computes in.
template <class S>
struct ComputeOf {
  using Type = S;
};
template <>
struct ComputeOf<BFloat16> {
  using Type = float;
};
template <class S>
using Compute = typename ComputeOf<S>::Type;

FASTSEQ_INLINE float to_compute(float x) { return x; }
FASTSEQ_INLINE double to_compute(double x) { return x; }
FASTSEQ_INLINE float to_compute(BFloat16 x) {
  const uint32_t word = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Spelled out per type: GCC confuses a vector type that depends on a template parameter with the parameter itself.
template <class T>
struct LaneTypes;
template <>
struct LaneTypes<float> {
  typedef float Raw __attribute__((vector_size(kVectorBytes)));
  typedef float RawUnaligned __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
  typedef int32_t RawBits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct LaneTypes<double> {
  typedef double Raw __attribute__((vector_size(kVectorBytes)));
  typedef double RawUnaligned __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
  typedef int64_t RawBits __attribute__((vector_size(kVectorBytes)));
};

template <class T>
struct Vec {
  using Raw = typename LaneTypes<T>::Raw;
  using RawUnaligned = typename LaneTypes<T>::RawUnaligned;
  using RawBits = typename LaneTypes<T>::RawBits;
  static constexpr int kLanes = kVectorBytes / sizeof(T);

  Raw raw;

  FASTSEQ_INLINE Vec() = default;
  FASTSEQ_INLINE Vec(Raw r) : raw(r) {}
  FASTSEQ_INLINE Vec(T x) : raw(x - Raw{}) {}  // x - 0 is x for every x, so this is a plain broadcast

  friend FASTSEQ_INLINE Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  friend FASTSEQ_INLINE Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  friend FASTSEQ_INLINE Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  friend FASTSEQ_INLINE Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
  friend FASTSEQ_INLINE Vec operator-(Vec a) { return -a.raw; }
};

template <class T>
constexpr int kLanes = Vec<T>::kLanes;

// a * b + c, in one rounding where the ISA has it. Contraction is off (-ffp-contract=off): a result must not depend on
// what the compiler inlined where.
#if defined(__AVX512F__)
FASTSEQ_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>::Raw)_mm512_fmadd_ps((__m512)a.raw, (__m512)b.raw, (__m512)c.raw);
}
FASTSEQ_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>::Raw)_mm512_fmadd_pd((__m512d)a.raw, (__m512d)b.raw, (__m512d)c.raw);
}
#elif defined(__AVX2__)
FASTSEQ_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>::Raw)_mm256_fmadd_ps((__m256)a.raw, (__m256)b.raw, (__m256)c.raw);
}
FASTSEQ_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>::Raw)_mm256_fmadd_pd((__m256d)a.raw, (__m256d)b.raw, (__m256d)c.raw);
}
#else
template <class T>
FASTSEQ_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;
}
#endif

// Lanes of `a` where lanes of `mask` are set, else of `b`.
template <class T>
FASTSEQ_INLINE Vec<T> select(typename Vec<T>::RawBits mask, Vec<T> a, Vec<T> b) {
  return mask ? a.raw : b.raw;
}

// ---- memory: S is the storage type, lanes are Compute<S> ----

template <class S>
FASTSEQ_INLINE Vec<S> load(const S* p) {
  return (typename Vec<S>::Raw) * (const typename Vec<S>::RawUnaligned*)p;
}
template <class S>
FASTSEQ_INLINE void store(S* p, Vec<S> v) {
  *(typename Vec<S>::RawUnaligned*)p = v.raw;
}

typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalfWordsUnaligned __attribute__((vector_size(kVectorBytes / 2), aligned(1), may_alias));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

FASTSEQ_INLINE Vec<float> load(const BFloat16* p) {
  const HalfWords half = *(const HalfWordsUnaligned*)p;
  return (Vec<float>::Raw)(__builtin_convertvector(half, Words) << 16);
}
// Round to nearest even; a NaN stays a (quiet) NaN.
FASTSEQ_INLINE Words round_to_bfloat16(Vec<float> v) {
  const Words w = (Words)v.raw;
  const Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  return v.raw == v.raw ? rounded : (w >> 16) | 0x40u;
}
FASTSEQ_INLINE void store(BFloat16* p, Vec<float> v) {
  *(HalfWordsUnaligned*)p = __builtin_convertvector(round_to_bfloat16(v), HalfWords);
}

// The first n lanes; the others are zero, and are not touched in memory.
template <class S>
FASTSEQ_INLINE Vec<Compute<S>> load_first(const S* p, int64_t n) {
  constexpr int lanes = kLanes<Compute<S>>;
  if (n >= lanes) return load(p);
  S lane[lanes] = {};
  for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
  return load(lane);
}
template <class S>
FASTSEQ_INLINE void store_first(S* p, Vec<Compute<S>> v, int64_t n) {
  constexpr int lanes = kLanes<Compute<S>>;
  if (n >= lanes) return store(p, v);
  S lane[lanes];
  store(lane, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lane[i];
}

// The same, with zeros in the other lanes, which belong to the buffer. Units beyond H are computed from weights of
// zero, which times an infinity are NaN; stored as zero they stay out of later sums.
template <class T>
FASTSEQ_INLINE void store_padded(T* p, Vec<T> v, int64_t n) {
  if (n < kLanes<T>) store(p, Vec<T>(0));
  store_first(p, v, n);
}

// ---- pairs of bfloat16, the operand of dot products with float32 accumulation ----

// acc + a.lo * b.lo + a.hi * b.hi in each 32-bit lane.
FASTSEQ_INLINE Vec<float> fma_pairs(Words a, Words b, Vec<float> acc) {
#if defined(__AVX512BF16__)
  return (Vec<float>::Raw)_mm512_dpbf16_ps((__m512)acc.raw, (__m512bh)a, (__m512bh)b);
#else
  const auto low = [](Words w) { return Vec<float>((Vec<float>::Raw)(w << 16)); };
  const auto high = [](Words w) { return Vec<float>((Vec<float>::Raw)(w & 0xffff0000u)); };
  return fma(high(a), high(b), fma(low(a), low(b), acc));
#endif
}

// ---- lanes across vectors ----

namespace detail {

// One stage of a transposition by blocks of `kBit` lanes: swaps the off-diagonal blocks of (a, b).
template <int kBit, class T, int... kLane>
FASTSEQ_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  using Mask = typename Vec<T>::RawBits;
  constexpr int lanes = kLanes<T>;
  constexpr Mask first = {((kLane & kBit) == 0 ? kLane : lanes + (kLane ^ kBit))...};
  constexpr Mask second = {((kLane & kBit) == 0 ? (kLane ^ kBit) : lanes + kLane)...};
  const Vec<T> x = __builtin_shuffle(a.raw, b.raw, first), y = __builtin_shuffle(a.raw, b.raw, second);
  a = x;
  b = y;
}

template <int kBit, int kRows, class T>
FASTSEQ_INLINE void exchange_rows(Vec<T> (&rows)[kRows]) {
  FASTSEQ_UNROLL for (int i = 0; i < kRows; ++i) if ((i & kBit) == 0)
      exchange<kBit>(rows[i], rows[i + kBit], std::make_integer_sequence<int, kLanes<T>>());
}

template <int kBit, class T, int... kLane>
FASTSEQ_INLINE Vec<T> swap_blocks(Vec<T> a, std::integer_sequence<int, kLane...>) {
  constexpr typename Vec<T>::RawBits mask = {(kLane ^ kBit)...};
  return Vec<T>(__builtin_shuffle(a.raw, mask));
}

}  // namespace detail

// rows[i] lane j <-> rows[j] lane i.
template <class T>
FASTSEQ_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  detail::exchange_rows<1>(rows);
  if constexpr (kLanes<T> > 2) detail::exchange_rows<2>(rows);
  if constexpr (kLanes<T> > 4) detail::exchange_rows<4>(rows);
  if constexpr (kLanes<T> > 8) detail::exchange_rows<8>(rows);
}

// sums[i] = the sum of the lanes of rows[i]; kRows is a power of two.
template <int kRows, class T>
FASTSEQ_INLINE void sum_lanes(Vec<T> (&rows)[kRows], T* sums) {
  constexpr int lanes = kLanes<T>, block = kRows < lanes ? kRows : lanes;
  FASTSEQ_UNROLL for (int first = 0; first < kRows; first += block) {
    Vec<T>* row = rows + first;
    // Stage `bit` leaves row i (a multiple of 2 * bit) with lane j holding a part of the sum of row i + j % (2 * bit).
    const auto stage = [&](auto bit) {
      FASTSEQ_UNROLL for (int i = 0; i < block; i += 2 * decltype(bit)::value) {
        detail::exchange<decltype(bit)::value>(row[i], row[i + decltype(bit)::value],
                                               std::make_integer_sequence<int, lanes>());
        row[i] = row[i] + row[i + decltype(bit)::value];
      }
    };
    if constexpr (block > 1) stage(std::integral_constant<int, 1>());
    if constexpr (block > 2) stage(std::integral_constant<int, 2>());
    if constexpr (block > 4) stage(std::integral_constant<int, 4>());
    if constexpr (block > 8) stage(std::integral_constant<int, 8>());
    const auto fold = [&](auto bit) {
      if constexpr (decltype(bit)::value < lanes && decltype(bit)::value >= block)
        row[0] = row[0] + detail::swap_blocks<decltype(bit)::value>(row[0], std::make_integer_sequence<int, lanes>());
    };
    fold(std::integral_constant<int, 8>());
    fold(std::integral_constant<int, 4>());
    fold(std::integral_constant<int, 2>());
    fold(std::integral_constant<int, 1>());
    store_first(sums + first, row[0], block);
  }
}

}  // namespace fastseq::FASTSEQ_ISA
