#include "product.h"

#include <algorithm>
#include <utility>

namespace ferrum {
namespace {

// Fewer units than this per thread leave threads waiting for the slowest.
constexpr int64_t kUnitsPerThread = 8;

// How many rows and columns of a product are treated at once. Few rows: whole word rows, as memory lies. Many rows:
// narrow tiles, whose sums stay in the first-level cache.
struct Step {
  int64_t rows, columns;

  Step(const Isa& isa, int64_t count, bool plain) {
    bool tall = count < isa.wide_rows;
    int64_t row_tiles = (count + kTileRows - 1) / kTileRows;
    rows = tall ? count : std::min(kTileRows, (count / row_tiles + 4) / 4 * 4);
    int64_t widest = kTileSize / (rows == 1 ? 1 : (rows + 3) / 4 * 4) / 32 * 32;
    int64_t most = plain ? kTileSize : kTileColumns;  // the scales of a packed matrix take room, too
    columns = std::min(tall ? most : isa.wide_columns, widest);
  }
};

}  // namespace

void multiply(const Isa& isa, const Product& p, float* y) {
  const int64_t n = p.packed.n, chunks = Blocks(p.packed.k, p.packed.group).chunks;
  const Step step(isa, p.count, false);
  // Columns first: the weights of a tile are still in the cache for the next rows.
  for (int64_t column = 0; column < n; column += step.columns)
    for (int64_t row = 0; row < p.count; row += step.rows)
      isa.tile(p.packed, column, std::min(step.columns, n - column), 0, chunks, p.rows + row,
               std::min(step.rows, p.count - row), y + (p.row0 + row) * n + column, n);
}

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
    const Step step(isa, rows, !products_[i].packed.words);
    for (int64_t row = 0; row < rows; row += step.rows)
      for (int64_t column = 0; column < n; column += step.columns)
        for (int64_t part = 0; part < parts_; part++)
          units_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(row),
                            static_cast<int32_t>(std::min(step.rows, rows - row)), static_cast<int32_t>(part),
                            static_cast<int32_t>(parts_ == 1 ? chunks_ : part + 1), column,
                            std::min(step.columns, n - column)});
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
