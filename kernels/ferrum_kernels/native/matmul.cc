// rows @ W: one packed matrix, one plain matrix, or a packed matrix for each block of rows.
#include <algorithm>
#include <cstring>
#include <vector>

#include "arena.h"
#include "call.h"
#include "pool.h"
#include "product.h"
#include "rows.h"

namespace ferrum {
namespace {

// Rows are treated this many at a time: scratch stays small, and weights are read again only beyond it.
constexpr int64_t kSlab = 1024;

// Adds up the parts of each row and writes it as `type`.
void finish(Session& session, const Isa& isa, float* y, int64_t parts, int64_t stride, int64_t rows, int64_t n,
            Float type, void* out) {
  if (parts == 1 && out == y) return;
  int64_t step = std::max<int64_t>(1, 16384 / std::max<int64_t>(n, 1));
  constexpr int64_t kColumns = 8192;
  int64_t tiles = (n + kColumns - 1) / kColumns, groups = (rows + step - 1) / step;
  session.run(tiles * groups, [&](int64_t unit) {
    int64_t column = unit % tiles * kColumns, width = std::min(kColumns, n - column);
    for (int64_t m = unit / tiles * step; m < std::min(rows, (unit / tiles + 1) * step); m++) {
      float* row = y + m * n + column;
      for (int64_t p = 1; p < parts; p++) isa.axpy(1.f, row + p * stride, width, row);
      isa.from_float(row, width, type, at(out, type, m * n + column));
    }
  });
}

ffi::Error gptq_matmul(ffi::AnyBuffer x, ffi::Buffer<ffi::U32> words, ffi::Buffer<ffi::F16> scales,
                       ffi::Buffer<ffi::U32> zeros, ffi::Buffer<ffi::S32> perm, ffi::Buffer<ffi::S32> index,
                       ffi::Result<ffi::AnyBuffer> y, int64_t k, int64_t n, int64_t group, int64_t bits, bool int8) {
  return guarded([&](const Isa& isa) {
    Stack stack{words, scales, zeros, perm, k, n, group, static_cast<int>(bits)};
    Float type, out;
    require(float_type(x.element_type(), &type) && float_type(y->element_type(), &out), "activations must be floats");
    int64_t rows = static_cast<int64_t>(x.element_count()) / k, matrix = index.typed_data()[0];
    require(matrix >= 0 && matrix < stack.matrices(), "the layer index lies outside the stack");
    Session session;
    for (int64_t begin = 0; begin < rows; begin += kSlab) {
      int64_t count = std::min(kSlab, rows - begin);
      Arena arena;
      Rows ready(arena, isa, count, k, group, stack.bits, int8);
      session.run(count, [&](int64_t i) {
        ready.fill(i, at(x.untyped_data(), type, (begin + i) * k), type, stack.order(matrix));
      });
      void* target = at(y->untyped_data(), out, begin * n);
      std::vector<Product> one{{stack.matrix(matrix), nullptr, Float::f32, ready.row(0), count, 0}};
      Products products(isa, k, n, group, session.threads(), one);
      bool direct = out == Float::f32 && products.parts() == 1;
      float* sums = direct ? static_cast<float*>(target) : arena.take<float>(products.parts() * count * n);
      products.run(session, sums, count * n);
      finish(session, isa, sums, products.parts(), count * n, count, n, out, target);
    }
  });
}

ffi::Error dense_matmul(ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> index, ffi::Result<ffi::AnyBuffer> y,
                        int64_t k, int64_t n) {
  return guarded([&](const Isa& isa) {
    Float type, weight, out;
    require(float_type(x.element_type(), &type) && float_type(w.element_type(), &weight) &&
                float_type(y->element_type(), &out),
            "activations and weights must be floats");
    int64_t rows = static_cast<int64_t>(x.element_count()) / k, matrix = index.typed_data()[0];
    require(matrix >= 0 && (matrix + 1) * k * n <= static_cast<int64_t>(w.element_count()),
            "the layer index lies outside the stack");
    Session session;
    for (int64_t begin = 0; begin < rows; begin += kSlab) {
      int64_t count = std::min(kSlab, rows - begin);
      Arena arena;
      Rows ready(arena, isa, count, k, Blocks::kChunk, 8, false);
      session.run(count, [&](int64_t i) {
        ready.fill(i, at(x.untyped_data(), type, (begin + i) * k), type, nullptr);
      });
      void* target = at(y->untyped_data(), out, begin * n);
      std::vector<Product> one{{Packed{}, at(w.untyped_data(), weight, matrix * k * n), weight, ready.row(0), count,
                                0}};
      Products products(isa, k, n, 0, session.threads(), one);
      bool direct = out == Float::f32 && products.parts() == 1;
      float* sums = direct ? static_cast<float*>(target) : arena.take<float>(products.parts() * count * n);
      products.run(session, sums, count * n);
      finish(session, isa, sums, products.parts(), count * n, count, n, out, target);
    }
  });
}

// Blocks of rows, each with its expert; blocks of other experts keep what `y` holds.
ffi::Error grouped_matmul(ffi::AnyBuffer x, ffi::Buffer<ffi::S32> block_expert, ffi::Buffer<ffi::U32> words,
                          ffi::Buffer<ffi::F16> scales, ffi::Buffer<ffi::U32> zeros, ffi::Buffer<ffi::S32> perm,
                          ffi::Buffer<ffi::S32> index, ffi::AnyBuffer before, ffi::Result<ffi::AnyBuffer> y,
                          int64_t experts, int64_t block, int64_t k, int64_t n, int64_t group, int64_t bits,
                          bool int8) {
  return guarded([&](const Isa& isa) {
    Stack stack{words, scales, zeros, perm, k, n, group, static_cast<int>(bits)};
    Float type, out;
    require(float_type(x.element_type(), &type) && float_type(y->element_type(), &out), "activations must be floats");
    int64_t layer = index.typed_data()[0], blocks = static_cast<int64_t>(block_expert.element_count());
    require(layer >= 0 && (layer + 1) * experts <= stack.matrices(), "the layer index lies outside the stack");
    if (before.untyped_data() != y->untyped_data())
      std::memcpy(y->untyped_data(), before.untyped_data(), y->size_bytes());
    const int32_t* expert = block_expert.typed_data();
    Session session;
    for (int64_t begin = 0, end; begin < blocks; begin = end) {
      // Whole experts, as many as a slab holds, or one.
      for (end = begin; end < blocks && (end - begin) * block < kSlab; end++) {}
      while (end < blocks && expert[end] == expert[end - 1]) end++;
      int64_t count = (end - begin) * block;
      auto mine = [&](int64_t b) { return expert[b] >= 0 && expert[b] < experts; };
      Arena arena;
      Rows ready(arena, isa, count, k, group, stack.bits, int8);
      session.run(count, [&](int64_t i) {
        int64_t b = begin + i / block;
        if (mine(b))
          ready.fill(i, at(x.untyped_data(), type, (begin * block + i) * k), type,
                     stack.order(layer * experts + expert[b]));
      });
      std::vector<Product> products;
      for (int64_t b = begin, next; b < end; b = next) {
        for (next = b + 1; next < end && expert[next] == expert[b]; next++) {}
        if (mine(b))
          products.push_back({stack.matrix(layer * experts + expert[b]), nullptr, Float::f32,
                              ready.row((b - begin) * block), (next - b) * block, (b - begin) * block});
      }
      Products all(isa, k, n, group, session.threads(), products);
      float* sums = arena.take<float>(all.parts() * count * n);
      all.run(session, sums, count * n);
      for (int64_t b = begin, next; b < end; b = next) {
        for (next = b + 1; next < end && expert[next] == expert[b]; next++) {}
        if (mine(b))
          finish(session, isa, sums + (b - begin) * block * n, all.parts(), count * n, (next - b) * block, n, out,
                 at(y->untyped_data(), out, b * block * n));
      }
    }
  });
}

}  // namespace

FERRUM_HANDLER(ferrum_gptq_matmul, gptq_matmul,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("k")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("bits")
                                  .Attr<bool>("int8"));

FERRUM_HANDLER(ferrum_dense_matmul, dense_matmul,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("k")
                                  .Attr<int64_t>("n"));

FERRUM_HANDLER(ferrum_grouped_matmul, grouped_matmul,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("experts")
                                  .Attr<int64_t>("block")
                                  .Attr<int64_t>("k")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("bits")
                                  .Attr<bool>("int8"));

}  // namespace ferrum
