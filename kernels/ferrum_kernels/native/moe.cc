// The mixture-of-experts layer: a router, and the gated MLP of the experts that it chose.
#include <algorithm>
#include <limits>
#include <vector>

#include "arena.h"
#include "call.h"
#include "pool.h"
#include "product.h"
#include "rows.h"

namespace ferrum {
namespace {

// Tokens treated together; weights are read again for the next ones.
constexpr int64_t kSlab = 1024;

// The best `top_k` of a row of probabilities, best first, ties to the smaller index.
void choose(const float* probabilities, int64_t experts, int64_t top_k, int32_t* chosen, float* weights) {
  for (int64_t i = 0; i < top_k; i++) chosen[i] = -1, weights[i] = -1.f;
  for (int64_t e = 0; e < experts; e++) {
    float p = probabilities[e];
    if (!(p > weights[top_k - 1])) continue;
    int64_t place = top_k - 1;
    for (; place > 0 && p > weights[place - 1]; place--) {
      weights[place] = weights[place - 1];
      chosen[place] = chosen[place - 1];
    }
    weights[place] = p, chosen[place] = static_cast<int32_t>(e);
  }
}

ffi::Error route(ffi::AnyBuffer x, ffi::AnyBuffer router, ffi::Buffer<ffi::S32> index,
                 ffi::ResultBuffer<ffi::F32> logits, ffi::ResultBuffer<ffi::S32> chosen,
                 ffi::ResultBuffer<ffi::F32> weights, int64_t top_k, bool norm) {
  return guarded([&](const Isa& isa) {
    Float type, weight;
    require(float_type(x.element_type(), &type) && float_type(router.element_type(), &weight),
            "activations and the router must be floats");
    int64_t tokens = logits->dimensions()[0], experts = logits->dimensions()[1];
    int64_t hidden = tokens ? static_cast<int64_t>(x.element_count()) / tokens : 1, layer = index.typed_data()[0];
    require(layer >= 0 && (layer + 1) * hidden * experts <= static_cast<int64_t>(router.element_count()),
            "the layer index lies outside the stack");
    Session session;
    Arena arena;
    Rows rows(arena, isa, tokens, hidden, Blocks::kChunk, 8, false);
    session.run(tokens, [&](int64_t t) { rows.fill(t, at(x.untyped_data(), type, t * hidden), type, nullptr); });
    std::vector<Product> one{{Packed{}, at(router.untyped_data(), weight, layer * hidden * experts), weight,
                              rows.row(0), tokens, 0}};
    Products products(isa, hidden, experts, 0, session.threads(), one);
    int64_t size = tokens * experts;
    float* parts = arena.take<float>((products.parts() + 1) * size);
    float* probabilities = parts + products.parts() * size;
    products.run(session, parts, size);
    session.run(tokens, [&](int64_t t) {
      float* sum = parts + t * experts;
      for (int64_t p = 1; p < products.parts(); p++) isa.axpy(1.f, sum + p * size, experts, sum);
      float* row = probabilities + t * experts;
      std::copy(sum, sum + experts, logits->typed_data() + t * experts);
      std::copy(sum, sum + experts, row);
      int32_t* ids = chosen->typed_data() + t * top_k;
      float* w = weights->typed_data() + t * top_k;
      if (!isa.softmax(row, experts)) {  // NaN or infinite logits: weights that cannot pass unnoticed
        for (int64_t i = 0; i < top_k; i++) {
          ids[i] = static_cast<int32_t>(i);
          w[i] = std::numeric_limits<float>::quiet_NaN();
        }
        return;
      }
      choose(row, experts, top_k, ids, w);
      float total = 0.f;
      for (int64_t i = 0; i < top_k; i++) total += w[i];
      if (norm)
        for (int64_t i = 0; i < top_k; i++) w[i] /= total;
    });
  });
}

// Pairs (token, choice) of one slab in order of expert.
struct Sorted {
  std::vector<int32_t> pair;    // [live pairs] index t * top_k + i
  std::vector<int64_t> begin;   // [experts + 1] where each expert's pairs begin
  std::vector<int32_t> place;   // [pairs] where each pair went, -1 for a pair that no expert takes

  Sorted(const int32_t* chosen, int64_t pairs, int64_t experts) : begin(static_cast<size_t>(experts) + 1, 0) {
    auto live = [&](int64_t p) { return chosen[p] >= 0 && chosen[p] < experts; };
    for (int64_t p = 0; p < pairs; p++)
      if (live(p)) begin[static_cast<size_t>(chosen[p]) + 1]++;
    for (size_t e = 1; e < begin.size(); e++) begin[e] += begin[e - 1];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    pair.resize(static_cast<size_t>(begin.back()));
    place.assign(static_cast<size_t>(pairs), -1);
    for (int64_t p = 0; p < pairs; p++) {
      if (!live(p)) continue;
      int64_t to = next[static_cast<size_t>(chosen[p])]++;
      pair[static_cast<size_t>(to)] = static_cast<int32_t>(p);
      place[static_cast<size_t>(p)] = static_cast<int32_t>(to);
    }
  }
};

std::vector<Product> by_expert(const Sorted& sorted, const Stack& stack, int64_t first, const Rows& rows) {
  std::vector<Product> products;
  for (size_t e = 0; e + 1 < sorted.begin.size(); e++) {
    int64_t begin = sorted.begin[e], count = sorted.begin[e + 1] - begin;
    if (count)
      products.push_back({stack.matrix(first + static_cast<int64_t>(e)), nullptr, Float::f32, rows.row(begin), count,
                          begin});
  }
  return products;
}

void run_experts(const Isa& isa, const void* x, Float type, const int32_t* chosen, const float* weights,
                 const Stack& gate_up, const Stack& down, int64_t first, int64_t experts, int64_t tokens,
                 int64_t top_k, bool int8, Float out, void* y) {
  int64_t hidden = gate_up.k, intermediate = down.k, pairs = tokens * top_k;
  Sorted sorted(chosen, pairs, experts);
  int64_t live = static_cast<int64_t>(sorted.pair.size());
  auto expert_of = [&](int64_t place) { return first + chosen[sorted.pair[static_cast<size_t>(place)]]; };
  Session session;
  Arena arena;

  // A token's row is made ready once and shared by its experts, unless each of them permutes it.
  bool permuted = gate_up.order(0) != nullptr;
  Rows inputs(arena, isa, permuted ? live : tokens, hidden, gate_up.group, gate_up.bits, int8);
  Row* by_place = arena.take<Row>(live);
  session.run(permuted ? live : tokens, [&](int64_t i) {
    int64_t token = permuted ? sorted.pair[static_cast<size_t>(i)] / top_k : i;
    inputs.fill(i, at(x, type, token * hidden), type, permuted ? gate_up.order(expert_of(i)) : nullptr);
  });
  for (int64_t i = 0; i < live; i++)
    by_place[i] = *inputs.row(permuted ? i : sorted.pair[static_cast<size_t>(i)] / top_k);

  std::vector<Product> up_products = by_expert(sorted, gate_up, first, inputs);
  for (Product& p : up_products) p.rows = by_place + p.row0;
  Products up(isa, hidden, gate_up.n, gate_up.group, session.threads(), up_products);
  int64_t up_stride = live * gate_up.n;
  float* h = arena.take<float>(up.parts() * up_stride);
  up.run(session, h, up_stride);

  Rows middle(arena, isa, live, intermediate, down.group, down.bits, int8);
  session.run(live, [&](int64_t i) {
    float* row = h + i * gate_up.n;
    for (int64_t p = 1; p < up.parts(); p++) isa.axpy(1.f, row + p * up_stride, gate_up.n, row);
    isa.silu_mul(row, row + intermediate, intermediate, row);
    middle.fill(i, row, Float::f32, down.order(expert_of(i)));
  });

  Products last(isa, intermediate, hidden, down.group, session.threads(), by_expert(sorted, down, first, middle));
  int64_t stride = live * hidden;
  float* o = arena.take<float>(last.parts() * stride);
  last.run(session, o, stride);

  float* sums = out == Float::f32 ? static_cast<float*>(y) : arena.take<float>(tokens * hidden);
  int64_t tile = tokens > 1 ? hidden : std::min<int64_t>(hidden, 1024), tiles = (hidden + tile - 1) / tile;
  session.run(tokens * tiles, [&](int64_t unit) {
    int64_t token = unit / tiles, column = unit % tiles * tile, width = std::min(tile, hidden - column);
    float* sum = sums + token * hidden + column;
    std::fill(sum, sum + width, 0.f);
    for (int64_t i = token * top_k; i < (token + 1) * top_k; i++) {
      int32_t place = sorted.place[static_cast<size_t>(i)];
      if (place < 0) continue;
      float* row = o + place * hidden + column;
      for (int64_t p = 1; p < last.parts(); p++) isa.axpy(1.f, row + p * stride, width, row);
      isa.axpy(weights[i], row, width, sum);
    }
    if (out != Float::f32) isa.from_float(sum, width, out, at(y, out, token * hidden + column));
  });
}

ffi::Error experts(ffi::AnyBuffer x, ffi::Buffer<ffi::S32> chosen, ffi::Buffer<ffi::F32> weights,
                   ffi::Buffer<ffi::U32> up_words, ffi::Buffer<ffi::F16> up_scales, ffi::Buffer<ffi::U32> up_zeros,
                   ffi::Buffer<ffi::S32> up_perm, ffi::Buffer<ffi::U32> down_words, ffi::Buffer<ffi::F16> down_scales,
                   ffi::Buffer<ffi::U32> down_zeros, ffi::Buffer<ffi::S32> down_perm, ffi::Buffer<ffi::S32> index,
                   ffi::Result<ffi::AnyBuffer> y, int64_t experts, int64_t intermediate, int64_t up_group,
                   int64_t up_bits, int64_t down_group, int64_t down_bits, bool int8) {
  return guarded([&](const Isa& isa) {
    Float type, out;
    require(float_type(x.element_type(), &type) && float_type(y->element_type(), &out), "activations must be floats");
    int64_t tokens = chosen.dimensions()[0], top_k = chosen.dimensions()[1], hidden = y->dimensions()[1];
    Stack gate_up{up_words, up_scales, up_zeros, up_perm, hidden, 2 * intermediate, up_group, static_cast<int>(up_bits)};
    Stack down{down_words, down_scales, down_zeros, down_perm, intermediate, hidden, down_group,
               static_cast<int>(down_bits)};
    int64_t layer = index.typed_data()[0];
    require(layer >= 0 && (layer + 1) * experts <= gate_up.matrices(), "the layer index lies outside the stack");
    for (int64_t begin = 0; begin < tokens; begin += kSlab)
      run_experts(isa, at(x.untyped_data(), type, begin * hidden), type, chosen.typed_data() + begin * top_k,
                  weights.typed_data() + begin * top_k, gate_up, down, layer * experts, experts,
                  std::min(kSlab, tokens - begin), top_k, int8, out, at(y->untyped_data(), out, begin * hidden));
  });
}

}  // namespace

FERRUM_HANDLER(ferrum_route, route,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("top_k")
                                  .Attr<bool>("norm"));

FERRUM_HANDLER(ferrum_experts, experts,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("experts")
                                  .Attr<int64_t>("intermediate")
                                  .Attr<int64_t>("up_group")
                                  .Attr<int64_t>("up_bits")
                                  .Attr<int64_t>("down_group")
                                  .Attr<int64_t>("down_bits")
                                  .Attr<bool>("int8"));

}  // namespace ferrum
