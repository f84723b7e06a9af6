// Rows in groups of a size that the compiler knows, so that their sums stay in registers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "weights.h"

namespace ferrum {

// Calls body(std::integral_constant<int, n>, first row): groups of `most` rows, then one group of what is left.
template <int most, typename Body>
FERRUM_INLINE void in_rows(int64_t rows, const Body& body) {
  static_assert(most == 4 || most == 8, "groups are of 4 or of 8 rows");
  int64_t m = 0;
  for (; m + most <= rows; m += most) body(std::integral_constant<int, most>(), m);
  if (most == 8 && rows - m >= 4) {
    body(std::integral_constant<int, 4>(), m);
    m += 4;
  }
  if (rows - m == 3) body(std::integral_constant<int, 3>(), m);
  if (rows - m == 2) body(std::integral_constant<int, 2>(), m);
  if (rows - m == 1) body(std::integral_constant<int, 1>(), m);
}

}  // namespace ferrum
