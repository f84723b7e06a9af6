// Plain C++: what every machine can run, and what the others are measured against.
#include "in_rows.h"
#include "isa.h"

namespace ferrum {
namespace {

constexpr int64_t kWide = 8;

struct V {
  float lane[kWide];
};
struct I {
  int32_t lane[kWide];
};

template <typename To, typename Body>
To each(const Body& body) {
  To out;
  for (int64_t i = 0; i < kWide; i++) out.lane[i] = body(i);
  return out;
}

V load(const float* x) { return each<V>([&](int64_t i) { return x[i]; }); }
void store(float* x, V v) { __builtin_memcpy(x, v.lane, sizeof(v.lane)); }
V set(float x) { return each<V>([&](int64_t) { return x; }); }
V zero() { return set(0.f); }
V fma(V a, V b, V c) { return each<V>([&](int64_t i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); }); }
V add(V a, V b) { return each<V>([&](int64_t i) { return a.lane[i] + b.lane[i]; }); }
V sub(V a, V b) { return each<V>([&](int64_t i) { return a.lane[i] - b.lane[i]; }); }
V mul(V a, V b) { return each<V>([&](int64_t i) { return a.lane[i] * b.lane[i]; }); }
V divide(V a, V b) { return each<V>([&](int64_t i) { return a.lane[i] / b.lane[i]; }); }
V max(V a, V b) { return each<V>([&](int64_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
V min(V a, V b) { return each<V>([&](int64_t i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }

I loadi(const void* x) {
  I v;
  __builtin_memcpy(v.lane, x, sizeof(v.lane));
  return v;
}
void storei(void* x, I v) { __builtin_memcpy(x, v.lane, sizeof(v.lane)); }
I seti(int32_t x) { return each<I>([&](int64_t) { return x; }); }
I addi(I a, I b) { return each<I>([&](int64_t i) { return a.lane[i] + b.lane[i]; }); }
I and_(I a, I b) { return each<I>([&](int64_t i) { return a.lane[i] & b.lane[i]; }); }
template <int n>
I srl(I a) {
  return each<I>([&](int64_t i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) >> n); });
}
template <int n>
I sll(I a) {
  return each<I>([&](int64_t i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) << n); });
}
V to_float(I a) { return each<V>([&](int64_t i) { return static_cast<float>(a.lane[i]); }); }
// To the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves it in the low bits.
I to_int(V a) {
  return each<I>([&](int64_t i) {
    float shifted = a.lane[i] + 12582912.f;
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    return bits - 0x4B400000;
  });
}
V as_float(I a) {
  V v;
  __builtin_memcpy(v.lane, a.lane, sizeof(v.lane));
  return v;
}

float from_half(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3FF;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(fraction) * 0x1p-24f;
  } else {
    uint32_t bits = (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
    __builtin_memcpy(&value, &bits, 4);
  }
  return sign ? -value : value;
}

uint16_t to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds past 65504
  if (magnitude < 0x38800000) {                                              // subnormal: count units of 2^-24
    float units = __builtin_fabsf(x) * 0x1p24f + 8388608.f;
    uint32_t count;
    __builtin_memcpy(&count, &units, 4);
    return static_cast<uint16_t>(sign | (count & 0x7FF));
  }
  uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

V load_half(const uint16_t* x) { return each<V>([&](int64_t i) { return from_half(x[i]); }); }
void store_half(uint16_t* x, V v) {
  for (int64_t i = 0; i < kWide; i++) x[i] = to_half(v.lane[i]);
}
V load_bf16(const uint16_t* x) {
  return as_float(each<I>([&](int64_t i) { return static_cast<int32_t>(static_cast<uint32_t>(x[i]) << 16); }));
}
void store_bf16(uint16_t* x, V v) {
  for (int64_t i = 0; i < kWide; i++) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v.lane[i], 4);
    bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    x[i] = static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}

template <bool even_first>
void store_codes(const int32_t* whole, int8_t* to) {
  for (int64_t i = 0; i < 16; i++) to[even_first ? i / 8 * 8 + i % 2 * 4 + i % 8 / 2 : i] = static_cast<int8_t>(whole[i]);
}

// acc[m, c] = sum over word rows i and codes j of code(w[i, c], j) * x[m][...]; x in the order that `quantize` gives.
template <int bits>
struct Int8 {
  static void dot(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, const int8_t* const* x, int64_t rows,
                  int32_t* acc, int64_t ld_acc) {
    constexpr int codes = 32 / bits;
    for (int64_t m = 0; m < rows; m++) {
      int32_t* to = acc + m * ld_acc;
      for (int64_t c = 0; c < columns; c++) to[c] = 0;
      for (int64_t i = 0; i < words; i++) {
        const int8_t* at = x[m] + i * codes;
        for (int64_t c = 0; c < columns; c++) {
          uint32_t word = w[i * ld + c];
          int32_t sum = 0;
          for (int j = 0; j < codes; j++) {
            // Four even inputs lie before four odd ones.
            int place = bits == 4 ? j / 2 + j % 2 * 4 : j;
            sum += static_cast<int32_t>(word >> (j * bits) & ((1u << bits) - 1)) * at[place];
          }
          to[c] += sum;
        }
      }
    }
  }
};

#include "kernels.h"

}  // namespace

extern const Isa isa_portable;
const Isa isa_portable = make("portable", 4);

}  // namespace ferrum
