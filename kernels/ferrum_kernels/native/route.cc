// The router of a mixture-of-experts layer: logits, their softmax and the best experts of each token.
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

}  // namespace ferrum
