// Hadamard transforms of short blocks, in registers.
#pragma once

#include "common.h"

namespace aio {

// Lane i takes lane i ^ D.
template <int D>
inline vf exchange(vf v) {
#if defined(__clang__) || __GNUC__ >= 12
#define AT(i) (i) ^ D
  return __builtin_shufflevector(v, v, AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), AT(6), AT(7), AT(8), AT(9), AT(10),
                                 AT(11), AT(12), AT(13), AT(14), AT(15));
#undef AT
#else
  vf out;
  for (int i = 0; i < LANES; i++) out[i] = v[i ^ D];
  return out;
#endif
}

template <int D>
inline vf butterfly(vf v) {
  constexpr vi LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vi second = (LANE & D) != 0;
  const vf negated = (vf)((vi)v ^ (second & int32_t(0x80000000)));
  return exchange<D>(v) + negated;
}

// The Hadamard matrix of 16 * VECTORS (a power of two), not normalised, times a block; its own inverse but for that factor.
template <int VECTORS>
inline void hadamard(vf (&v)[VECTORS]) {
  for (int step = 1; step < VECTORS; step *= 2)
    for (int i = 0; i < VECTORS; i++)
      if ((i & step) == 0) {
        const vf a = v[i], b = v[i + step];
        v[i] = a + b;
        v[i + step] = a - b;
      }
  for (int i = 0; i < VECTORS; i++) v[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(v[i]))));
}

}  // namespace aio
