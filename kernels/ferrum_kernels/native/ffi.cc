// What Python asks the library about itself, by ctypes.
#include <chrono>
#include <cstdint>
#include <cstdlib>

#include "isa.h"
#include "pool.h"

#define FERRUM_EXPORT extern "C" __attribute__((visibility("default")))

// Raised whenever a handler's arguments change; cpu_library.py expects this number.
FERRUM_EXPORT int ferrum_cpu_abi() { return 1; }

// The instruction set in use, or an empty string when FERRUM_JAX_CPU_ISA names one that cannot be used.
FERRUM_EXPORT const char* ferrum_cpu_isa() {
  const ferrum::Isa* isa = ferrum::chosen_isa();
  return isa ? isa->name : "";
}

FERRUM_EXPORT const char* ferrum_cpu_isas() { return ferrum::usable_isas(); }

// Takes another from now on, for tests; 0 when it is not to be had.
FERRUM_EXPORT int ferrum_cpu_choose_isa(const char* name) { return ferrum::choose_isa(name); }

FERRUM_EXPORT int ferrum_cpu_threads() { return ferrum::pool_threads(); }

// Main memory read by all threads of the pool at once, in GB/s; 0 when `bytes` cannot be had. The best of five reads.
FERRUM_EXPORT double ferrum_cpu_read_bandwidth(uint64_t bytes) {
  constexpr int64_t kPiece = 1 << 20;
  int64_t pieces = static_cast<int64_t>(bytes) / kPiece, words = kPiece / 8;
  auto* memory = static_cast<uint64_t*>(std::aligned_alloc(kPiece, static_cast<size_t>(pieces * kPiece)));
  if (!memory || !pieces) return 0.;
  for (int64_t i = 0; i < pieces * words; i++) memory[i] = static_cast<uint64_t>(i);
  double best = 0.;
  ferrum::Session session;
  for (int attempt = 0; attempt < 5; attempt++) {
    auto began = std::chrono::steady_clock::now();
    session.run(pieces, [&](int64_t piece) {
      const uint64_t* at = memory + piece * words;
      uint64_t sums[8] = {};
      for (int64_t i = 0; i < words; i += 8)
        for (int64_t j = 0; j < 8; j++) sums[j] += at[i + j];
      // The compiler must not find the reads useless.
      asm volatile("" ::"r"(sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7]));
    });
    std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    double rate = static_cast<double>(pieces * kPiece) / took.count() / 1e9;
    best = rate > best ? rate : best;
  }
  std::free(memory);
  return best;
}
