// What an adapter adds to a few rows of a linear: y += B h, with B as a slot holds it, by output.
//
// B is turned first, 16 outputs to a vector, which is then used for every row. Every path adds the products to an output
// one after the other, by rank: so a row's bits do not depend on how many rows there are. Defined in expand.cpp.
#pragma once

#include "common.h"

namespace aio {

// A matrix B from one of its rows on, `rank` elements each, which are `lanes` of what is computed in, the last of them
// perhaps not whole. The elements are T's, or int8.
template <class T>
struct B {
  B(const void* at, long rank, bool int8)
      : at(at), rank(rank), lanes((rank + T::PER_LANE - 1) / T::PER_LANE), int8(int8) {}
  const void* at;
  long rank, lanes;
  bool int8;

  long row_bytes() const { return rank * (int8 ? 1 : long(sizeof(typename T::elem))); }
  B from(long row) const { return {(const char*)at + row * row_bytes(), rank, int8}; }
};

// Four int8 of each lane as lanes of T, one of which holds PER_LANE elements. Every int8 is exact in them.
template <class T>
inline __attribute__((always_inline)) void widen(vu bytes, vu (&out)[Int8::PER_LANE / T::PER_LANE]) {
  vf f[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) f[j] = __builtin_convertvector((vi)(bytes << (24 - 8 * j)) >> 24, vf);
#pragma GCC unroll 4
  for (int j = 0; j < Int8::PER_LANE / T::PER_LANE; j++)
    out[j] = T::PER_LANE == 1 ? (vu)f[j] : ((vu)f[2 * j] >> 16) | ((vu)f[2 * j + 1] & 0xffff0000u);
}

// `rows` <= 16 rows of B as lanes [rank][16 rows]. `out` has room for whole lanes of int8.
template <class T>
void turn(const B<T>& b, long rows, uint32_t* out);

// y += B h for `rows` rows, h_stride lanes apart, and so many panels. `turned` has room for one of B.
template <class T>
void expand_panels(const uint32_t* h, long h_stride, const B<T>& b, long rows, long panels, typename T::elem* y,
                   long y_stride, uint32_t* turned);

}  // namespace aio
