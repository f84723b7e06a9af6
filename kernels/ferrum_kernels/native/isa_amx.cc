// x86-64 with AVX-512 and the int8 tiles of AMX (Sapphire Rapids and later).
// GCC 12 warns of its own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "in_rows.h"
#include "isa.h"

namespace ferrum {
namespace {

#include "avx512.h"

// From how many rows a tile of 16 pays against VNNI.
constexpr int64_t kFewestRows = 6;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC 12 believes that loadconfig reads 8 of the 64 bytes, and that tile loads read nothing: the stores before them
// must be forced out.
void settle() { asm volatile("" ::: "memory"); }

// The most columns whose codes are unpacked before they are multiplied. A tile load waits for every store to its
// memory to reach the cache, so stores must lie well before loads.
constexpr int64_t kUnpacked = 256;

// Products of up to 32 rows and 32 columns at a time. Tiles 0 to 3 sum, 4 and 5 hold activations [16 rows, 64 inputs],
// 6 and 7 codes [16 groups of four inputs, 16 columns].
template <int bits>
struct Int8 {
  static constexpr int64_t codes = 32 / bits, deep = Blocks::kMost / 64, per_tile = 64 / codes;

  static void dot(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, const int8_t* const* x, int64_t rows,
                  int32_t* acc, int64_t ld_acc) {
    if (rows < kFewestRows) return Vnni<bits>::dot(w, ld, words, columns, x, rows, acc, ld_acc);
    alignas(64) int8_t activations[kTileRows][Blocks::kMost];
    TileConfig config;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    int64_t inputs = words * codes;
    for (int64_t m = 0; m < kTileRows; m++) {
      if (m >= rows || inputs < Blocks::kMost) __builtin_memset(activations[m], 0, sizeof(activations[m]));
      if (m < rows) __builtin_memcpy(activations[m], x[m], static_cast<size_t>(inputs));
    }
    settle();
    _tile_loadconfig(&config);
    for (int64_t c = 0; c < columns; c += kUnpacked)
      multiply(w + c, ld, words, columns - c < kUnpacked ? columns - c : kUnpacked, activations, rows, acc + c, ld_acc);
    _tile_release();
    settle();
  }

  static void multiply(const uint32_t* w, int64_t ld, int64_t words, int64_t columns,
                       const int8_t (*activations)[Blocks::kMost], int64_t rows, int32_t* acc, int64_t ld_acc) {
    alignas(64) uint8_t weights[kUnpacked / kWide][deep][16][64];
    alignas(64) int32_t spare[16][16];
    int64_t tiles = (words + per_tile - 1) / per_tile;
    if (words % per_tile) __builtin_memset(weights, 0, sizeof(weights));
    for (int64_t i = 0; i < words; i++)
      for (int64_t c = 0; c < columns; c += kWide)
        unpack(w + i * ld + c, weights[c / kWide][i / per_tile], i % per_tile);
    settle();
    bool both = rows > 16;
    for (int64_t c = 0; c < columns; c += 2 * kWide) {
      const auto& left = weights[c / kWide];
      const auto& right = weights[c / kWide + 1];
      _tile_zero(0);
      _tile_zero(1);
      if (both) {
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t t = 0; t < tiles; t++) {
        _tile_loadd(4, activations[0] + t * 64, Blocks::kMost);
        _tile_loadd(6, left[t], 64);
        _tile_loadd(7, right[t], 64);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (both) {
          _tile_loadd(5, activations[16] + t * 64, Blocks::kMost);
          _tile_dpbsud(2, 5, 6);
          _tile_dpbsud(3, 5, 7);
        }
      }
      int32_t* to = acc + c;
      if (rows >= 16) {
        _tile_stored(0, to, ld_acc * 4);
        _tile_stored(1, to + kWide, ld_acc * 4);
      } else {
        _tile_stored(0, spare, 64);
        copy_rows(spare, rows, to, ld_acc);
        _tile_stored(1, spare, 64);
        copy_rows(spare, rows, to + kWide, ld_acc);
      }
      if (rows == kTileRows) {
        _tile_stored(2, to + 16 * ld_acc, ld_acc * 4);
        _tile_stored(3, to + 16 * ld_acc + kWide, ld_acc * 4);
      } else if (both) {
        _tile_stored(2, spare, 64);
        copy_rows(spare, rows - 16, to + 16 * ld_acc, ld_acc);
        _tile_stored(3, spare, 64);
        copy_rows(spare, rows - 16, to + 16 * ld_acc + kWide, ld_acc);
      }
    }
    settle();
  }

  // One word row to one row of codes (8 bits) or two, even inputs and odd ones, which is how activations lie.
  static void unpack(const uint32_t* words, uint8_t (*tile)[64], int64_t row) {
    I word = loadi(words);
    if constexpr (bits == 8) {
      storei(tile[row], word);
    } else {
      const I mask = _mm512_set1_epi8(15);
      storei(tile[2 * row], and_(word, mask));
      storei(tile[2 * row + 1], and_(_mm512_srli_epi16(word, 4), mask));
    }
  }

  static void copy_rows(const int32_t (*from)[16], int64_t rows, int32_t* to, int64_t ld) {
    settle();
    for (int64_t m = 0; m < rows; m++) storei(to + m * ld, loadi(from[m]));
    settle();
  }
};

#include "kernels.h"

}  // namespace

extern const Isa isa_amx;
const Isa isa_amx = make("amx", 5);

}  // namespace ferrum
