// 64-bit ARM with the int8 matrix instructions of ARMv8.6 (Graviton 3, Apple M2, Cortex-X2, and later).
#include <arm_neon.h>

#include "in_rows.h"
#include "isa.h"

namespace ferrum {
namespace {

#include "neon.h"

// One instruction multiplies codes [2 columns, 8 inputs] by activations [2 rows, 8 inputs]: 32 products, twice those of
// a dot product instruction. Two word rows zipped put eight bytes of a column side by side, with 4-bit codes two planes
// of eight inputs; activations are laid out to match, once for all columns.
template <int bits>
struct Int8 {
  static constexpr int64_t codes = 32 / bits, most = 8, pair_size = 2 * Blocks::kMost;
  static constexpr int planes = 8 / bits;

  static void dot(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, const int8_t* const* x, int64_t rows,
                  int32_t* acc, int64_t ld_acc) {
    if (rows == 1) return Dot<bits>::dot(w, ld, words, columns, x, rows, acc, ld_acc);
    alignas(16) int8_t activations[kTileRows / 2][pair_size];
    int32_t* to[kTileRows];
    int64_t pairs = (rows + 1) / 2;
    for (int64_t p = 0; p < pairs; p++) {
      int64_t m = 2 * p, next = m + 1 < rows ? m + 1 : m;  // an odd row is its own partner, and is stored twice
      to[m] = acc + m * ld_acc, to[m + 1] = acc + next * ld_acc;
      lay_out(x[m], x[next], words, activations[p]);
    }
    in_rows<4>(pairs, [&](auto count, int64_t p) {
      constexpr int together = decltype(count)::value;
      for (int64_t i = 0; i < words; i += most)
        (i ? pass<together, false> : pass<together, true>)(w + i * ld, ld, words - i < most ? words - i : most, columns,
                                                           activations[p] + i * 2 * codes, to + 2 * p);
    });
  }

  // The activations of two word rows: per plane, eight of row a, then eight of row b. A missing word row is zeros.
  static void lay_out(const int8_t* a, const int8_t* b, int64_t words, int8_t* to) {
    int8_t last[2][2 * codes] = {};
    for (int64_t i = 0; i < words; i += 2, to += 4 * codes) {
      const int8_t *from = a + i * codes, *also = b + i * codes;
      if (i + 1 == words) {
        __builtin_memcpy(last[0], from, codes);
        __builtin_memcpy(last[1], also, codes);
        from = last[0], also = last[1];
      }
      if constexpr (bits == 4) {
        I p = loadi(from), q = loadi(also);
        storei(to, vuzp1q_s32(p, q));
        storei(to + 16, vuzp2q_s32(p, q));
      } else {
        vst1q_s8(to, vcombine_s8(vld1_s8(from), vld1_s8(also)));
      }
    }
  }

  // Sums [2 columns, 2 rows] of up to four pairs of rows and eight columns stay in registers.
  template <int pairs, bool first>
  static void pass(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, const int8_t* x, int32_t* const* to) {
    const uint8x16_t mask = vdupq_n_u8(15);
    for (int64_t c = 0; c < columns; c += 2 * kWide) {
      I sum[pairs][4];
#pragma GCC unroll 4
      for (int p = 0; p < pairs; p++)
        for (int v = 0; v < 2; v++) {
          I a = seti(0), b = a;
          if (!first) a = loadi(to[2 * p] + c + v * kWide), b = loadi(to[2 * p + 1] + c + v * kWide);
          sum[p][2 * v] = vzip1q_s32(a, b), sum[p][2 * v + 1] = vzip2q_s32(a, b);
        }
      for (int64_t i = 0; i < words; i += 2) {
        for (int v = 0; v < 2; v++) {
          const uint32_t* from = w + i * ld + c + v * kWide;
          I above = loadi(from), below = i + 1 < words ? loadi(from + ld) : seti(0);
          uint8x16_t left = vreinterpretq_u8_s32(vzip1q_s32(above, below));
          uint8x16_t right = vreinterpretq_u8_s32(vzip2q_s32(above, below));
          for (int plane = 0; plane < planes; plane++) {
            uint8x16_t l = left, r = right;
            if (bits == 4) {
              l = plane ? vshrq_n_u8(l, 4) : vandq_u8(l, mask);
              r = plane ? vshrq_n_u8(r, 4) : vandq_u8(r, mask);
            }
            for (int p = 0; p < pairs; p++) {
              int8x16_t both = vld1q_s8(x + p * pair_size + i * 2 * codes + plane * 16);
              sum[p][2 * v] = vusmmlaq_s32(sum[p][2 * v], l, both);
              sum[p][2 * v + 1] = vusmmlaq_s32(sum[p][2 * v + 1], r, both);
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < pairs; p++)
        for (int v = 0; v < 2; v++) {
          storei(to[2 * p] + c + v * kWide, vuzp1q_s32(sum[p][2 * v], sum[p][2 * v + 1]));
          storei(to[2 * p + 1] + c + v * kWide, vuzp2q_s32(sum[p][2 * v], sum[p][2 * v + 1]));
        }
    }
  }
};

#include "kernels.h"

}  // namespace

extern const Isa isa_i8mm;
const Isa isa_i8mm = make("i8mm", 5);

}  // namespace ferrum
