// Every instruction set of this machine against the portable one, bit for bit, on heap buffers of exactly the size that
// the kernels may touch: a sanitizer sees any other read or write. Built and run by test_native.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "isa.h"
#include "pool.h"

using namespace ferrum;

namespace {

int failures = 0;

void expect(bool true_, const std::string& what) {
  if (true_) return;
  if (failures++ < 10) std::printf("%s\n", what.c_str());
}

float uniform() { return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f; }
uint32_t word() { return static_cast<uint32_t>(std::rand()) * 2654435761u ^ static_cast<uint32_t>(std::rand()); }

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

struct Weight {
  std::vector<uint32_t> words, zeros;
  std::vector<uint16_t> scales;
  Packed packed;

  Weight(int64_t k, int64_t n, int64_t group, int bits, bool asymmetric) : packed{} {
    packed.k = k, packed.n = n, packed.group = group, packed.bits = bits;
    int64_t groups = (k + group - 1) / group;
    words.resize(static_cast<size_t>(packed.word_rows() * n));
    zeros.resize(static_cast<size_t>(asymmetric ? groups * packed.zero_words() : 0));
    scales.resize(static_cast<size_t>(groups * n));
    for (auto& w : words) w = word();
    for (auto& z : zeros) z = word();
    for (auto& s : scales) s = static_cast<uint16_t>(0x3000 + std::rand() % 0xC00);
    packed.words = words.data(), packed.scales = scales.data(), packed.zeros = asymmetric ? zeros.data() : nullptr;
  }
};

std::vector<float> product(const Isa& isa, const Weight& w, const std::vector<float>& x, int64_t rows, bool int8) {
  int64_t k = w.packed.k, n = w.packed.n, per = w.packed.codes_per_word(), wide = w.packed.word_rows() * per;
  Blocks blocks(k, w.packed.group);
  std::vector<std::vector<float>> values, scales, totals;
  std::vector<std::vector<int8_t>> codes;
  std::vector<std::vector<int32_t>> sums;
  std::vector<Row> ready;
  size_t count = static_cast<size_t>(blocks.count);
  for (int64_t m = 0; m < rows; m++) {
    values.emplace_back(static_cast<size_t>(wide), 0.f);
    std::memcpy(values.back().data(), x.data() + m * k, static_cast<size_t>(k) * 4);
    scales.emplace_back(count), totals.emplace_back(count), sums.emplace_back(count);
    codes.emplace_back(static_cast<size_t>(wide));
    if (int8) {
      isa.quantize(values.back().data(), blocks, w.packed.bits, codes.back().data(), scales.back().data(),
                   sums.back().data());
      ready.push_back({codes.back().data(), nullptr, scales.back().data(), sums.back().data(), nullptr});
    } else {
      for (int64_t b = 0; b < blocks.count; b++)
        for (int64_t i = blocks.begin(b); i < blocks.end(b); i++)
          totals.back()[static_cast<size_t>(b)] += values.back()[static_cast<size_t>(i)];
      ready.push_back({nullptr, values.back().data(), nullptr, nullptr, totals.back().data()});
    }
  }
  std::vector<float> y(static_cast<size_t>(rows * n), NAN);
  isa.tile(w.packed, 0, n, 0, blocks.chunks, ready.data(), rows, y.data(), n);
  return y;
}

void products(const Isa& plain, const std::vector<const Isa*>& others) {
  const int64_t shapes[][3] = {{256, 96, 128}, {128, 33, 32}, {512, 64, 512}, {40, 5, 40}, {1088, 70, 64}, {17, 9, 24},
                               {640, 600, 128}};
  for (auto& [k, n, group] : shapes)
    for (int bits : {4, 8})
      for (bool asymmetric : {false, true}) {
        Weight w(k, n, group, bits, asymmetric);
        for (int64_t rows : {1, 2, 3, 4, 6, 9, 17, 32}) {
          if (rows * (n + 31) / 32 * 32 > kTileSize) continue;
          std::vector<float> x(static_cast<size_t>(rows * k));
          for (auto& v : x) v = uniform();
          for (bool int8 : {false, true}) {
            std::vector<float> expected = product(plain, w, x, rows, int8);
            for (const Isa* isa : others)
              expect(same(expected, product(*isa, w, x, rows, int8)),
                     std::string(isa->name) + ": " + std::to_string(rows) + " x " + std::to_string(k) + " x " +
                         std::to_string(n) + " in groups of " + std::to_string(group));
          }
        }
      }
}

void plain_products(const Isa& plain, const Isa& isa) {
  for (Float type : {Float::f32, Float::bf16, Float::f16})
    for (int64_t k : {1, 70, 600})
      for (int64_t n : {1, 31, 64}) {
        std::vector<float> w(static_cast<size_t>(k * n)), x(static_cast<size_t>(5 * k));
        for (auto& v : w) v = uniform();
        for (auto& v : x) v = uniform();
        std::vector<uint16_t> narrow(w.size());
        if (type != Float::f32) plain.from_float(w.data(), k * n, type, narrow.data());
        const void* at = type == Float::f32 ? static_cast<const void*>(w.data()) : narrow.data();
        const float* rows[5];
        for (int m = 0; m < 5; m++) rows[m] = x.data() + m * k;
        std::vector<float> a(static_cast<size_t>(5 * n), NAN), b = a;
        int64_t chunks = (k + Blocks::kChunk - 1) / Blocks::kChunk;
        plain.dense_tile(at, type, k, n, 0, n, 0, chunks, rows, 5, a.data(), n);
        isa.dense_tile(at, type, k, n, 0, n, 0, chunks, rows, 5, b.data(), n);
        expect(same(a, b), std::string(isa.name) + ": plain product");
      }
}

void conversions(const Isa& plain, const Isa& isa) {
  std::vector<float> x(77);
  for (auto& v : x) v = uniform() * 8.f;
  x[3] = 65520.f, x[5] = 1e-7f, x[6] = 0.f, x[7] = -0.f;
  for (Float type : {Float::bf16, Float::f16}) {
    std::vector<uint16_t> a(77), b(77);
    plain.from_float(x.data(), 77, type, a.data());
    isa.from_float(x.data(), 77, type, b.data());
    expect(same(a, b), std::string(isa.name) + ": rounding to 16 bits");
    std::vector<float> c(77), d(77);
    plain.to_float(a.data(), type, 77, c.data());
    isa.to_float(a.data(), type, 77, d.data());
    expect(same(c, d), std::string(isa.name) + ": widening from 16 bits");
  }
  std::vector<float> y(77);
  x[3] = 1.f;
  isa.silu_mul(x.data(), x.data(), 77, y.data());
  for (size_t i = 0; i < 77; i++) {
    float expected = x[i] * x[i] / (1.f + std::exp(-x[i]));
    expect(std::fabs(y[i] - expected) <= 1e-5f * std::fabs(expected) + 1e-9f, std::string(isa.name) + ": SiLU");
  }
  expect(isa.softmax(y.data(), 77), std::string(isa.name) + ": softmax");
  float sum = 0.f;
  for (float v : y) sum += v;
  expect(std::fabs(sum - 1.f) < 1e-5f, std::string(isa.name) + ": softmax adds up to one");
}

// One pass over two blocks of keys against the softmax written out.
void attention(const Isa& isa) {
  for (int64_t head : {2, 30, 64, 128})
    for (int64_t rows : {1, 5, 33})
      for (Float type : {Float::f32, Float::bf16}) {
        const int64_t counts[2] = {kKeyBlock, 7}, ldq = (rows + 31) / 32 * 32, wide = (head + 31) / 32 * 32;
        const int64_t all = counts[0] + counts[1], stride = head * (type == Float::f32 ? 4 : 2);
        std::vector<float> key(static_cast<size_t>(all * head)), value(key.size());
        std::vector<float> q(static_cast<size_t>(head * ldq), 0.f);
        for (auto* numbers : {&key, &value})
          for (auto& v : *numbers) v = static_cast<float>(std::rand() % 17 - 8) / 8.f;  // exact in 16 bits
        for (int64_t i = 0; i < head; i++)
          for (int64_t r = 0; r < rows; r++) q[static_cast<size_t>(i * ldq + r)] = uniform();
        std::vector<float> best(static_cast<size_t>(ldq), -1e30f), total(best.size(), 0.f), low(best.size(), 0.f),
            high(best.size(), 0.f), out(static_cast<size_t>(rows * wide), 0.f);
        for (int64_t block = 0, first = 0; block < 2; first += counts[block++]) {
          size_t size = static_cast<size_t>(counts[block] * head), from = static_cast<size_t>(first * head);
          std::vector<float> k(key.begin() + first * head, key.begin() + first * head + static_cast<int64_t>(size));
          std::vector<float> v(value.begin() + first * head, value.begin() + first * head + static_cast<int64_t>(size));
          std::vector<uint16_t> narrow_k(size), narrow_v(size);
          isa.from_float(key.data() + from, static_cast<int64_t>(size), Float::bf16, narrow_k.data());
          isa.from_float(value.data() + from, static_cast<int64_t>(size), Float::bf16, narrow_v.data());
          // Row r sees keys from r on; the last row of many sees nothing of the first block.
          for (int64_t r = 0; r < rows; r++) {
            low[static_cast<size_t>(r)] = block == 0 ? static_cast<float>(2 * r < counts[0] ? 2 * r : counts[0]) : 0.f;
            high[static_cast<size_t>(r)] = static_cast<float>(counts[block]);
          }
          const void* at_k = type == Float::f32 ? static_cast<const void*>(k.data()) : narrow_k.data();
          const void* at_v = type == Float::f32 ? static_cast<const void*>(v.data()) : narrow_v.data();
          isa.attend(q.data(), ldq, rows, head, at_k, at_v, type, stride, counts[block], low.data(), high.data(),
                     best.data(), total.data(), out.data());
        }
        for (int64_t r = 0; r < rows; r++) {
          std::vector<double> expected(static_cast<size_t>(head), 0.);
          double sum = 0.;
          for (int64_t s = 2 * r < counts[0] ? 2 * r : counts[0]; s < all; s++) {
            double score = 0.;
            for (int64_t i = 0; i < head; i++)
              score += double{q[static_cast<size_t>(i * ldq + r)]} * double{key[static_cast<size_t>(s * head + i)]};
            sum += std::exp(score);
            for (int64_t i = 0; i < head; i++)
              expected[static_cast<size_t>(i)] += std::exp(score) * value[static_cast<size_t>(s * head + i)];
          }
          for (int64_t i = 0; i < head; i++) {
            double got = out[static_cast<size_t>(r * wide + i)] / total[static_cast<size_t>(r)];
            double wanted = expected[static_cast<size_t>(i)] / sum;
            expect(std::fabs(got - wanted) < 1e-5, std::string(isa.name) + ": attention");
          }
        }
      }
}

// Several threads take the pool at once: every unit of every job runs once.
void jobs() {
  std::vector<std::thread> callers;
  std::vector<std::vector<int>> counts(4, std::vector<int>(100, 0));
  for (auto& mine : counts)
    callers.emplace_back([&mine] {
      for (int round = 0; round < 200; round++) {
        Session session;
        session.run(100, [&](int64_t unit) { mine[static_cast<size_t>(unit)]++; });
      }
    });
  for (auto& caller : callers) caller.join();
  for (auto& mine : counts)
    for (int count : mine) expect(count == 200, "a unit of a job ran another number of times than once");
}

// What one unit throws reaches the caller, whichever thread ran it, and the next job runs as ever.
void failing_jobs() {
  for (int round = 0; round < 200; round++) {
    Session session;
    std::string caught;
    try {
      session.run(100, [&](int64_t unit) {
        if (unit == round % 100) throw std::runtime_error("no memory");
      });
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    expect(caught == "no memory", "what a unit threw did not reach the caller");
    std::vector<int> counts(100, 0);
    session.run(100, [&](int64_t unit) { counts[static_cast<size_t>(unit)]++; });
    expect(counts == std::vector<int>(100, 1), "a job after a failed one did not run every unit once");
  }
}

}  // namespace

int main() {
  std::string names = usable_isas();
  choose_isa("");
  expect(names.substr(names.rfind(',') + 1) == chosen_isa()->name, "another instruction set than the best was chosen");
  choose_isa("portable");
  const Isa& plain = *chosen_isa();
  std::vector<const Isa*> others;
  for (size_t begin = 0; begin < names.size();) {
    size_t end = std::min(names.find(',', begin), names.size());
    choose_isa(names.substr(begin, end - begin).c_str());
    const Isa& isa = *chosen_isa();
    if (&isa != &plain) others.push_back(&isa);
    plain_products(plain, isa);
    conversions(plain, isa);
    attention(isa);
    begin = end + 1;
  }
  products(plain, others);
  jobs();
  failing_jobs();
  std::printf("%s: %d failures\n", names.c_str(), failures);
  return failures != 0;
}
