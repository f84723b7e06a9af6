// x86-64 with AVX-512 and the int8 tiles of AMX (Sapphire Rapids and later).
// GCC 12 warns of its own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "in_rows.h"
#include "isa.h"

namespace ferrum {
namespace {

#include "avx512.h"

template <int bits>
using Int8 = Vnni<bits>;

#include "kernels.h"

// From how many rows tiles pay against VNNI, how many columns they take at once, and the smallest blocks worth a tile.
constexpr int64_t kFewestRows = 2;
constexpr int64_t kWideColumns = 256;
constexpr int64_t kLeastInputs = 32;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC 12 believes that loadconfig reads 8 of the 64 bytes, and that tile loads read nothing: the stores before them
// must be forced out.
void settle() { asm volatile("" ::: "memory"); }

// Int8 products of up to 32 rows, 32 columns at a time: a strip. Tile registers 0 to 3 sum, 4 and 5 hold activations
// [16 rows, 64 inputs], 6 and 7 codes [16 groups of four inputs, 16 columns].
template <int bits>
class Strips {
 public:
  Strips(const Packed& w, const Row* x, int64_t rows)
      : w_(w), blocks_(w.k, w.group), x_(x), rows_(rows), depth_(least(kTileInputs, (w.group + 3) / 4 * 4)),
        width_((least(w.group, Blocks::kMost) + depth_ - 1) / depth_ * depth_) {
    TileConfig config;
    auto shape = [&](int tile, int64_t tile_rows, int64_t bytes) {
      config.rows[tile] = static_cast<uint8_t>(tile_rows), config.bytes[tile] = static_cast<uint16_t>(bytes);
    };
    int64_t upper = least(rows, 16), lower = rows > 16 ? rows - 16 : 1;
    for (int sum = 0; sum < 4; sum++) shape(sum, sum < 2 ? upper : lower, 64);
    shape(4, upper, depth_), shape(5, lower, depth_);
    shape(6, depth_ / 4, 64), shape(7, depth_ / 4, 64);
    __builtin_memset(weights_, 0, sizeof(weights_));
    settle();
    _tile_loadconfig(&config);
  }
  ~Strips() { _tile_release(); }

  // Adds or, when it is the first, puts the products of one chunk where they belong. Work goes by blocks and, within a
  // block, by strips, which is nearly as memory lies. What the next strip needs is unpacked before this one is
  // multiplied, and its sums are scaled after the next one is multiplied: a tile load waits for stores to its memory,
  // and a load waits for tile stores.
  void chunk(int64_t number, int64_t column0, int64_t columns, bool first, float* y, int64_t ldy) {
    int64_t block0 = number * blocks_.per_chunk, count = least(blocks_.per_chunk, blocks_.count - block0);
    int64_t strips = (columns + kStrip - 1) / kStrip, steps = strips * count;
    for (int64_t i = 0; i < count; i++) prepare(i, block0 + i, column0, columns);
    auto unpack_step = [&](int64_t step) {
      int64_t c = step % strips * kStrip;
      unpack(block0 + step / strips, column0 + c, columns - c, columns, weights_[step % 2]);
    };
    unpack_step(0);
    for (int64_t step = 0; step <= steps; step++) {
      if (step + 1 < steps) unpack_step(step + 1);
      settle();
      if (step < steps) multiply(step / strips, weights_[step % 2], sums_[step % 2]);
      settle();
      if (step == 0) continue;
      int64_t i = (step - 1) / strips, c = (step - 1) % strips * kStrip;
      (this->*(i == 0 ? &Strips::scale<true> : &Strips::scale<false>))(i, c, sums_[(step - 1) % 2]);
    }
    give(scaled_, rows_, columns, kWideColumns, first, y, ldy);
  }

 private:
  static constexpr int64_t kTileInputs = 64, kStrip = 2 * kWide, kCodes = 32 / bits;
  static constexpr int64_t kMostBlocks = Blocks::kChunk / kLeastInputs;  // in a chunk
  using Tile = uint8_t[16][64];

  // Activations, scales and zero points of a block; i counts blocks within the chunk.
  void prepare(int64_t i, int64_t block, int64_t column0, int64_t columns) {
    int64_t begin = blocks_.begin(block), inputs = (blocks_.end(block) - begin + kCodes - 1) / kCodes * kCodes;
    for (int64_t m = 0; m < rows_; m++) {
      const int8_t* from = x_[m].codes + begin;
      int8_t* to = activations_ + (i * kTileRows + m) * width_;
      if (inputs == Blocks::kMost) {
        storei(to, loadi(from));
        storei(to + 64, loadi(from + 64));
      } else {  // where a block ends within a tile, activations are zero, and codes may be another block's
        __builtin_memset(to, 0, static_cast<size_t>(width_));
        __builtin_memcpy(to, from, static_cast<size_t>(inputs));
      }
      factors_[i * kTileRows + m] = x_[m].scales[block];
      totals_[i * kTileRows + m] = -static_cast<float>(x_[m].sums[block]);
    }
    // Asked for early: the scales of the next chunk.
    const uint16_t* later = w_.scales + blocks_.group_of(block + blocks_.per_chunk) * w_.n + column0;
    if (block + blocks_.per_chunk < blocks_.count)
      for (int64_t c = 0; c < columns; c += 32) __builtin_prefetch(later + c, 0, 3);
    float *scales = scales_ + i * kWideColumns, *zeros = zeros_ + i * kWideColumns;
    read_group(w_, blocks_.group_of(block), column0, columns, scales, zeros);
    if (!w_.zeros)
      for (int64_t c = 0; c < padded(columns); c += kWide) store(zeros + c, set(1 << (bits - 1)));
  }

  // The codes of a block for the first 32 of `columns`; the block is multiplied for `of` columns altogether. A word row
  // of 16 columns is one row of a tile (8 bits) or two, even inputs and odd ones, which is how activations lie.
  void unpack(int64_t block, int64_t column, int64_t columns, int64_t of, Tile (*tiles)[2]) const {
    const I mask = _mm512_set1_epi8(15);
    int64_t begin = blocks_.begin(block) / kCodes, words = (blocks_.end(block) + kCodes - 1) / kCodes - begin;
    const uint32_t* from = w_.words + begin * w_.n + column;
    const int64_t per_tile = depth_ / kCodes;
    // The words wanted next: of the next block, or of the first block of the columns beside all these.
    int64_t done = begin + words, ahead = words * w_.n;
    if (done + words > w_.word_rows()) ahead = column + of < w_.n ? of - begin * w_.n : 0;
    const __mmask16 there[2] = {lanes(columns), lanes(columns - kWide)};
    for (int64_t i = 0; i < words; i++, from += w_.n)
      for (int64_t half = 0; half < 2; half++) {
        __builtin_prefetch(from + half * kWide + ahead, 0, 2);
        I word = _mm512_maskz_loadu_epi32(there[half], from + half * kWide);
        uint8_t(*row)[64] = tiles[half][i / per_tile];
        if constexpr (bits == 8) {
          storei(row[i % per_tile], word);
        } else {
          storei(row[i % per_tile * 2], and_(word, mask));
          storei(row[i % per_tile * 2 + 1], and_(_mm512_srli_epi16(word, 4), mask));
        }
      }
  }

  static __mmask16 lanes(int64_t columns) {
    return columns >= kWide ? 0xFFFF : columns <= 0 ? 0 : static_cast<__mmask16>((1 << columns) - 1);
  }

  void multiply(int64_t i, const Tile (*weights)[2], int32_t (*sums)[kStrip]) const {
    constexpr int kRow = kStrip * 4;
    const int8_t* x = activations_ + i * kTileRows * width_;
    bool both = rows_ > 16;
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t t = 0; t * depth_ < width_; t++) {
      _tile_loadd(4, x + t * depth_, width_);
      _tile_loadd(6, weights[0][t], 64);
      _tile_loadd(7, weights[1][t], 64);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      if (both) {
        _tile_loadd(5, x + 16 * width_ + t * depth_, width_);
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

  // As add_block does.
  template <bool first>
  void scale(int64_t i, int64_t c, const int32_t (*sums)[kStrip]) {
    const float *scales = scales_ + i * kWideColumns + c, *zeros = zeros_ + i * kWideColumns + c;
    V scale[2] = {load(scales), load(scales + kWide)}, zeros_of[2] = {load(zeros), load(zeros + kWide)};
    for (int64_t m = 0; m < rows_; m++) {
      V factor = set(factors_[i * kTileRows + m]), total = set(totals_[i * kTileRows + m]);
      for (int half = 0; half < 2; half++) {
        V centred = fma(zeros_of[half], total, to_float(loadi(sums[m] + half * kWide)));
        float* to = scaled_ + m * kWideColumns + c + half * kWide;
        store(to, fma(mul(scale[half], factor), centred, first ? zero() : load(to)));
      }
    }
  }

  const Packed& w_;
  const Blocks blocks_;
  const Row* x_;
  const int64_t rows_, depth_;
  const int64_t width_;  // inputs of a block, in whole tiles
  alignas(64) int8_t activations_[2 * Blocks::kChunk * kTileRows];  // [blocks, rows, width]
  alignas(64) float factors_[kMostBlocks * kTileRows];
  alignas(64) float totals_[kMostBlocks * kTileRows];
  alignas(64) float scales_[kMostBlocks * kWideColumns];
  alignas(64) float zeros_[kMostBlocks * kWideColumns];
  alignas(64) Tile weights_[2][2][2];  // [turn, half of the columns, half of the inputs]
  alignas(64) int32_t sums_[2][kTileRows][kStrip];
  alignas(64) float scaled_[kTileRows * kWideColumns];
};

template <int bits>
void strips(const Packed& w, int64_t column0, int64_t columns, int64_t chunk0, int64_t chunk1, const Row* x,
            int64_t rows, float* y, int64_t ldy) {
  Strips<bits> work(w, x, rows);
  for (int64_t c = 0; c < columns; c += kWideColumns)
    for (int64_t chunk = chunk0; chunk < chunk1; chunk++)
      work.chunk(chunk, column0 + c, least(kWideColumns, columns - c), chunk == chunk0, y + c, ldy);
}

void tile_or_strips(const Packed& w, int64_t column0, int64_t columns, int64_t chunk0, int64_t chunk1, const Row* x,
                    int64_t rows, float* y, int64_t ldy) {
  bool pays = x[0].codes && rows >= kFewestRows && w.group >= kLeastInputs;
  auto run = !pays ? tile : w.bits == 4 ? strips<4> : strips<8>;
  run(w, column0, columns, chunk0, chunk1, x, rows, y, ldy);
}

}  // namespace

extern const Isa isa_amx;
const Isa isa_amx = make("amx", kFewestRows, kWideColumns, tile_or_strips);

}  // namespace ferrum
