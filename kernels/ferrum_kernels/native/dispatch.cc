// Which instruction sets this machine has, and which one is used.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

namespace ferrum {

extern const Isa isa_portable;
#ifdef FERRUM_HAVE_AVX2
extern const Isa isa_avx2;
#endif
#ifdef FERRUM_HAVE_AVX512
extern const Isa isa_avx512;
#endif
#ifdef FERRUM_HAVE_AMX
extern const Isa isa_amx;
#endif
#ifdef FERRUM_HAVE_NEON
extern const Isa isa_neon;
#endif
#ifdef FERRUM_HAVE_I8MM
extern const Isa isa_i8mm;
#endif

namespace {

#ifdef FERRUM_HAVE_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef FERRUM_HAVE_AMX
bool has_amx() {
#ifdef __linux__
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kInt8)) return false;
  // Linux keeps the tile registers of a process only after it has asked for them.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#ifdef FERRUM_HAVE_NEON
bool has_dot_products() {
#ifdef __linux__
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every Apple processor that runs macOS
#endif
}
#endif

#ifdef FERRUM_HAVE_I8MM
bool has_int8_matrices() {
#ifdef __linux__
  constexpr unsigned long kI8mm = 1ul << 13;  // HWCAP2_I8MM, which headers older than Linux 5.6 lack
  return has_dot_products() && getauxval(AT_HWCAP2) & kI8mm;
#else
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &value, &size, nullptr, 0) == 0 && value;
#endif
}
#endif

struct Choice {
  const Isa* isa;
  bool usable;
};

// Worst first.
const Choice* choices(int* count) {
  static const Choice all[] = {
      {&isa_portable, true},
#ifdef FERRUM_HAVE_AVX2
      {&isa_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#ifdef FERRUM_HAVE_AVX512
      {&isa_avx512, has_avx512()},
#endif
#ifdef FERRUM_HAVE_AMX
      {&isa_amx, has_amx()},
#endif
#ifdef FERRUM_HAVE_NEON
      {&isa_neon, has_dot_products()},
#endif
#ifdef FERRUM_HAVE_I8MM
      {&isa_i8mm, has_int8_matrices()},
#endif
  };
  *count = static_cast<int>(sizeof(all) / sizeof(all[0]));
  return all;
}

}  // namespace

const Isa* isa_named(const char* name) {
  int count;
  const Choice* all = choices(&count);
  const Isa* best = nullptr;
  for (int i = 0; i < count; i++)
    if (all[i].usable && (!name || !*name || std::strcmp(name, all[i].isa->name) == 0)) best = all[i].isa;
  return best;
}

namespace {

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{isa_named(std::getenv("FERRUM_JAX_CPU_ISA"))};
  return isa;
}

}  // namespace

const Isa* chosen_isa() { return chosen().load(std::memory_order_relaxed); }

bool choose_isa(const char* name) {
  const Isa* isa = isa_named(name);
  if (isa) chosen().store(isa);
  return isa != nullptr;
}

const char* usable_isas() {
  static char text[64] = "";
  if (!*text) {
    int count;
    const Choice* all = choices(&count);
    for (int i = 0; i < count; i++) {
      if (!all[i].usable) continue;
      if (*text) std::strcat(text, ",");
      std::strcat(text, all[i].isa->name);
    }
  }
  return text;
}

}  // namespace ferrum
