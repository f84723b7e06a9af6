// The functions that exist once per instruction set, and the choice among them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "weights.h"

namespace ferrum {

// Columns times rows that one call of `tile` may cover: its scratch stays within the second-level cache.
constexpr int64_t kTileColumns = 2048;
constexpr int64_t kTileRows = 32;
constexpr int64_t kTileSize = 8192;

struct Isa {
  const char* name;

  // From how many rows a matrix product pays for wide tiles of columns instead of whole word rows.
  int64_t wide_rows;
  int64_t wide_columns;  // of such a tile

  // y[m, c] = sum over chunks [chunk0, chunk1) of x[m] @ W[:, column0 + c], for c < columns.
  // rows <= kTileRows, columns <= kTileColumns, rows * columns <= kTileSize (both rounded up to 16).
  void (*tile)(const Packed& w, int64_t column0, int64_t columns, int64_t chunk0, int64_t chunk1, const Row* x,
               int64_t rows, float* y, int64_t ldy);

  // The same for a plain matrix [k, n] of `type`, whose columns need only fit kTileSize.
  void (*dense_tile)(const void* w, Float type, int64_t k, int64_t n, int64_t column0, int64_t columns, int64_t chunk0,
                     int64_t chunk1, const float* const* x, int64_t rows, float* y, int64_t ldy);

  // int8 codes of a row, one scale per block: scale = max |x| / 127. A row that holds NaN or infinity gets NaN scales.
  void (*quantize)(const float* x, const Blocks& blocks, int bits, int8_t* codes, float* scales, int32_t* sums);

  void (*to_float)(const void* x, Float type, int64_t n, float* y);
  void (*from_float)(const float* x, int64_t n, Float type, void* y);

  // y = silu(gate) * up, where y may be gate.
  void (*silu_mul)(const float* gate, const float* up, int64_t n, float* y);

  // y += a * x.
  void (*axpy)(float a, const float* x, int64_t n, float* y);
  // 1 / sqrt(mean(x^2) + eps) applied to x and multiplied by weight.
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* y);
  // Rotary embedding of one head of two halves: (a cos - b sin, b cos + a sin) * scale. y may not be x.
  void (*rotate)(const float* x, int64_t half, const float* cosine, const float* sine, float scale, float* y);

  // One block of keys for queries that share them, the inner loop of streaming softmax (see attention.cc).
  // q: queries transposed, [head, ldq], ldq = rows rounded up to 32 with zeros. keys, values: [count, head] of `type`,
  // rows `stride` bytes apart. low, high [ldq]: row r sees keys [low, high) of the block. Updated: best and total
  // [ldq], the largest score and the sum of weights so far, and out [rows, head rounded up to 32], the weighted sum.
  void (*attend)(const float* q, int64_t ldq, int64_t rows, int64_t head, const void* keys, const void* values,
                 Float type, int64_t stride, int64_t count, const float* low, const float* high, float* best,
                 float* total, float* out);

  // softmax over n, in place; returns false when a value is NaN or +infinity.
  bool (*softmax)(float* x, int64_t n);
};

constexpr int64_t kKeyBlock = 64;    // keys in one call of `attend`
constexpr int64_t kQueryRows = 128;  // and query rows
constexpr int64_t kHeadMost = 256;   // the longest head

// The one in use: the best this machine has, or what FERRUM_JAX_CPU_ISA names; null when that cannot be used here.
const Isa* chosen_isa();

// Takes another from now on; false, and no change, when this machine or this build does not have it.
bool choose_isa(const char* name);

// Those that this machine and this build have, worst first, separated by commas.
const char* usable_isas();

}  // namespace ferrum
