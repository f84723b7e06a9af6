// Activations made ready to multiply.
#pragma once

#include <cstdint>

#include "arena.h"
#include "isa.h"
#include "pool.h"

namespace ferrum {

// Rows of one matrix's inputs, to be filled one at a time and by any thread.
class Rows {
 public:
  // Room for `count` rows of k inputs; group and bits are the weight's.
  Rows(Arena& arena, const Isa& isa, int64_t count, int64_t k, int64_t group, int bits, bool int8);

  const Row* row(int64_t i) const { return rows_ + i; }

  // Row i from k values; perm [k], or null, says which value each packed row multiplies.
  void fill(int64_t i, const void* x, Float type, const int32_t* perm);

 private:
  const Isa& isa_;
  Blocks blocks_;
  int64_t k_, wide_;
  int bits_;
  Row* rows_;
  float* values_;  // [count, wide]
};

}  // namespace ferrum
