// x86-64 with AVX-512 and the int8 tiles of AMX (Sapphire Rapids and later).
// GCC 12 warns of its own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "in_rows.h"
#include "isa.h"

namespace ferrum {
namespace {

#include "avx512.h"

// From how many rows a tile pays against VNNI.
constexpr int64_t kFewestRows = 4;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC 12 believes that loadconfig reads 8 of the 64 bytes, and that tile loads read nothing: the stores before them
// must be forced out.
void settle() { asm volatile("" ::: "memory"); }

// Products of up to 32 rows and 32 columns at a time. Tiles 0 to 3 sum, 4 and 5 hold activations [16 rows, 64 inputs],
// 6 and 7 codes [16 groups of four inputs, 16 columns].
template <int bits>
class Strips {
 public:
  // Shapes the tile registers for some rows and for blocks of at most some inputs.
  Strips(int64_t rows, int64_t most_inputs)
      : rows_(rows), depth_(most_inputs < kTileInputs ? (most_inputs + 3) / 4 * 4 : kTileInputs) {
    TileConfig config;
    auto shape = [&](int tile, int64_t tile_rows, int64_t bytes) {
      config.rows[tile] = static_cast<uint8_t>(tile_rows), config.bytes[tile] = static_cast<uint16_t>(bytes);
    };
    int64_t upper = rows < 16 ? rows : 16, lower = rows > 16 ? rows - 16 : 1;
    for (int sum = 0; sum < 4; sum++) shape(sum, sum < 2 ? upper : lower, 64);
    shape(4, upper, depth_), shape(5, lower, depth_);
    shape(6, depth_ / 4, 64), shape(7, depth_ / 4, 64);
    __builtin_memset(activations_, 0, sizeof(activations_));
    __builtin_memset(weights_, 0, sizeof(weights_));
    settle();
    _tile_loadconfig(&config);
  }
  ~Strips() { _tile_release(); }

  // Calls sink(column, columns, sums, row length) with the products of one block for every 32 columns. The next columns are
  // unpacked before these are multiplied, and sums are given on after the next ones are made: a tile load waits for
  // stores to its memory, and a load waits for tile stores.
  template <typename Sink>
  void run(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, int64_t ahead, const int8_t* const* x,
           const Sink& sink) {
    int64_t inputs = words * codes, tiles = (inputs + depth_ - 1) / depth_;
    // Where a block ends within a tile, its activations are zero, and the codes are those of another block.
    if (inputs % depth_) __builtin_memset(activations_, 0, sizeof(activations_));
    for (int64_t m = 0; m < rows_; m++) {
      if (inputs == Blocks::kMost) {
        storei(activations_[m], loadi(x[m]));
        storei(activations_[m] + 64, loadi(x[m] + 64));
      } else {
        __builtin_memcpy(activations_[m], x[m], static_cast<size_t>(inputs));
      }
    }
    unpack(w, ld, words, ahead, weights_[0]);
    for (int64_t c = 0, turn = 0; c < columns; c += kStrip, turn ^= 1) {
      if (c + kStrip < columns) unpack(w + c + kStrip, ld, words, ahead, weights_[turn ^ 1]);
      settle();
      multiply(weights_[turn], tiles, sums_[turn]);
      settle();
      if (c) sink(c - kStrip, kStrip, sums_[turn ^ 1][0], kStrip);
      if (c + kStrip >= columns) sink(c, kStrip, sums_[turn][0], kStrip);
    }
  }

 private:
  static constexpr int64_t kTileInputs = 64, kStrip = 2 * kWide, codes = 32 / bits;
  using Tile = uint8_t[16][64];

  void multiply(const Tile (*weights)[2], int64_t tiles, int32_t (*sums)[kStrip]) {
    constexpr int kRow = kStrip * 4;
    bool both = rows_ > 16;
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t t = 0; t < tiles; t++) {
      _tile_loadd(4, activations_[0] + t * depth_, Blocks::kMost);
      _tile_loadd(6, weights[0][t], 64);
      _tile_loadd(7, weights[1][t], 64);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      if (both) {
        _tile_loadd(5, activations_[16] + t * depth_, Blocks::kMost);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
    _tile_stored(0, sums[0], kRow);
    _tile_stored(1, sums[0] + kWide, kRow);
    if (both) {
      _tile_stored(2, sums[16], kRow);
      _tile_stored(3, sums[16] + kWide, kRow);
    }
  }

  // A word row of 16 columns is one row of codes (8 bits) or two, even inputs and odd ones, which is how activations lie.
  static void unpack(const uint32_t* w, int64_t ld, int64_t words, int64_t ahead, Tile (*tiles)[2]) {
    const I mask = _mm512_set1_epi8(15);
    constexpr int64_t per_tile = kTileInputs / codes;
    for (int64_t i = 0; i < words; i++)
      for (int64_t half = 0; half < 2; half++) {
        const uint32_t* from = w + i * ld + half * kWide;
        __builtin_prefetch(from + ahead, 0, 2);
        I word = loadi(from);
        uint8_t(*rows)[64] = tiles[half][i / per_tile];
        if constexpr (bits == 8) {
          storei(rows[i % per_tile], word);
        } else {
          storei(rows[i % per_tile * 2], and_(word, mask));
          storei(rows[i % per_tile * 2 + 1], and_(_mm512_srli_epi16(word, 4), mask));
        }
      }
  }

  const int64_t rows_, depth_;
  alignas(64) int8_t activations_[kTileRows][Blocks::kMost];
  alignas(64) Tile weights_[2][2][2];  // [turn, half of the columns, half of the inputs]
  alignas(64) int32_t sums_[2][kTileRows][kStrip];
};

template <int bits>
using Int8 = Vnni<bits>;

#include "kernels.h"

void tile_with_amx(const Packed& w, int64_t column0, int64_t columns, int64_t chunk0, int64_t chunk1, const Row* x,
                   int64_t rows, float* y, int64_t ldy) {
  auto run = w.bits == 4 ? packed_tile<Quantized<4>, 4, Strips<4>> : packed_tile<Quantized<8>, 8, Strips<8>>;
  (x[0].codes && rows >= kFewestRows ? run : tile)(w, column0, columns, chunk0, chunk1, x, rows, y, ldy);
}

}  // namespace

extern const Isa isa_amx;
const Isa isa_amx = make("amx", 5, 256, tile_with_amx);

}  // namespace ferrum
