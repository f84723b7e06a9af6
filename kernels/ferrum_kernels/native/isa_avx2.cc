// x86-64 with AVX2, FMA and F16C (Haswell and Zen, and later).
#include <immintrin.h>

#include "in_rows.h"
#include "isa.h"

namespace ferrum {
namespace {

constexpr int64_t kWide = 8;
using V = __m256;
using I = __m256i;

V load(const float* x) { return _mm256_loadu_ps(x); }
void store(float* x, V v) { _mm256_storeu_ps(x, v); }
V set(float x) { return _mm256_set1_ps(x); }
V zero() { return _mm256_setzero_ps(); }
V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
V add(V a, V b) { return _mm256_add_ps(a, b); }
V sub(V a, V b) { return _mm256_sub_ps(a, b); }
V mul(V a, V b) { return _mm256_mul_ps(a, b); }
V divide(V a, V b) { return _mm256_div_ps(a, b); }
V max(V a, V b) { return _mm256_max_ps(a, b); }
V min(V a, V b) { return _mm256_min_ps(a, b); }
I loadi(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
void storei(void* x, I v) { _mm256_storeu_si256(static_cast<__m256i*>(x), v); }
I seti(int32_t x) { return _mm256_set1_epi32(x); }
I addi(I a, I b) { return _mm256_add_epi32(a, b); }
I and_(I a, I b) { return _mm256_and_si256(a, b); }
template <int n>
I srl(I a) {
  return _mm256_srli_epi32(a, n);
}
template <int n>
I sll(I a) {
  return _mm256_slli_epi32(a, n);
}
V to_float(I a) { return _mm256_cvtepi32_ps(a); }
I to_int(V a) { return _mm256_cvtps_epi32(a); }
V as_float(I a) { return _mm256_castsi256_ps(a); }
V load_half(const uint16_t* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
void store_half(uint16_t* x, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
V load_bf16(const uint16_t* x) {
  return as_float(sll<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))));
}
void store_bf16(uint16_t* x, V v) {
  I bits = _mm256_castps_si256(v);
  I even = addi(bits, addi(seti(0x7FFF), and_(srl<16>(bits), seti(1))));
  I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  I high = srl<16>(_mm256_blendv_epi8(even, _mm256_or_si256(bits, seti(0x400000)), nan));
  I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_castsi256_si128(packed));
}

template <bool even_first>
void store_codes(const int32_t* whole, int8_t* to) {
  // Each half of a register packs on its own: integers 0 to 3, 8 to 11 | 4 to 7, 12 to 15, each four once.
  __m256i packed = _mm256_packs_epi32(loadi(whole), loadi(whole + 8));
  packed = _mm256_packs_epi16(packed, packed);
  __m128i codes = _mm_unpacklo_epi32(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
  if (even_first) codes = _mm_shuffle_epi8(codes, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), codes);
}

// Four activations, the same in every lane of 32 bits.
I four(const int8_t* x) {
  int32_t word;
  __builtin_memcpy(&word, x, 4);
  return seti(word);
}

// GCC gathers a long sum of products and adds it up at the end, from the stack: an opaque sum keeps it in its register.
I keep(I sum) {
  asm("" : "+x"(sum));
  return sum;
}

// A code of 4 bits times an int8, twice, is at most 3810: eight such sums fit in 16 bits before they must be widened.
// 8-bit codes go as two planes of 4 bits, low and high, the high one counting sixteen times.
template <int bits, int rows, int steps, bool first>
void pass(const uint32_t* w, int64_t ld, int64_t columns, const int8_t* const* x, int32_t* acc, int64_t ld_acc) {
  const I mask = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
  // Two vectors of columns fill the registers with up to two planes of two rows, or four rows of one plane.
  constexpr int vectors = bits == 8 && rows > 2 ? 1 : 2;
  for (int64_t c = 0; c < columns; c += vectors * kWide) {
    I low[rows][vectors], high[rows][vectors];
    for (int m = 0; m < rows; m++)
      for (int v = 0; v < vectors; v++) low[m][v] = high[m][v] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < steps; i++) {
      I even[vectors], odd[vectors];
      for (int v = 0; v < vectors; v++) {
        I word = loadi(w + i * ld + c + v * kWide);
        even[v] = _mm256_and_si256(word, mask), odd[v] = _mm256_and_si256(_mm256_srli_epi16(word, 4), mask);
      }
#pragma GCC unroll 4
      for (int m = 0; m < rows; m++) {
        if constexpr (bits == 4) {
          I p = four(x[m] + i * 8), q = four(x[m] + i * 8 + 4);
          for (int v = 0; v < vectors; v++) low[m][v] = keep(_mm256_add_epi16(low[m][v], _mm256_maddubs_epi16(even[v], p)));
          for (int v = 0; v < vectors; v++) low[m][v] = keep(_mm256_add_epi16(low[m][v], _mm256_maddubs_epi16(odd[v], q)));
        } else {
          I p = four(x[m] + i * 4);
          for (int v = 0; v < vectors; v++) {
            low[m][v] = keep(_mm256_add_epi16(low[m][v], _mm256_maddubs_epi16(even[v], p)));
            high[m][v] = keep(_mm256_add_epi16(high[m][v], _mm256_maddubs_epi16(odd[v], p)));
          }
        }
      }
    }
    for (int m = 0; m < rows; m++)
      for (int v = 0; v < vectors; v++) {
        I sum = _mm256_madd_epi16(low[m][v], one);
        if constexpr (bits == 8) sum = addi(sum, _mm256_madd_epi16(high[m][v], sixteen));
        int32_t* to = acc + m * ld_acc + c + v * kWide;
        if constexpr (!first) sum = addi(sum, loadi(to));
        storei(to, sum);
      }
  }
}

template <int bits>
struct Int8 {
  template <int rows>
  static void dot_rows(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, const int8_t* const* x,
                       int32_t* acc, int64_t ld_acc) {
    constexpr int codes = 32 / bits, steps = 4;
    const int8_t* at[rows];
    for (int64_t i = 0; i < words;) {
      for (int m = 0; m < rows; m++) at[m] = x[m] + i * codes;
      const uint32_t* from = w + i * ld;
      if (words - i >= steps) {
        (i ? pass<bits, rows, steps, false> : pass<bits, rows, steps, true>)(from, ld, columns, at, acc, ld_acc);
        i += steps;
      } else {
        (i ? pass<bits, rows, 1, false> : pass<bits, rows, 1, true>)(from, ld, columns, at, acc, ld_acc);
        i++;
      }
    }
  }

  static void dot(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, const int8_t* const* x, int64_t rows,
                  int32_t* acc, int64_t ld_acc) {
    in_rows<4>(rows, [&](auto count, int64_t m) {
      dot_rows<decltype(count)::value>(w, ld, words, columns, x + m, acc + m * ld_acc, ld_acc);
    });
  }
};

#include "kernels.h"

}  // namespace

extern const Isa isa_avx2;
const Isa isa_avx2 = make("avx2", 5);

}  // namespace ferrum
