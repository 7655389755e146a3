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
  typedef uint32_t RawWords __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t RawBytes __attribute__((vector_size(kVectorBytes / 4)));
};
template <>
struct LaneTypes<double> {
  typedef double Raw __attribute__((vector_size(kVectorBytes)));
  typedef double RawUnaligned __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
  typedef int64_t RawBits __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t RawWords __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint8_t RawBytes __attribute__((vector_size(kVectorBytes / 8)));
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
  friend FASTSEQ_INLINE RawBits operator==(Vec a, Vec b) { return a.raw == b.raw; }
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

// The larger lanes; b where either is NaN.
template <class T>
FASTSEQ_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a.raw > b.raw ? a.raw : b.raw;
}

template <class T>
FASTSEQ_INLINE Vec<T> abs(Vec<T> a) {
  using Bits = typename Vec<T>::RawBits;
  return (typename Vec<T>::Raw)((Bits)a.raw & ~(Bits)Vec<T>(T(-0.0)).raw);
}

// 0, 1, 2, ...
template <class T>
FASTSEQ_INLINE Vec<T> lane_numbers() {
  Vec<T> v;
  FASTSEQ_UNROLL for (int i = 0; i < kLanes<T>; ++i) v.raw[i] = T(i);
  return v;
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
  // GCC 12 takes __builtin_convertvector apart into halves.
#if defined(__AVX512F__)
  const Words words = (Words)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  const Words words = (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  const Words words = __builtin_convertvector(*(const HalfWordsUnaligned*)p, Words);
#endif
  return (Vec<float>::Raw)(words << 16);
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

// Half a vector from each of two places.
template <class T>
FASTSEQ_INLINE Vec<T> load_halves(const T* low, const T* high) {
#if defined(__AVX512F__)
  const __m512d v = _mm512_castpd256_pd512(_mm256_loadu_pd((const double*)low));
  return (typename Vec<T>::Raw)_mm512_insertf64x4(v, _mm256_loadu_pd((const double*)high), 1);
#elif defined(__AVX2__)
  const __m256d v = _mm256_castpd128_pd256(_mm_loadu_pd((const double*)low));
  return (typename Vec<T>::Raw)_mm256_insertf128_pd(v, _mm_loadu_pd((const double*)high), 1);
#else
  T lane[kLanes<T>];
  std::memcpy(lane, low, sizeof lane / 2);
  std::memcpy(lane + kLanes<T> / 2, high, sizeof lane / 2);
  return load(lane);
#endif
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

// A mask of lanes: set where one of the first n bytes, `stride` apart, is not zero.
template <class T>
FASTSEQ_INLINE typename Vec<T>::RawBits load_flags(const uint8_t* p, int64_t stride, int64_t n) {
  constexpr int lanes = kLanes<T>;
  typename LaneTypes<T>::RawBytes bytes;
  if (stride == 1 && n >= lanes) {
    std::memcpy(&bytes, p, sizeof bytes);
  } else {
    uint8_t lane[lanes] = {};
    for (int64_t i = 0; i < n && i < lanes; ++i) lane[i] = p[i * stride];
    std::memcpy(&bytes, lane, sizeof bytes);
  }
  return __builtin_convertvector(bytes, typename Vec<T>::RawBits) != 0;
}

// A mask of lanes: set where a word is at least `threshold`.
template <class T>
FASTSEQ_INLINE typename Vec<T>::RawBits at_least(const uint32_t* words, uint32_t threshold) {
  typename LaneTypes<T>::RawWords word;
  std::memcpy(&word, words, sizeof word);
  return __builtin_convertvector(word >= threshold, typename Vec<T>::RawBits);
}

// ---- 32-bit words, one in each 64-bit lane, for the generator of random numbers ----

typedef uint64_t LongWords __attribute__((vector_size(kVectorBytes)));

// What is above the word of a lane has no meaning.
struct WordLanes {
  static constexpr int kLanes = kVectorBytes / 8;
  LongWords raw;

  FASTSEQ_INLINE WordLanes(LongWords r) : raw(r) {}
  FASTSEQ_INLINE WordLanes(uint32_t x) : raw(x - LongWords{}) {}
  friend FASTSEQ_INLINE WordLanes operator^(WordLanes a, WordLanes b) { return a.raw ^ b.raw; }
};

// a * b: the high word of the product, and the low one.
FASTSEQ_INLINE void multiply_words(WordLanes a, uint32_t b, WordLanes& high, WordLanes& low) {
#if defined(__AVX512F__)
  // With a mask of all lanes: GCC warns about the undefined operand of the plain form.
  low.raw = (LongWords)_mm512_maskz_mul_epu32(0xff, (__m512i)a.raw, (__m512i)WordLanes(b).raw);
#elif defined(__AVX2__)
  low.raw = (LongWords)_mm256_mul_epu32((__m256i)a.raw, (__m256i)WordLanes(b).raw);
#else
  low.raw = (a.raw & 0xffffffffu) * uint64_t(b);
#endif
  high.raw = low.raw >> 32;
}

namespace detail {

// a[0] b[0] a[1] b[1] ... in two vectors.
template <int... kLane>
FASTSEQ_INLINE void interleave(LongWords& a, LongWords& b, std::integer_sequence<int, kLane...>) {
  constexpr int lanes = WordLanes::kLanes;
  constexpr LongWords low = {uint64_t(kLane / 2 + kLane % 2 * lanes)...};
  const LongWords first = __builtin_shuffle(a, b, low), second = __builtin_shuffle(a, b, low + lanes / 2);
  a = first;
  b = second;
}

}  // namespace detail

// The words of all lanes in the order lane 0: x[0] x[1] x[2] x[3], lane 1: ...
FASTSEQ_INLINE void store_interleaved(uint32_t* p, const WordLanes (&x)[4]) {
  LongWords even = (x[0].raw & 0xffffffffu) | x[1].raw << 32, odd = (x[2].raw & 0xffffffffu) | x[3].raw << 32;
  detail::interleave(even, odd, std::make_integer_sequence<int, WordLanes::kLanes>());
  std::memcpy(p, &even, sizeof even);
  std::memcpy((char*)p + sizeof even, &odd, sizeof odd);
}

// ---- pairs of bfloat16, the operand of dot products with float32 accumulation ----

// True where one instruction multiplies pairs; elsewhere, whoever uses a value often had better widen it once.
#if defined(__AVX512BF16__)
constexpr bool kMultipliesPairs = true;
#else
constexpr bool kMultipliesPairs = false;
#endif

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

// The words of the first n bfloat16, to be moved about as lanes; the others are zero, and are not touched in memory.
FASTSEQ_INLINE Vec<float> load_pairs(const BFloat16* p, int64_t n) {
  constexpr int lanes = 2 * kLanes<float>;
  if (n >= lanes) return load((const float*)p);
  BFloat16 lane[lanes] = {};
  for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
  return load((const float*)lane);
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

// The lanes joined by f, which is commutative and associative but for rounding.
template <int kBit, class T, class F>
FASTSEQ_INLINE T fold(Vec<T> v, const F& f) {
  if constexpr (kBit == 0) {
    return v.raw[0];
  } else {
    return fold<kBit / 2>(f(v, swap_blocks<kBit>(v, std::make_integer_sequence<int, kLanes<T>>())), f);
  }
}

}  // namespace detail

template <class T>
FASTSEQ_INLINE T sum_of_lanes(Vec<T> v) {
  return detail::fold<kLanes<T> / 2>(v, [](Vec<T> a, Vec<T> b) { return a + b; });
}
template <class T>
FASTSEQ_INLINE T largest_lane(Vec<T> v) {
  return detail::fold<kLanes<T> / 2>(v, [](Vec<T> a, Vec<T> b) { return max(a, b); });
}

// rows[i] lane j <-> rows[j] lane i.
template <class T>
FASTSEQ_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  detail::exchange_rows<1>(rows);
  if constexpr (kLanes<T> > 2) detail::exchange_rows<2>(rows);
  if constexpr (kLanes<T> > 4) detail::exchange_rows<4>(rows);
  if constexpr (kLanes<T> > 8) detail::exchange_rows<8>(rows);
}

// The same of rows of half the length, two in a vector: rows[i] is row i and row kLanes / 2 + i, and becomes column i.
template <class T>
FASTSEQ_INLINE void transpose_halves(Vec<T> (&rows)[kLanes<T> / 2]) {
  if constexpr (kLanes<T> > 2) detail::exchange_rows<1>(rows);
  if constexpr (kLanes<T> > 4) detail::exchange_rows<2>(rows);
  if constexpr (kLanes<T> > 8) detail::exchange_rows<4>(rows);
}

// sums[i] = the sum of the lanes of rows[i]; kRows is a power of two. The order of a sum is the same for any kRows.
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
    fold(std::integral_constant<int, 1>());
    fold(std::integral_constant<int, 2>());
    fold(std::integral_constant<int, 4>());
    fold(std::integral_constant<int, 8>());
    store_first(sums + first, row[0], block);
  }
}

}  // namespace fastseq::FASTSEQ_ISA
