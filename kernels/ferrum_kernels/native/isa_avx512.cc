// x86-64 with AVX-512 and VNNI (Ice Lake and Zen 4, and later).
// GCC 12 warns of its own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "in_rows.h"
#include "isa.h"

namespace ferrum {
namespace {

#include "avx512.h"

template <int bits>
using Int8 = Vnni<bits>;

#include "kernels.h"

}  // namespace

extern const Isa isa_avx512;
const Isa isa_avx512 = make("avx512", 5);

}  // namespace ferrum
