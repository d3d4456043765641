// What an adapter adds to a few rows of a linear: y += B h, with B as a slot holds it.
//
// A slot has B by output, or turned when it was written: each 16 outputs as lanes [rank lanes][16 outputs], in the same
// bytes. So a lane of all 16 is a vector, which is used for every row. What is not turned is turned first, each time. Every
// path adds the products to an output one after the other, by rank: so a row's bits do not depend on how many rows there are.
// Defined in expand.cpp.
#pragma once

#include "fixed.h"
#include "ops.h"
#include "registers.h"
#include "tile_registers.h"

namespace aio {

// A matrix B from one of its rows on, `rank` elements each, which are `lanes` of what is computed in, the last of them
// perhaps not whole. The elements are T's, or int8. If it is turned, it may begin at every 16th row only.
template <class T>
struct B {
  B(const void* at, long rank, const Slots& slots)
      : at(at), rank(rank), lanes(whole(rank, slots.int8 && FIXED<T> ? Int8::PER_LANE : T::PER_LANE)), int8(slots.int8),
        turned(slots.turned && rank % (slots.int8 ? Int8::PER_LANE : T::PER_LANE) == 0) {}
  const void* at;
  long rank, lanes;  // lanes of int8 where it is multiplied as it lies
  bool int8, turned;

  long row_bytes() const { return rank * (int8 ? 1 : long(sizeof(typename T::elem))); }
  B from(long row) const {
    B found = *this;
    found.at = (const char*)at + row * row_bytes();
    return found;
  }
  static long whole(long n, long of) { return (n + of - 1) / of; }
};

// What A gave, as B is multiplied by it: a row's slices adjoin, each of so many words.
struct Given {
  const uint32_t* begin;
  long slices, words;

  const uint32_t* at(long row, long slice) const { return begin + (row * slices + slice) * words; }
  long stride() const { return slices * words; }
};

// The same of h [tokens, slices, width], for the tokens of segments; made in the calling thread's room if B is int8 and is
// multiplied as it lies.
template <class T>
Given given(const void* h, long slices, long width, const Slots& slots, const Segment* segments, long count);

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

// y += B h for R rows of so many lanes, h_stride apart, and a panel of B as panel() gives it, which may be int8.
template <class T, int R>
inline void add_lanes(const uint32_t* h, long h_stride, const uint32_t* turned, long lanes, [[maybe_unused]] bool int8,
                      vf (&y)[R]) {
#if defined(AIO_FIXED)
  if constexpr (FIXED<T>)
    if (int8) {
      vf panel[1][R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) panel[0][r] = y[r];
      add_fixed_lanes<R, 1>(h, h_stride, turned, lanes, panel);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) y[r] = panel[0][r];
      return;
    }
#endif
  constexpr long EACH = Steps<T>::COUNT;
  if constexpr (EACH > 1) {
    uint32_t* const laid_out = room<LAID_OUT_H>(R * lanes * EACH * long(sizeof(uint32_t)));
    for (int r = 0; r < R; r++) lay_out<T>(h + r * h_stride, lanes, laid_out + r * lanes * EACH);
    h = laid_out, h_stride = lanes * EACH;
  }
  rf acc[R][PER_VECTOR];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    if constexpr (PER_VECTOR == 1)
      acc[r][0] = y[r];  // from address to address, y would have to be in memory
    else
      for (int c = 0; c < PER_VECTOR; c++) acc[r][c] = load_register<rf>((const float*)&y[r] + c * WIDTH);
  for (long k = 0; k < lanes; k++) {
    const auto row = [&](int r) { return h + r * h_stride + k * EACH; };
    const auto column = [&](int c) { return load_register<ru>(turned + k * LANES + c * WIDTH); };
    add_products<T, R, PER_VECTOR>(row, column, acc);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    if constexpr (PER_VECTOR == 1)
      y[r] = acc[r][0];
    else
      for (int c = 0; c < PER_VECTOR; c++) store_register((float*)&y[r] + c * WIDTH, acc[r][c]);
}

// `rows` <= 16 rows of B as its lanes [lanes][16 rows]: where they lie, or in `room`, which has room for whole lanes of int8.
template <class T>
const uint32_t* panel(const B<T>& b, long rows, uint32_t* room);

// y += B h for `rows` rows, h_stride lanes apart, and so many panels. `room` has room for one of B.
template <class T>
void expand_panels(const uint32_t* h, long h_stride, const B<T>& b, long rows, long panels, typename T::elem* y,
                   long y_stride, uint32_t* room, Tiles& tiles);

}  // namespace aio
