// What the two ARM instruction sets share: vectors of 4 floats and the int8 products of the dot product instructions.
// Included inside an unnamed namespace.

constexpr int64_t kWide = 4;
using V = float32x4_t;
using I = int32x4_t;

V load(const float* x) { return vld1q_f32(x); }
void store(float* x, V v) { vst1q_f32(x, v); }
V set(float x) { return vdupq_n_f32(x); }
V zero() { return vdupq_n_f32(0.f); }
V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
V add(V a, V b) { return vaddq_f32(a, b); }
V sub(V a, V b) { return vsubq_f32(a, b); }
V mul(V a, V b) { return vmulq_f32(a, b); }
V divide(V a, V b) { return vdivq_f32(a, b); }
V max(V a, V b) { return vmaxq_f32(a, b); }
V min(V a, V b) { return vminq_f32(a, b); }
I loadi(const void* x) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(x))); }
void storei(void* x, I v) { vst1q_u8(static_cast<uint8_t*>(x), vreinterpretq_u8_s32(v)); }
I seti(int32_t x) { return vdupq_n_s32(x); }
I addi(I a, I b) { return vaddq_s32(a, b); }
I and_(I a, I b) { return vandq_s32(a, b); }
template <int n>
I srl(I a) {
  return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), n));
}
template <int n>
I sll(I a) {
  return vshlq_n_s32(a, n);
}
V to_float(I a) { return vcvtq_f32_s32(a); }
I to_int(V a) { return vcvtnq_s32_f32(a); }
V as_float(I a) { return vreinterpretq_f32_s32(a); }
V load_half(const uint16_t* x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))); }
void store_half(uint16_t* x, V v) { vst1_u16(x, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
V load_bf16(const uint16_t* x) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16)); }
void store_bf16(uint16_t* x, V v) {
  uint32x4_t bits = vreinterpretq_u32_f32(v);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  uint32x4_t even = vaddq_u32(bits, vaddq_u32(vdupq_n_u32(0x7FFF), odd));
  uint32x4_t number = vceqq_f32(v, v);
  vst1_u16(x, vshrn_n_u32(vbslq_u32(number, even, vorrq_u32(bits, vdupq_n_u32(0x400000))), 16));
}

template <bool even_first>
void store_codes(const int32_t* whole, int8_t* to) {
  const uint8_t order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  for (int i = 0; i < 16; i += 8) {
    int8x8_t codes = vmovn_s16(vcombine_s16(vmovn_s32(loadi(whole + i)), vmovn_s32(loadi(whole + i + 4))));
    vst1_s8(to + i, even_first ? vtbl1_s8(codes, vreinterpret_s8_u8(vld1_u8(order))) : codes);
  }
}

// Four activations, the same in every lane of 32 bits.
int8x16_t four(const int8_t* x) {
  int32_t word;
  __builtin_memcpy(&word, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

// The instruction multiplies signed bytes: 8-bit codes are taken less 128, which `first` makes up for.
template <int bits, int rows>
void dot_pass(const uint32_t* w, int64_t ld, int64_t steps, int64_t columns, const int8_t* const* x,
              const int32_t* first, int32_t* acc, int64_t ld_acc) {
  const uint8x16_t mask = vdupq_n_u8(15), top = vdupq_n_u8(128);
  for (int64_t c = 0; c < columns; c += 2 * kWide) {
    I sum[rows][2];
    for (int m = 0; m < rows; m++)
      for (int v = 0; v < 2; v++) sum[m][v] = first ? seti(first[m]) : loadi(acc + m * ld_acc + c + v * kWide);
    for (int64_t i = 0; i < steps; i++) {
      for (int v = 0; v < 2; v++) {
        uint8x16_t word = vreinterpretq_u8_s32(loadi(w + i * ld + c + v * kWide));
        if constexpr (bits == 4) {
          int8x16_t even = vreinterpretq_s8_u8(vandq_u8(word, mask)), odd = vreinterpretq_s8_u8(vshrq_n_u8(word, 4));
          for (int m = 0; m < rows; m++) {
            sum[m][v] = vdotq_s32(sum[m][v], even, four(x[m] + i * 8));
            sum[m][v] = vdotq_s32(sum[m][v], odd, four(x[m] + i * 8 + 4));
          }
        } else {
          int8x16_t code = vreinterpretq_s8_u8(veorq_u8(word, top));
          for (int m = 0; m < rows; m++) sum[m][v] = vdotq_s32(sum[m][v], code, four(x[m] + i * 4));
        }
      }
    }
    for (int m = 0; m < rows; m++)
      for (int v = 0; v < 2; v++) storei(acc + m * ld_acc + c + v * kWide, sum[m][v]);
  }
}

template <int bits>
struct Dot {
  template <int rows>
  static void dot_rows(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, const int8_t* const* x,
                       int32_t* acc, int64_t ld_acc) {
    constexpr int codes = 32 / bits;
    constexpr int64_t most = 8;
    int32_t first[rows] = {};
    if (bits == 8)
      for (int m = 0; m < rows; m++)
        for (int64_t i = 0; i < words * codes; i++) first[m] += 128 * x[m][i];
    const int8_t* at[rows];
    for (int64_t i = 0; i < words; i += most) {
      for (int m = 0; m < rows; m++) at[m] = x[m] + i * codes;
      int64_t steps = words - i < most ? words - i : most;
      dot_pass<bits, rows>(w + i * ld, ld, steps, columns, at, i ? nullptr : first, acc, ld_acc);
    }
  }

  static void dot(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, const int8_t* const* x, int64_t rows,
                  int32_t* acc, int64_t ld_acc) {
    in_rows<4>(rows, [&](auto count, int64_t m) {
      dot_rows<decltype(count)::value>(w, ld, words, columns, x + m, acc + m * ld_acc, ld_acc);
    });
  }
};
