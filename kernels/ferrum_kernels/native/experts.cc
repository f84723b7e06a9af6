// The gated MLP of the experts that each token chose.
#include <algorithm>
#include <numeric>
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

// Rows of one expert that one thread takes from first product to last, and how many such shares per thread must be
// there for all threads to end at about the same time.
constexpr int64_t kShare = 64;
constexpr int64_t kSharesPerThread = 4;

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

// One slab of tokens on its way through the experts.
class Slab {
 public:
  Slab(const Isa& isa, const Stack& gate_up, const Stack& down, int64_t first, int64_t experts, const int32_t* chosen,
       int64_t tokens, int64_t top_k, bool int8)
      : isa_(isa), gate_up_(gate_up), down_(down), first_(first), chosen_(chosen), tokens_(tokens), top_k_(top_k),
        int8_(int8), sorted_(chosen, tokens * top_k, experts),
        live_(static_cast<int64_t>(sorted_.pair.size())) {}

  // y [tokens, hidden] of type `out` = the weighted sums of each token's experts.
  void run(const void* x, Float type, const float* weights, Float out, void* y) {
    read(x, type);
    std::vector<Part> shares;
    for (const Part& p : parts_)
      for (int64_t row = 0; row < p.rows; row += kShare)
        shares.push_back({p.expert, p.begin + row, std::min(kShare, p.rows - row)});
    if (static_cast<int64_t>(shares.size()) >= kSharesPerThread * session_.threads()) {
      apart(std::move(shares));
    } else {
      together();
    }
    combine(weights, out, y);
  }

 private:
  // Rows [begin, begin + rows) of the sorted pairs, all of one expert.
  struct Part {
    int64_t expert, begin, rows;
  };

  // Makes activations ready to multiply. A token's row is shared by its experts, unless each of them permutes it.
  void read(const void* x, Float type) {
    int64_t hidden = gate_up_.k;
    bool permuted = gate_up_.order(0) != nullptr;
    Rows ready(arena_, isa_, permuted ? live_ : tokens_, hidden, gate_up_.group, gate_up_.bits, int8_);
    inputs_ = arena_.take<Row>(live_);
    auto token = [&](int64_t place) { return sorted_.pair[static_cast<size_t>(place)] / top_k_; };
    session_.run(permuted ? live_ : tokens_, [&](int64_t i) {
      ready.fill(i, at(x, type, (permuted ? token(i) : i) * hidden), type,
                 permuted ? gate_up_.order(expert_of(i)) : nullptr);
    });
    for (int64_t i = 0; i < live_; i++) inputs_[i] = *ready.row(permuted ? i : token(i));
    for (size_t e = 0; e + 1 < sorted_.begin.size(); e++)
      if (int64_t rows = sorted_.begin[e + 1] - sorted_.begin[e])
        parts_.push_back({first_ + static_cast<int64_t>(e), sorted_.begin[e], rows});
  }

  // Few experts: all threads share each product.
  void together() {
    std::vector<Product> ups;
    for (const Part& p : parts_) ups.push_back(up_product(p));
    Products up(isa_, gate_up_.k, gate_up_.n, gate_up_.group, session_.threads(), ups);
    int64_t stride = live_ * gate_up_.n;
    float* h = arena_.take<float>(up.parts() * stride);
    up.run(session_, h, stride);

    Rows middle(arena_, isa_, live_, down_.k, down_.group, down_.bits, int8_);
    session_.run(live_, [&](int64_t i) {
      float* row = h + i * gate_up_.n;
      for (int64_t p = 1; p < up.parts(); p++) isa_.axpy(1.f, row + p * stride, gate_up_.n, row);
      activate(row, middle, i, expert_of(i));
    });

    std::vector<Product> downs;
    for (const Part& p : parts_) downs.push_back(down_product(p, middle.row(p.begin), p.begin));
    Products last(isa_, down_.k, down_.n, down_.group, session_.threads(), downs);
    out_parts_ = last.parts();
    out_ = arena_.take<float>(out_parts_ * live_ * down_.n);
    last.run(session_, out_, live_ * down_.n);
  }

  // Many experts: a thread takes one from first product to last, so that what lies between stays in its cache.
  void apart(std::vector<Part> shares) {
    std::sort(shares.begin(), shares.end(), [](const Part& a, const Part& b) { return a.rows > b.rows; });
    out_parts_ = 1;
    out_ = arena_.take<float>(live_ * down_.n);
    session_.run(static_cast<int64_t>(shares.size()), [&](int64_t unit) {
      const Part& p = shares[static_cast<size_t>(unit)];
      Arena arena(p.rows * (gate_up_.n + 2 * down_.k) * 4);
      float* h = arena.take<float>(p.rows * gate_up_.n);
      Product up = up_product(p);
      up.row0 = 0;
      multiply(isa_, up, h);
      Rows middle(arena, isa_, p.rows, down_.k, down_.group, down_.bits, int8_);
      for (int64_t i = 0; i < p.rows; i++) activate(h + i * gate_up_.n, middle, i, p.expert);
      multiply(isa_, down_product(p, middle.row(0), p.begin), out_);
    });
  }

  // Adds up each token's rows, in the order of its choices.
  void combine(const float* weights, Float out, void* y) {
    int64_t hidden = down_.n, stride = live_ * hidden;
    float* sums = out == Float::f32 ? static_cast<float*>(y) : arena_.take<float>(tokens_ * hidden);
    int64_t tile = tokens_ > 1 ? hidden : std::min<int64_t>(hidden, 1024), tiles = (hidden + tile - 1) / tile;
    session_.run(tokens_ * tiles, [&](int64_t unit) {
      int64_t token = unit / tiles, column = unit % tiles * tile, width = std::min(tile, hidden - column);
      float* sum = sums + token * hidden + column;
      std::fill(sum, sum + width, 0.f);
      for (int64_t i = token * top_k_; i < (token + 1) * top_k_; i++) {
        int32_t place = sorted_.place[static_cast<size_t>(i)];
        if (place < 0) continue;
        float* row = out_ + place * hidden + column;
        for (int64_t p = 1; p < out_parts_; p++) isa_.axpy(1.f, row + p * stride, width, row);
        isa_.axpy(weights[i], row, width, sum);
      }
      if (out != Float::f32) isa_.from_float(sum, width, out, at(y, out, token * hidden + column));
    });
  }

  // silu(gate) * up of one row of h, made ready for the second product.
  void activate(float* row, Rows& middle, int64_t i, int64_t expert) const {
    isa_.silu_mul(row, row + down_.k, down_.k, row);
    middle.fill(i, row, Float::f32, down_.order(expert));
  }

  int64_t expert_of(int64_t place) const { return first_ + chosen_[sorted_.pair[static_cast<size_t>(place)]]; }
  Product up_product(const Part& p) const {
    return {gate_up_.matrix(p.expert), nullptr, Float::f32, inputs_ + p.begin, p.rows, p.begin};
  }
  Product down_product(const Part& p, const Row* rows, int64_t row0) const {
    return {down_.matrix(p.expert), nullptr, Float::f32, rows, p.rows, row0};
  }

  const Isa& isa_;
  const Stack &gate_up_, &down_;
  const int64_t first_;
  const int32_t* chosen_;
  const int64_t tokens_, top_k_;
  const bool int8_;
  Session session_;
  Arena arena_;
  const Sorted sorted_;
  const int64_t live_;
  std::vector<Part> parts_;
  Row* inputs_ = nullptr;   // [live]
  float* out_ = nullptr;    // [out_parts, live, hidden]
  int64_t out_parts_ = 1;
};

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
      Slab(isa, gate_up, down, layer * experts, experts, chosen.typed_data() + begin * top_k,
           std::min(kSlab, tokens - begin), top_k, int8)
          .run(at(x.untyped_data(), type, begin * hidden), type, weights.typed_data() + begin * top_k, out,
               at(y->untyped_data(), out, begin * hidden));
  });
}

}  // namespace

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
