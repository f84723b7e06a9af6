// Grouped-query attention over the cache: head norms, rotary embedding, cache write, streaming softmax.
#include <algorithm>
#include <cmath>

#include "arena.h"
#include "call.h"
#include "pool.h"

namespace ferrum {
namespace {

int64_t round32(int64_t n) { return (n + 31) / 32 * 32; }

struct Heads {
  const Isa& isa;
  int64_t head;
  float eps;

  // One head of one token: normalised when there is a weight, then its halves rotated by the token's angles.
  void prepare(const void* x, Float type, const float* norm, const float* cosine, const float* sine, float scale,
               float* y) const {
    float wide[kHeadMost];
    isa.to_float(x, type, head, wide);
    if (norm) isa.rms_norm(wide, norm, head, eps, wide);
    isa.rotate(wide, head / 2, cosine, sine, scale, y);
  }
};

ffi::Error attention(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::F32> q_norm,
                     ffi::Buffer<ffi::F32> k_norm, ffi::Buffer<ffi::F32> cosine, ffi::Buffer<ffi::F32> sine,
                     ffi::AnyBuffer keys_in, ffi::AnyBuffer values_in, ffi::Buffer<ffi::S32> layer_index,
                     ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::S32> count, ffi::Buffer<ffi::S32> window,
                     ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> keys_out,
                     ffi::Result<ffi::AnyBuffer> values_out, float eps) {
  return guarded([&](const Isa& isa) {
    Float type, cached;
    require(float_type(q.element_type(), &type) && k.element_type() == q.element_type() &&
                v.element_type() == q.element_type() && out->element_type() == q.element_type(),
            "queries, keys, values and the result must be of one float type");
    require(float_type(keys_in.element_type(), &cached) && values_in.element_type() == keys_in.element_type(),
            "cached keys and values must be of one float type");
    require(keys_in.untyped_data() == keys_out->untyped_data() &&
                values_in.untyped_data() == values_out->untyped_data(),
            "the cache must be written in place");
    auto size = keys_in.dimensions();  // [L, B, S, Kv, h]
    int64_t batch = size[1], slots = size[2], kv_heads = size[3], head = size[4];
    int64_t tokens = cosine.dimensions()[1], layer = layer_index.typed_data()[0];
    int64_t heads = static_cast<int64_t>(q.element_count()) / std::max<int64_t>(1, batch * tokens * head);
    int64_t share = heads / kv_heads, reach = window.typed_data()[0];
    require(layer >= 0 && layer < size[0], "the layer index lies outside the cache");
    require(head % 2 == 0 && head <= kHeadMost, "the head size must be even and at most 256");
    require(share >= 1 && share <= kQueryRows, "at most 128 query heads may share a key head");
    int64_t row = kv_heads * head;
    void* keys = at(keys_out->untyped_data(), cached, layer * batch * slots * row);
    void* values = at(values_out->untyped_data(), cached, layer * batch * slots * row);
    const float* norm_q = q_norm.element_count() ? q_norm.typed_data() : nullptr;
    const float* norm_k = k_norm.element_count() ? k_norm.typed_data() : nullptr;
    Heads prepare{isa, head, eps};
    auto first = [&](int64_t b) { return static_cast<int64_t>(start.typed_data()[b]); };
    auto real = [&](int64_t b) { return std::min<int64_t>(tokens, std::max(0, count.typed_data()[b])); };

    Session session;
    Arena arena;
    // Tiles of queries that share keys, each [head, ldq] with column t * share + h: tokens t, heads h.
    int64_t per_tile = std::min(tokens, kQueryRows / share), tiles = (tokens + per_tile - 1) / per_tile;
    int64_t ldq = round32(per_tile * share), tile_size = head * ldq;
    float* queries = arena.take<float>(batch * kv_heads * tiles * tile_size);
    std::fill(queries, queries + batch * kv_heads * tiles * tile_size, 0.f);
    session.run(batch * tokens, [&](int64_t unit) {
      int64_t b = unit / tokens, t = unit % tokens, position = first(b) + t;
      if (t >= real(b)) return;
      const float* c = cosine.typed_data() + unit * head / 2;
      const float* s = sine.typed_data() + unit * head / 2;
      float scale = 1.f / std::sqrt(static_cast<float>(head));
      // Some heads at a time, so that they can be written side by side.
      constexpr int64_t kSome = 16;
      float lines[kSome][kHeadMost];
      for (int64_t h = 0, some; h < heads; h += some) {
        some = std::min(kSome, share - h % share);
        for (int64_t j = 0; j < some; j++)
          prepare.prepare(at(q.untyped_data(), type, (unit * heads + h + j) * head), type, norm_q, c, s, scale,
                          lines[j]);
        float* to = queries + ((b * kv_heads + h / share) * tiles + t / per_tile) * tile_size +
                    t % per_tile * share + h % share;
        for (int64_t i = 0; i < head; i++)
          for (int64_t j = 0; j < some; j++) to[i * ldq + j] = lines[j][i];
      }
      if (position < 0 || position >= slots) return;
      for (int64_t h = 0; h < kv_heads; h++) {
        float line[kHeadMost];
        int64_t place = (b * slots + position) * row + h * head, from = (unit * kv_heads + h) * head;
        prepare.prepare(at(k.untyped_data(), type, from), type, norm_k, c, s, 1.f, line);
        isa.from_float(line, head, cached, at(keys, cached, place));
        isa.to_float(at(v.untyped_data(), type, from), type, head, line);
        isa.from_float(line, head, cached, at(values, cached, place));
      }
    });

    int64_t wide = round32(head);
    session.run(batch * kv_heads * tiles, [&](int64_t unit) {
      // The last tiles see the most keys: they go first.
      int64_t tile = tiles - 1 - unit / (batch * kv_heads), pair = unit % (batch * kv_heads);
      int64_t b = pair / kv_heads, h = pair % kv_heads, t0 = tile * per_tile;
      int64_t here = std::min(per_tile, tokens - t0), rows = here * share;
      alignas(64) float best[kQueryRows], total[kQueryRows], low[kQueryRows] = {}, high[kQueryRows] = {};
      alignas(64) float sums[kQueryRows * kHeadMost];
      std::fill(best, best + kQueryRows, -1e30f);
      std::fill(total, total + kQueryRows, 0.f);
      std::fill(sums, sums + rows * wide, 0.f);
      int64_t end = std::min({first(b) + t0 + here, first(b) + real(b), slots});
      int64_t begin = std::max<int64_t>(0, first(b) + t0 - reach + 1) / kKeyBlock * kKeyBlock;
      const float* mine = queries + (pair * tiles + tile) * tile_size;
      for (int64_t s = begin; s < end && t0 < real(b); s += kKeyBlock) {
        int64_t n = std::min(kKeyBlock, end - s);
        for (int64_t r = 0; r < rows; r++) {
          int64_t position = first(b) + t0 + r / share;
          low[r] = static_cast<float>(std::clamp<int64_t>(position - reach + 1 - s, 0, n));
          high[r] = static_cast<float>(std::clamp<int64_t>(position + 1 - s, 0, n));
        }
        int64_t place = (b * slots + s) * row + h * head;
        isa.attend(mine, ldq, rows, head, at(keys, cached, place), at(values, cached, place), cached,
                   row * size_of(cached), n, low, high, best, total, sums);
      }
      for (int64_t r = 0; r < rows; r++) {
        int64_t t = t0 + r / share;
        float* line = sums + r * wide;
        // Padding sees nothing and gets zero.
        const bool sees = t < real(b);
        const float sum = sees ? total[r] : 1.f;
        for (int64_t i = 0; i < head; i++) line[i] = sees ? line[i] / sum : 0.f;
        isa.from_float(line, head, type,
                       at(out->untyped_data(), type, ((b * tokens + t) * heads + h * share + r % share) * head));
      }
    });
  });
}

}  // namespace

FERRUM_HANDLER(ferrum_attention, attention,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"));

}  // namespace ferrum
