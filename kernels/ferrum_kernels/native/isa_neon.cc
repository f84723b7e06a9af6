// 64-bit ARM with the dot product instructions of ARMv8.2 (Apple M1, Graviton 2, and later).
#include <arm_neon.h>

#include "in_rows.h"
#include "isa.h"

namespace ferrum {
namespace {

#include "neon.h"

template <int bits>
using Int8 = Dot<bits>;

#include "kernels.h"

}  // namespace

extern const Isa isa_neon;
const Isa isa_neon = make("neon", 5);

}  // namespace ferrum
