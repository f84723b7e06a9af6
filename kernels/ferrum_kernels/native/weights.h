// The matrices and activations that kernels read, and how K is cut into blocks and chunks.
#pragma once

#include <cstdint>

// Functions with a body in a header are inlined into every file: the files are compiled for different machines, and the
// linker must not take one file's copy for all.
#define FERRUM_INLINE inline __attribute__((always_inline))

namespace ferrum {

enum class Float : int { f32, bf16, f16 };

// One GPTQ matrix [k, n] as PackedLinear holds it: word rows of n words, codes packed down k.
struct Packed {
  const uint32_t* words;   // [ceil(k * bits / 32), n]
  const uint16_t* scales;  // float16 [ceil(k / group), n]
  const uint32_t* zeros;   // [ceil(k / group), ceil(n * bits / 32)], or null: 2**(bits - 1) everywhere
  int64_t k, n, group;
  int bits;  // 4 or 8

  FERRUM_INLINE int64_t codes_per_word() const { return 32 / bits; }
  FERRUM_INLINE int64_t word_rows() const { return (k + codes_per_word() - 1) / codes_per_word(); }
  FERRUM_INLINE int64_t zero_words() const { return (n + codes_per_word() - 1) / codes_per_word(); }
};

// K is cut into blocks that share a weight scale and an activation scale (at most 128 inputs), and blocks into chunks.
// Sums run over the blocks of a chunk, then over chunks, whatever the batch or the threads: a row's result is the same
// bits alone and in a batch.
struct Blocks {
  static constexpr int64_t kMost = 128;   // inputs in a block
  static constexpr int64_t kChunk = 512;  // inputs in a chunk

  int64_t k, group, per_group, count, per_chunk, chunks;

  FERRUM_INLINE Blocks(int64_t k, int64_t group) : k(k), group(group) {
    int64_t groups = (k + group - 1) / group;
    per_group = (group + kMost - 1) / kMost;
    count = (groups - 1) * per_group + (k - (groups - 1) * group + kMost - 1) / kMost;
    int64_t size = group < kMost ? group : kMost;
    per_chunk = kChunk / size > 0 ? kChunk / size : 1;
    chunks = (count + per_chunk - 1) / per_chunk;
  }
  FERRUM_INLINE int64_t group_of(int64_t block) const { return block / per_group; }
  FERRUM_INLINE int64_t begin(int64_t block) const { return group_of(block) * group + block % per_group * kMost; }
  FERRUM_INLINE int64_t end(int64_t block) const {
    int64_t most = begin(block) + kMost, group_end = (group_of(block) + 1) * group;
    most = most < group_end ? most : group_end;
    return most < k ? most : k;
  }
};

// A row of activations, ready to multiply: int8 codes with a scale per block, or float32 as it is.
struct Row {
  const int8_t* codes;   // [word_rows * codes_per_word], in the order of `quantize`; null in exact numerics
  const float* values;   // [word_rows * codes_per_word], zero past k; null in int8 numerics
  const float* scales;   // [blocks], int8 only
  const int32_t* sums;   // [blocks], sum of codes, int8 only
  const float* totals;   // [blocks], sum of values, exact only
};

}  // namespace ferrum
