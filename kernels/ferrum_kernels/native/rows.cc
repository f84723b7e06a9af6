#include "rows.h"

#include <cstring>

namespace ferrum {

Rows::Rows(Arena& arena, const Isa& isa, int64_t count, int64_t k, int64_t group, int bits, bool int8)
    : isa_(isa), blocks_(k, group), k_(k), wide_((k + 7) / 8 * 8), bits_(bits) {
  rows_ = arena.take<Row>(count);
  values_ = arena.take<float>(count * wide_);
  auto* codes = int8 ? arena.take<int8_t>(count * wide_) : nullptr;
  auto* scales = int8 ? arena.take<float>(count * blocks_.count) : nullptr;
  auto* sums = int8 ? arena.take<int32_t>(count * blocks_.count) : nullptr;
  auto* totals = int8 ? nullptr : arena.take<float>(count * blocks_.count);
  for (int64_t i = 0; i < count; i++) {
    int64_t block = i * blocks_.count;
    rows_[i] = int8 ? Row{codes + i * wide_, nullptr, scales + block, sums + block, nullptr}
                    : Row{nullptr, values_ + i * wide_, nullptr, nullptr, totals + block};
  }
}

void Rows::fill(int64_t i, const void* x, Float type, const int32_t* perm) {
  float* values = values_ + i * wide_;
  const Row& row = rows_[i];
  if (perm) {
    // Permuted values are read one at a time; 16-bit ones are widened where they will be overwritten last.
    const float* source = static_cast<const float*>(x);
    if (type != Float::f32) {
      for (int64_t j = 0; j < k_; j++)
        isa_.to_float(static_cast<const uint16_t*>(x) + perm[j], type, 1, values + j);
    } else {
      for (int64_t j = 0; j < k_; j++) values[j] = source[perm[j]];
    }
  } else {
    isa_.to_float(x, type, k_, values);
  }
  for (int64_t j = k_; j < wide_; j++) values[j] = 0.f;
  if (row.codes) {
    isa_.quantize(values, blocks_, bits_, const_cast<int8_t*>(row.codes), const_cast<float*>(row.scales),
                  const_cast<int32_t*>(row.sums));
    return;
  }
  for (int64_t b = 0; b < blocks_.count; b++) {
    float total = 0.f;
    for (int64_t j = blocks_.begin(b); j < blocks_.end(b); j++) total += values[j];
    const_cast<float*>(row.totals)[b] = total;
  }
}

}  // namespace ferrum
