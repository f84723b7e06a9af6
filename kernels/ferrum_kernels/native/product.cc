#include "product.h"

#include <algorithm>
#include <utility>

namespace ferrum {
namespace {

// Fewer units than this per thread leave threads waiting for the slowest.
constexpr int64_t kUnitsPerThread = 8;

}  // namespace

Products::Products(const Isa& isa, int64_t k, int64_t n, int64_t group_or_zero, int threads,
                   std::vector<Product> products)
    : isa_(isa), k_(k), n_(n), parts_(1), products_(std::move(products)) {
  chunks_ = group_or_zero ? Blocks(k, group_or_zero).chunks : (k + Blocks::kChunk - 1) / Blocks::kChunk;
  int64_t most_rows = 0, tall_units = 0;
  int64_t column_tiles = (n + kTileColumns - 1) / kTileColumns;
  for (const Product& p : products_) {
    most_rows = std::max(most_rows, p.count);
    tall_units += column_tiles;
  }
  bool few = tall_units < kUnitsPerThread * threads;
  if (threads > 1 && few && most_rows > 0 && most_rows < isa.wide_rows) parts_ = chunks_;
  for (size_t i = 0; i < products_.size(); i++) {
    int64_t rows = products_[i].count;
    // Few rows: whole word rows, as memory lies. Many rows: narrow tiles, whose sums stay in the first-level cache.
    bool tall = rows < isa.wide_rows;
    int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
    int64_t row_step = tall ? rows : std::min(kTileRows, (rows / row_tiles + 4) / 4 * 4);
    int64_t widest = kTileSize / ((row_step + 3) / 4 * 4) / 32 * 32;
    int64_t column_step = std::min(tall ? kTileColumns : int64_t{128}, widest);
    for (int64_t row = 0; row < rows; row += row_step)
      for (int64_t column = 0; column < n; column += column_step)
        for (int64_t part = 0; part < parts_; part++)
          units_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(row),
                            static_cast<int32_t>(std::min(row_step, rows - row)), static_cast<int32_t>(part),
                            static_cast<int32_t>(parts_ == 1 ? chunks_ : part + 1), column,
                            std::min(column_step, n - column)});
  }
}

void Products::run(Session& session, float* y, int64_t part_stride) const {
  session.run(static_cast<int64_t>(units_.size()),
              [&](int64_t unit) { run_unit(units_[static_cast<size_t>(unit)], y, part_stride); });
}

void Products::run_unit(const Unit& u, float* y, int64_t part_stride) const {
  const Product& p = products_[static_cast<size_t>(u.product)];
  y += (parts_ == 1 ? 0 : u.chunk0) * part_stride + (p.row0 + u.row0) * n_ + u.column0;
  if (p.packed.words) {
    isa_.tile(p.packed, u.column0, u.columns, u.chunk0, u.chunk1, p.rows + u.row0, u.rows, y, n_);
    return;
  }
  const float* values[kTileRows];
  for (int64_t m = 0; m < u.rows; m++) values[m] = p.rows[u.row0 + m].values;
  isa_.dense_tile(p.plain, p.type, k_, n_, u.column0, u.columns, u.chunk0, u.chunk1, values, u.rows, y, n_);
}

}  // namespace ferrum
