// Matrix products cut into units that threads share.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace ferrum {

// rows @ W for one packed or plain matrix.
struct Product {
  Packed packed;        // packed.words null: a plain matrix
  const void* plain;    // [k, n] of `type`
  Float type;
  const Row* rows;      // plain matrices read rows[i].values
  int64_t count;        // rows
  int64_t row0;         // where its rows begin in the result
};

// y[row0 + m, :] = rows[m] @ W for a packed product, on the calling thread alone; y has rows of W's n.
void multiply(const Isa& isa, const Product& product, float* y);

// Products that share shapes, run together.
class Products {
 public:
  // parts: as many as there are chunks of K when that helps to keep all threads busy, else 1.
  Products(const Isa& isa, int64_t k, int64_t n, int64_t group_or_zero, int threads, std::vector<Product> products);

  int64_t parts() const { return parts_; }

  // Writes float32 y [rows, n], and further parts part_stride floats apart: a row is the sum of its parts, in order.
  void run(Session& session, float* y, int64_t part_stride) const;

 private:
  struct Unit {
    int32_t product, row0, rows, chunk0, chunk1;
    int64_t column0, columns;
  };
  void run_unit(const Unit& unit, float* y, int64_t part_stride) const;

  const Isa& isa_;
  int64_t k_, n_, chunks_, parts_;
  std::vector<Product> products_;
  std::vector<Unit> units_;
};

}  // namespace ferrum
