// What the two AVX-512 instruction sets share: vectors of 16 floats and the int8 products of VNNI.
// Included inside an unnamed namespace.

constexpr int64_t kWide = 16;
using V = __m512;
using I = __m512i;

V load(const float* x) { return _mm512_loadu_ps(x); }
void store(float* x, V v) { _mm512_storeu_ps(x, v); }
V set(float x) { return _mm512_set1_ps(x); }
V zero() { return _mm512_setzero_ps(); }
V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
V add(V a, V b) { return _mm512_add_ps(a, b); }
V sub(V a, V b) { return _mm512_sub_ps(a, b); }
V mul(V a, V b) { return _mm512_mul_ps(a, b); }
V divide(V a, V b) { return _mm512_div_ps(a, b); }
V max(V a, V b) { return _mm512_max_ps(a, b); }
V min(V a, V b) { return _mm512_min_ps(a, b); }
I loadi(const void* x) { return _mm512_loadu_si512(x); }
void storei(void* x, I v) { _mm512_storeu_si512(x, v); }
I seti(int32_t x) { return _mm512_set1_epi32(x); }
I addi(I a, I b) { return _mm512_add_epi32(a, b); }
I and_(I a, I b) { return _mm512_and_si512(a, b); }
template <int n>
I srl(I a) {
  return _mm512_srli_epi32(a, n);
}
template <int n>
I sll(I a) {
  return _mm512_slli_epi32(a, n);
}
V to_float(I a) { return _mm512_cvtepi32_ps(a); }
I to_int(V a) { return _mm512_cvtps_epi32(a); }
V as_float(I a) { return _mm512_castsi512_ps(a); }
V load_half(const uint16_t* x) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
void store_half(uint16_t* x, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
V load_bf16(const uint16_t* x) {
  return as_float(sll<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))));
}
void store_bf16(uint16_t* x, V v) {
  I bits = _mm512_castps_si512(v);
  I even = addi(bits, addi(seti(0x7FFF), and_(srl<16>(bits), seti(1))));
  __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  I high = srl<16>(_mm512_mask_or_epi32(even, nan, bits, seti(0x400000)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtepi32_epi16(high));
}

template <bool even_first>
void store_codes(const int32_t* whole, int8_t* to) {
  __m128i codes = _mm512_cvtepi32_epi8(loadi(whole));
  if (even_first) codes = _mm_shuffle_epi8(codes, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), codes);
}

// Four activations, the same in every lane of 32 bits.
I four(const int8_t* x) {
  int32_t word;
  __builtin_memcpy(&word, x, 4);
  return seti(word);
}

// The int8 products of `steps` word rows, four codes and activations per lane and instruction.
template <int bits, int rows, int steps, bool first>
void vnni_pass(const uint32_t* w, int64_t ld, int64_t columns, const int8_t* const* x, int32_t* acc, int64_t ld_acc) {
  const I mask = _mm512_set1_epi8(15);
  for (int64_t c = 0; c < columns; c += 2 * kWide) {
    I sum[rows][2];
    for (int m = 0; m < rows; m++)
      for (int v = 0; v < 2; v++) sum[m][v] = first ? seti(0) : loadi(acc + m * ld_acc + c + v * kWide);
#pragma GCC unroll 8
    for (int i = 0; i < steps; i++) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        const uint32_t* from = w + i * ld + c + v * kWide;
        __builtin_prefetch(from + steps * ld, 0, 2);  // the same columns in the next pass
        I word = loadi(from);
        if constexpr (bits == 4) {
          I even = and_(word, mask), odd = and_(_mm512_srli_epi16(word, 4), mask);
#pragma GCC unroll 8
          for (int m = 0; m < rows; m++) {
            sum[m][v] = _mm512_dpbusd_epi32(sum[m][v], even, four(x[m] + i * 8));
            sum[m][v] = _mm512_dpbusd_epi32(sum[m][v], odd, four(x[m] + i * 8 + 4));
          }
        } else {
#pragma GCC unroll 8
          for (int m = 0; m < rows; m++) sum[m][v] = _mm512_dpbusd_epi32(sum[m][v], word, four(x[m] + i * 4));
        }
      }
    }
    for (int m = 0; m < rows; m++)
      for (int v = 0; v < 2; v++) storei(acc + m * ld_acc + c + v * kWide, sum[m][v]);
  }
}

template <int bits>
struct Vnni {
  template <int rows>
  static void dot_rows(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, const int8_t* const* x,
                       int32_t* acc, int64_t ld_acc) {
    constexpr int codes = 32 / bits, steps = 8;
    const int8_t* at[rows];
    for (int64_t i = 0; i < words;) {
      for (int m = 0; m < rows; m++) at[m] = x[m] + i * codes;
      const uint32_t* from = w + i * ld;
      if (words - i >= steps) {
        (i ? vnni_pass<bits, rows, steps, false> : vnni_pass<bits, rows, steps, true>)(from, ld, columns, at, acc,
                                                                                       ld_acc);
        i += steps;
      } else {
        (i ? vnni_pass<bits, rows, 1, false> : vnni_pass<bits, rows, 1, true>)(from, ld, columns, at, acc, ld_acc);
        i++;
      }
    }
  }

  static void dot(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, const int8_t* const* x, int64_t rows,
                  int32_t* acc, int64_t ld_acc) {
    in_rows<8>(rows, [&](auto count, int64_t m) {
      dot_rows<decltype(count)::value>(w, ld, words, columns, x + m, acc + m * ld_acc, ld_acc);
    });
  }
};
