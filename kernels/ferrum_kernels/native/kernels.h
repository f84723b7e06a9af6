// Every kernel, written once over a vector type that each isa_*.cc defines before it includes this file:
//
//   V            kWide floats                load store set zero fma add sub mul divide max min
//   I            kWide 32-bit integers       loadi storei seti addi and_ srl<n> sll<n> to_float to_int as_float
//   load_half    kWide float16 -> V          load_bf16, store_half, store_bf16
//   store_codes<even_first>  16 integers as bytes, in order or the even ones of each eight first
//   struct Int8  dot<bits, rows>: the int8 products of some word rows, see isa_portable.cc
//
// Everything lies in an unnamed namespace, and no function of the standard library with a body in a header is called:
// the linker would keep one copy of it for the whole library, perhaps one made for a machine other than this.

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

constexpr int64_t kPair = 2 * kWide;  // columns that the inner loops treat at once
static_assert(16 % kPair == 0 || kPair == 32, "scratch is padded to 32 columns");
constexpr int64_t kPad = 32;

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void copy_bytes(void* to, const void* from, int64_t n) { __builtin_memcpy(to, from, static_cast<size_t>(n)); }

// ---- elementary functions

// e^x after Cephes: x = n log 2 + r, a polynomial in r. Relative error below 2e-7 within +-87; zero below.
V exp_of(V x) {
  V kept = max(min(x, set(88.f)), set(-87.f));
  I n = to_int(mul(kept, set(1.44269504f)));
  V r = fma(to_float(n), set(-0.693359375f), kept);
  r = fma(to_float(n), set(2.12194440e-4f), r);
  V p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set(1.f)));
  V power = as_float(sll<23>(addi(n, seti(127))));
  // A NaN must stay one: min and max above may have dropped it.
  return add(mul(p, power), sub(x, x));
}

float exp_of(float x) {
  alignas(64) float lanes[kWide];
  store(lanes, exp_of(set(x)));
  return lanes[0];
}

float sum_of(V v) {
  alignas(64) float lanes[kWide];
  store(lanes, v);
  for (int64_t half = kWide / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

float max_of(V v) {
  alignas(64) float lanes[kWide];
  store(lanes, v);
  float best = lanes[0];
  for (int64_t i = 1; i < kWide; i++) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// ---- conversions

float one_from(const void* x, Float type, int64_t i) {
  if (type == Float::f32) return static_cast<const float*>(x)[i];
  alignas(64) uint16_t lanes[kWide] = {};
  lanes[0] = static_cast<const uint16_t*>(x)[i];
  alignas(64) float wide[kWide];
  store(wide, type == Float::bf16 ? load_bf16(lanes) : load_half(lanes));
  return wide[0];
}

template <Float type>
V load_as(const void* x, int64_t i) {
  if constexpr (type == Float::f32) return load(static_cast<const float*>(x) + i);
  if constexpr (type == Float::bf16) return load_bf16(static_cast<const uint16_t*>(x) + i);
  return load_half(static_cast<const uint16_t*>(x) + i);
}

template <Float type>
void to_float_as(const void* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) store(y + i, load_as<type>(x, i));
  for (; i < n; i++) y[i] = one_from(x, type, i);
}

void to_float(const void* x, Float type, int64_t n, float* y) {
  if (type == Float::f32) copy_bytes(y, x, n * 4);
  if (type == Float::bf16) to_float_as<Float::bf16>(x, n, y);
  if (type == Float::f16) to_float_as<Float::f16>(x, n, y);
}

void from_float(const float* x, int64_t n, Float type, void* y) {
  if (type == Float::f32) return copy_bytes(y, x, n * 4);
  uint16_t* out = static_cast<uint16_t*>(y);
  int64_t i = 0;
  for (; i < n; i += kWide) {
    int64_t here = least(kWide, n - i);
    alignas(64) float lanes[kWide] = {};
    alignas(64) uint16_t narrow[kWide];
    const float* from = x + i;
    if (here < kWide) {
      copy_bytes(lanes, from, here * 4);
      from = lanes;
    }
    uint16_t* to = here < kWide ? narrow : out + i;
    if (type == Float::bf16) store_bf16(to, load(from));
    if (type == Float::f16) store_half(to, load(from));
    if (here < kWide) copy_bytes(out + i, narrow, here * 2);
  }
}

// ---- activations

// Codes go where `dot` reads them: with 4-bit weights the even inputs of a word first, then the odd ones.
void quantize(const float* x, const Blocks& blocks, int bits, int8_t* codes, float* scales, int32_t* sums) {
  for (int64_t b = 0; b < blocks.count; b++) {
    int64_t begin = blocks.begin(b), n = blocks.end(b) - begin, wide = (n + 15) / 16 * 16;
    alignas(64) float copy[Blocks::kMost];
    const float* values = x + begin;
    if (n < wide) {
      copy_bytes(copy, values, n * 4);
      for (int64_t i = n; i < wide; i++) copy[i] = 0.f;
      values = copy;
    }
    V most = zero(), odd = zero();
    for (int64_t i = 0; i < wide; i += kWide) {
      V v = load(values + i);
      most = max(most, max(v, sub(zero(), v)));
      odd = add(odd, sub(v, v));  // NaN where v is NaN or infinite
    }
    float biggest = max_of(most), not_finite = sum_of(odd);
    float inverse = biggest > 1e-30f ? 127.f / biggest : 0.f;  // 127 / a subnormal would be infinite
    I sum = seti(0);
    for (int64_t i = 0; i < wide; i += 16) {
      alignas(64) int32_t whole[16];
      alignas(64) int8_t narrow[16];
      for (int64_t j = 0; j < 16; j += kWide) {
        I code = not_finite == 0.f ? to_int(mul(load(values + i + j), set(inverse))) : seti(0);
        storei(whole + j, code);
        sum = addi(sum, code);
      }
      // Codes fill whole words; what lies past the last one may be another row's.
      int64_t per_word = 32 / bits, left = (n + per_word - 1) / per_word * per_word - i;
      int8_t* to = left < 16 ? narrow : codes + begin + i;
      bits == 4 ? store_codes<true>(whole, to) : store_codes<false>(whole, to);
      if (left < 16) copy_bytes(codes + begin + i, narrow, left);
    }
    alignas(64) int32_t lanes[kWide];
    storei(lanes, sum);
    int32_t total = 0;
    for (int64_t i = 0; i < kWide; i++) total += lanes[i];
    sums[b] = total;
    scales[b] = biggest / 127.f + not_finite;
  }
}

V silu_mul(V gate, V up) {
  return mul(divide(gate, add(set(1.f), exp_of(sub(zero(), gate)))), up);
}

void silu_mul(const float* gate, const float* up, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) store(y + i, silu_mul(load(gate + i), load(up + i)));
  for (; i < n; i++) {
    alignas(64) float lanes[kWide];
    store(lanes, silu_mul(set(gate[i]), set(up[i])));
    y[i] = lanes[0];
  }
}

void axpy(float a, const float* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) store(y + i, fma(set(a), load(x + i), load(y + i)));
  for (; i < n; i++) y[i] = __builtin_fmaf(a, x[i], y[i]);
}

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
  V squares = zero();
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) squares = fma(load(x + i), load(x + i), squares);
  float sum = sum_of(squares);
  for (int64_t j = i; j < n; j++) sum += x[j] * x[j];
  float factor = 1.f / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
  for (i = 0; i + kWide <= n; i += kWide) store(y + i, mul(mul(load(x + i), set(factor)), load(weight + i)));
  for (; i < n; i++) y[i] = x[i] * factor * weight[i];
}

// The halves of one head rotated by the angles of its token, then multiplied by `scale`.
void rotate(const float* x, int64_t half, const float* cosine, const float* sine, float scale, float* y) {
  int64_t i = 0;
  for (; i + kWide <= half; i += kWide) {
    V a = load(x + i), b = load(x + half + i), c = load(cosine + i), s = load(sine + i);
    store(y + i, mul(sub(mul(a, c), mul(b, s)), set(scale)));
    store(y + half + i, mul(add(mul(b, c), mul(a, s)), set(scale)));
  }
  for (; i < half; i++) {
    float a = x[i], b = x[half + i];
    y[i] = (a * cosine[i] - b * sine[i]) * scale;
    y[half + i] = (b * cosine[i] + a * sine[i]) * scale;
  }
}

bool softmax(float* x, int64_t n) {
  constexpr float kInfinity = __builtin_inff();
  float best = -kInfinity;
  bool fine = true;
  for (int64_t i = 0; i < n; i++) {
    fine &= x[i] < kInfinity;
    best = x[i] > best ? x[i] : best;
  }
  if (!fine || best == -kInfinity) return false;
  float sum = 0.f;
  for (int64_t i = 0; i < n; i += kWide) {
    int64_t here = least(kWide, n - i);
    alignas(64) float lanes[kWide] = {};
    for (int64_t j = 0; j < here; j++) lanes[j] = x[i + j] == -kInfinity ? -1e9f : x[i + j] - best;
    store(lanes, exp_of(load(lanes)));
    for (int64_t j = 0; j < here; j++) {
      x[i + j] = lanes[j] < 1e-38f ? 0.f : lanes[j];
      sum += x[i + j];
    }
  }
  float inverse = 1.f / sum;
  for (int64_t i = 0; i < n; i++) x[i] *= inverse;
  return true;
}

// ---- products

// acc[m, c] += sum over inputs i < k of x[m][i] * w[i, c], for `rows` values of m and columns in pairs of vectors.
// Some inputs are taken per pass over the columns, so that memory is walked in whole rows; with `streamed` the columns
// of the next pass are asked for early.
template <Float type, int rows, int steps, bool streamed>
void dense_pass(const void* w, int64_t ld, int64_t columns, const float* const* x, float* acc, int64_t ld_acc) {
  constexpr int64_t size = type == Float::f32 ? 4 : 2;
  for (int64_t c = 0; c < columns; c += kPair) {
    V a[rows], b[rows];
    for (int m = 0; m < rows; m++) a[m] = load(acc + m * ld_acc + c), b[m] = load(acc + m * ld_acc + c + kWide);
#pragma GCC unroll 8
    for (int i = 0; i < steps; i++) {
      const void* row = static_cast<const char*>(w) + (i * ld + c) * size;
      if (streamed)
        for (int64_t byte = 0; byte < kPair * size; byte += 64)
          __builtin_prefetch(static_cast<const char*>(row) + steps * ld * size + byte, 0, 2);
      V p = load_as<type>(row, 0), q = load_as<type>(row, kWide);
#pragma GCC unroll 4
      for (int m = 0; m < rows; m++) {
        V v = set(x[m][i]);
        a[m] = fma(v, p, a[m]), b[m] = fma(v, q, b[m]);
      }
    }
    for (int m = 0; m < rows; m++) store(acc + m * ld_acc + c, a[m]), store(acc + m * ld_acc + c + kWide, b[m]);
  }
}

template <Float type, int rows, bool streamed>
void dense_rows(const void* w, int64_t ld, int64_t k, int64_t columns, const float* const* x, float* acc,
                int64_t ld_acc) {
  constexpr int64_t size = type == Float::f32 ? 4 : 2;
  const float* at[rows];
  int64_t i = 0;
  for (; i + 4 <= k; i += 4) {
    for (int m = 0; m < rows; m++) at[m] = x[m] + i;
    dense_pass<type, rows, 4, streamed>(static_cast<const char*>(w) + i * ld * size, ld, columns, at, acc, ld_acc);
  }
  for (; i < k; i++) {
    for (int m = 0; m < rows; m++) at[m] = x[m] + i;
    dense_pass<type, rows, 1, streamed>(static_cast<const char*>(w) + i * ld * size, ld, columns, at, acc, ld_acc);
  }
}

template <Float type, bool streamed = false>
void dense_any(const void* w, int64_t ld, int64_t k, int64_t columns, const float* const* x, int64_t rows, float* acc,
               int64_t ld_acc) {
  in_rows<4>(rows, [&](auto count, int64_t m) {
    dense_rows<type, decltype(count)::value, streamed>(w, ld, k, columns, x + m, acc + m * ld_acc, ld_acc);
  });
}

void clear(float* acc, int64_t rows, int64_t ld) {
  for (int64_t i = 0; i < rows * ld; i += kWide) store(acc + i, zero());
}

// Adds or, for the first chunk, puts the sums of a chunk where they belong.
void give(const float* sums, int64_t rows, int64_t columns, int64_t ld, bool first, float* y, int64_t ldy) {
  for (int64_t m = 0; m < rows; m++) {
    const float* from = sums + m * ld;
    float* to = y + m * ldy;
    if (first) {
      copy_bytes(to, from, columns * 4);
    } else {
      int64_t c = 0;
      for (; c + kWide <= columns; c += kWide) store(to + c, add(load(to + c), load(from + c)));
      for (; c < columns; c++) to[c] += from[c];
    }
  }
}

template <Float type>
void dense_tile_as(const void* w, int64_t k, int64_t n, int64_t column0, int64_t columns, int64_t chunk0,
                   int64_t chunk1, const float* const* x, int64_t rows, float* y, int64_t ldy) {
  constexpr int64_t size = type == Float::f32 ? 4 : 2;
  int64_t whole = columns / kPair * kPair, rest = columns - whole, ld = padded(columns);
  alignas(64) float sums[kTileSize];
  alignas(64) char last[Blocks::kChunk * kPad * 4];
  for (int64_t chunk = chunk0; chunk < chunk1; chunk++) {
    int64_t begin = chunk * Blocks::kChunk, count = least(Blocks::kChunk, k - begin);
    const float* at[kTileRows];
    for (int64_t m = 0; m < rows; m++) at[m] = x[m] + begin;
    const char* from = static_cast<const char*>(w) + (begin * n + column0) * size;
    clear(sums, rows, ld);
    if (whole) dense_any<type, true>(from, n, count, whole, at, rows, sums, ld);
    if (rest) {  // columns short of a pair of vectors: from a copy, so that nothing past the matrix is read
      __builtin_memset(last, 0, static_cast<size_t>(count * kPair * size));
      for (int64_t i = 0; i < count; i++) copy_bytes(last + i * kPair * size, from + (i * n + whole) * size, rest * size);
      dense_any<type>(last, kPair, count, kPair, at, rows, sums + whole, ld);
    }
    give(sums, rows, columns, ld, chunk == chunk0, y, ldy);
  }
}

void dense_tile(const void* w, Float type, int64_t k, int64_t n, int64_t column0, int64_t columns, int64_t chunk0,
                int64_t chunk1, const float* const* x, int64_t rows, float* y, int64_t ldy) {
  auto run = type == Float::f32 ? dense_tile_as<Float::f32>
                                : type == Float::bf16 ? dense_tile_as<Float::bf16> : dense_tile_as<Float::f16>;
  run(w, k, n, column0, columns, chunk0, chunk1, x, rows, y, ldy);
}

// Exact: acc[m, c] += sum of x[m][i] * code[i, c] over the inputs of `steps` word rows.
template <int bits, int rows, int steps>
void exact_pass(const uint32_t* w, int64_t ld, int64_t columns, const float* const* x, float* acc, int64_t ld_acc) {
  constexpr int codes = 32 / bits;
  const I mask = seti((1 << bits) - 1);
  for (int64_t c = 0; c < columns; c += kPair) {
    V a[rows], b[rows];
    for (int m = 0; m < rows; m++) a[m] = load(acc + m * ld_acc + c), b[m] = load(acc + m * ld_acc + c + kWide);
#pragma GCC unroll 4
    for (int i = 0; i < steps; i++) {
      I p = loadi(w + i * ld + c), q = loadi(w + i * ld + c + kWide);
#pragma GCC unroll 8
      for (int j = 0; j < codes; j++) {
        V u = to_float(and_(p, mask)), v = to_float(and_(q, mask));
        p = srl<bits>(p), q = srl<bits>(q);
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
          V s = set(x[m][i * codes + j]);
          a[m] = fma(s, u, a[m]), b[m] = fma(s, v, b[m]);
        }
      }
    }
    for (int m = 0; m < rows; m++) store(acc + m * ld_acc + c, a[m]), store(acc + m * ld_acc + c + kWide, b[m]);
  }
}

template <int bits, int rows>
void exact_rows(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, const float* const* x, float* acc,
                int64_t ld_acc) {
  constexpr int codes = 32 / bits;
  const float* at[rows];
  int64_t i = 0;
  for (; i + 2 <= words; i += 2) {
    for (int m = 0; m < rows; m++) at[m] = x[m] + i * codes;
    exact_pass<bits, rows, 2>(w + i * ld, ld, columns, at, acc, ld_acc);
  }
  for (; i < words; i++) {
    for (int m = 0; m < rows; m++) at[m] = x[m] + i * codes;
    exact_pass<bits, rows, 1>(w + i * ld, ld, columns, at, acc, ld_acc);
  }
}

// The float products of one block, added to nothing: acc is overwritten.
template <int bits>
struct Exact {
  using Sum = float;
  using Input = float;
  static const float* input(const Row& row, int64_t begin) { return row.values + begin; }

  static void dot(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, const float* const* x, int64_t rows,
                  float* acc, int64_t ld_acc) {
    for (int64_t m = 0; m < rows; m++) clear(acc + m * ld_acc, 1, columns);
    in_rows<4>(rows, [&](auto count, int64_t m) {
      exact_rows<bits, decltype(count)::value>(w, ld, words, columns, x + m, acc + m * ld_acc, ld_acc);
    });
  }

  static V factor(const Row&, int64_t) { return set(1.f); }
  static float total(const Row& x, int64_t block) { return x.totals[block]; }
  static V sum(const float* acc) { return load(acc); }
};

template <int bits>
struct Quantized {
  using Sum = int32_t;
  using Input = int8_t;
  static const int8_t* input(const Row& row, int64_t begin) { return row.codes + begin; }

  static void dot(const uint32_t* w, int64_t ld, int64_t words, int64_t columns, const int8_t* const* x, int64_t rows,
                  int32_t* acc, int64_t ld_acc) {
    Int8<bits>::dot(w, ld, words, columns, x, rows, acc, ld_acc);
  }

  static V factor(const Row& x, int64_t block) { return set(x.scales[block]); }
  static float total(const Row& x, int64_t block) { return static_cast<float>(x.sums[block]); }
  static V sum(const int32_t* acc) { return to_float(loadi(acc)); }
};

// y += scale * factor * (acc - zero * total): the zero point is taken out once per block, not once per weight. With
// int8 activations all of this but the scaling is exact: sums of a block stay below 2^24.
template <class Kind, int rows>
void add_block(const typename Kind::Sum* acc, const Row* x, int64_t block, const float* scales, const float* zeros,
               int64_t columns, int64_t ld, float* y) {
  V factor[rows], total[rows];
  for (int m = 0; m < rows; m++) factor[m] = Kind::factor(x[m], block), total[m] = set(-Kind::total(x[m], block));
  for (int64_t c = 0; c < columns; c += kWide) {
    V scale = load(scales + c), zero = load(zeros + c);
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) {
      V centred = fma(zero, total[m], Kind::sum(acc + m * ld + c));
      store(y + m * ld + c, fma(mul(scale, factor[m]), centred, load(y + m * ld + c)));
    }
  }
}

// Scales and zero points of one group as float32, for columns [column0, column0 + columns).
void read_group(const Packed& w, int64_t group, int64_t column0, int64_t columns, float* scales, float* zeros) {
  const uint16_t* from = w.scales + group * w.n + column0;
  int64_t c = 0;
  for (; c + kWide <= columns; c += kWide) store(scales + c, load_half(from + c));
  for (; c < columns; c++) scales[c] = one_from(from, Float::f16, c);
  for (; c < padded(columns); c++) scales[c] = zeros[c] = 0.f;
  if (!w.zeros) return;
  const uint32_t* words = w.zeros + group * w.zero_words();
  int64_t codes = w.codes_per_word();
  uint32_t mask = (1u << w.bits) - 1;
  for (c = 0; c < columns; c++) {
    int64_t column = column0 + c;
    zeros[c] = static_cast<float>(words[column / codes] >> (column % codes * w.bits) & mask);
  }
}

template <template <int> class Kind, int bits>
void packed_tile(const Packed& w, int64_t column0, int64_t columns, int64_t chunk0, int64_t chunk1, const Row* x,
                 int64_t rows, float* y, int64_t ldy) {
  using K = Kind<bits>;
  constexpr int64_t codes = 32 / bits;
  const Blocks blocks(w.k, w.group);
  int64_t whole = columns / kPair * kPair, rest = columns - whole, ld = padded(columns);
  alignas(64) typename K::Sum acc[kTileSize];
  alignas(64) float sums[kTileSize];
  alignas(64) float scales[kTileColumns];
  alignas(64) float zeros[kTileColumns];
  alignas(64) uint32_t last[Blocks::kMost / codes * kPad];
  if (!w.zeros)
    for (int64_t c = 0; c < ld; c++) zeros[c] = 1 << (bits - 1);
  int64_t group = -1;
  for (int64_t chunk = chunk0; chunk < chunk1; chunk++) {
    clear(sums, rows, ld);
    int64_t end = least(blocks.count, (chunk + 1) * blocks.per_chunk);
    for (int64_t b = chunk * blocks.per_chunk; b < end; b++) {
      if (blocks.group_of(b) != group) {
        group = blocks.group_of(b);
        read_group(w, group, column0, columns, scales, zeros);
      }
      int64_t begin = blocks.begin(b), words = (blocks.end(b) - begin + codes - 1) / codes;
      const uint32_t* from = w.words + begin / codes * w.n + column0;
      const typename K::Input* at[kTileRows];
      for (int64_t m = 0; m < rows; m++) at[m] = K::input(x[m], begin);
      if (rows > 1 && b + 1 < blocks.count) {  // narrow tiles jump from row to row: the next block is asked for now
        const char* next = reinterpret_cast<const char*>(from + words * w.n);
        for (int64_t i = 0; i < words && begin / codes + words + i < w.word_rows(); i++)
          for (int64_t byte = 0; byte < columns * 4; byte += 64) __builtin_prefetch(next + i * w.n * 4 + byte, 0, 2);
      }
      if (whole) K::dot(from, w.n, words, whole, at, rows, acc, ld);
      if (rest) {
        __builtin_memset(last, 0, static_cast<size_t>(words * kPair * 4));
        for (int64_t i = 0; i < words; i++) copy_bytes(last + i * kPair, from + i * w.n + whole, rest * 4);
        K::dot(last, kPair, words, kPair, at, rows, acc + whole, ld);
      }
      int64_t m = 0;
      for (; m + 4 <= rows; m += 4) add_block<K, 4>(acc + m * ld, x + m, b, scales, zeros, columns, ld, sums + m * ld);
      for (; m < rows; m++) add_block<K, 1>(acc + m * ld, x + m, b, scales, zeros, columns, ld, sums + m * ld);
    }
    give(sums, rows, columns, ld, chunk == chunk0, y, ldy);
  }
}

void tile(const Packed& w, int64_t column0, int64_t columns, int64_t chunk0, int64_t chunk1, const Row* x, int64_t rows,
          float* y, int64_t ldy) {
  auto run = x[0].codes ? (w.bits == 4 ? packed_tile<Quantized, 4> : packed_tile<Quantized, 8>)
                        : (w.bits == 4 ? packed_tile<Exact, 4> : packed_tile<Exact, 8>);
  run(w, column0, columns, chunk0, chunk1, x, rows, y, ldy);
}

// ---- attention

template <Float type>
void attend_as(const float* q, int64_t ldq, int64_t rows, int64_t head, const void* keys, const void* values,
               int64_t stride, int64_t count, const float* low, const float* high, float* best, float* total,
               float* out) {
  int64_t ld = padded(head);
  alignas(64) float key[kKeyBlock * kHeadMost];
  alignas(64) float value[kKeyBlock * kHeadMost];
  alignas(64) float scores[kKeyBlock * kQueryRows];  // [keys, rows]
  alignas(64) float fade[kQueryRows];
  alignas(64) float weights[kQueryRows * kKeyBlock];  // [rows, keys]
  const float* at[kQueryRows > kKeyBlock ? kQueryRows : kKeyBlock];
  for (int64_t s = 0; s < count; s++) {
    to_float_as<type>(static_cast<const char*>(keys) + s * stride, head, key + s * ld);
    to_float_as<type>(static_cast<const char*>(values) + s * stride, head, value + s * ld);
    for (int64_t d = head; d < ld; d++) value[s * ld + d] = 0.f;
    at[s] = key + s * ld;
  }
  clear(scores, count, ldq);
  dense_any<Float::f32>(q, ldq, head, ldq, at, count, scores, ldq);

  for (int64_t r = 0; r < ldq; r += kWide) {
    V was = load(best + r), most = was, first = load(low + r), end = load(high + r), sum = zero();
    for (int64_t s = 0; s < count; s++) {
      // Zero for a key that the row sees, at least one for the others.
      V key_number = set(static_cast<float>(s));
      V unseen = add(max(zero(), sub(first, key_number)), max(zero(), sub(add(key_number, set(1.f)), end)));
      V score = fma(set(-1e30f), unseen, load(scores + s * ldq + r));
      store(scores + s * ldq + r, score);
      most = max(score, most);
    }
    for (int64_t s = 0; s < count; s++) {
      // What exp gives for an unseen key is tiny, not zero. The order keeps a NaN.
      V weight = max(zero(), sub(exp_of(sub(load(scores + s * ldq + r), most)), set(1e-37f)));
      store(scores + s * ldq + r, weight);
      sum = add(sum, weight);
    }
    V kept = exp_of(sub(was, most));
    store(fade + r, kept);
    store(best + r, most);
    store(total + r, fma(load(total + r), kept, sum));
  }

  for (int64_t r = 0; r < rows; r++) {
    for (int64_t s = 0; s < count; s++) weights[r * kKeyBlock + s] = scores[s * ldq + r];
    at[r] = weights + r * kKeyBlock;
    if (fade[r] != 1.f)
      for (int64_t d = 0; d < ld; d += kWide) store(out + r * ld + d, mul(load(out + r * ld + d), set(fade[r])));
  }
  dense_any<Float::f32>(value, ld, count, ld, at, rows, out, ld);
}

void attend(const float* q, int64_t ldq, int64_t rows, int64_t head, const void* keys, const void* values, Float type,
            int64_t stride, int64_t count, const float* low, const float* high, float* best, float* total,
            float* out) {
  auto run = type == Float::f32 ? attend_as<Float::f32>
                                : type == Float::bf16 ? attend_as<Float::bf16> : attend_as<Float::f16>;
  run(q, ldq, rows, head, keys, values, stride, count, low, high, best, total, out);
}

constexpr Isa make(const char* name, int64_t wide_rows, int64_t wide_columns = 128,
                   decltype(Isa::tile) tile_of_this_isa = tile) {
  return {name,       wide_rows, wide_columns, tile_of_this_isa, dense_tile, quantize, to_float,
          from_float, silu_mul,  axpy,         rms_norm,         rotate,     attend,   softmax};
}

#pragma GCC diagnostic pop
