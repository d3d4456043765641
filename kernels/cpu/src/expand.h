// What an adapter adds to a few rows of a linear: y += B h, with B as a slot holds it, by output.
//
// B is turned first, 16 outputs to a vector, which is then used for every row. Every path adds the products to an output
// one after the other, by rank: so a row's bits do not depend on how many rows there are.
#pragma once

#include "transpose.h"

namespace aio {

// Lane i of the result is the sum of v[i]'s lanes: a transposition in which halves are added on the way.
inline vf sums(const vf (&v)[16]) {
#if defined(AIO_SHUFFLE)
  vf a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    a[i] = __builtin_shufflevector(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#pragma GCC unroll 8
  for (int i = 0; i < 4; i++)
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 8
  for (int i = 0; i < 2; i++)
    c[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#else
  vf out;
  for (int i = 0; i < 16; i++) out[i] = sum(v[i]);
  return out;
#endif
}

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
void turn(const B<T>& b, long rows, uint32_t* out) {
  if (!b.int8) return transpose<T>((const typename T::elem*)b.at, b.rank, b.rank, rows, out);
  constexpr long TIMES = Int8::PER_LANE / T::PER_LANE;
  const long words = (b.rank + Int8::PER_LANE - 1) / Int8::PER_LANE;
  uint32_t* const bytes = out + words * (TIMES - 1) * LANES;  // at the end, so that they are read before they are written over
  transpose<Int8>((const int8_t*)b.at, b.rank, b.rank, rows, bytes);
  for (long i = 0; i < words; i++) {
    vu wide[TIMES];
    widen<T>(load(bytes + i * LANES), wide);
    for (long j = 0; j < TIMES; j++) store(out + (i * TIMES + j) * LANES, wide[j]);
  }
}

#if defined(AIO_SHUFFLE)
// y += B h for R rows and so many panels: B, of elements of type E and of whole lanes of these, is turned in registers.
template <class T, class E, int R>
inline void expand_rows(const uint32_t* h, long h_stride, const B<T>& b, long panels, typename T::elem* y,
                        long y_stride) {
  constexpr int TIMES = E::PER_LANE / T::PER_LANE;
  const uint32_t* row = (const uint32_t*)b.at;
  const long lanes = b.rank / E::PER_LANE;
  for (long p = 0; p < panels; p++, row += LANES * lanes, y += LANES) {
    vf acc[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[r] = T::load16(y + r * y_stride);
    // A lane of E is `TIMES` of h.
    const auto add_lane = [&](long k, vu w) {
      vu wide[TIMES];
      if constexpr (TIMES == 1)
        wide[0] = w;
      else
        widen<T>(w, wide);
#pragma GCC unroll 4
      for (int i = 0; i < TIMES; i++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r] = T::dot(acc[r], splat(h[r * h_stride + k * TIMES + i]), wide[i]);
    };
    long k = 0;
    for (; k + 8 <= lanes; k += 8) {
      vu w[8];
      transpose8(row + k, lanes, w);
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) add_lane(k + j, w[j]);
    }
    const auto add = [&](auto& w, int count) {
#pragma GCC unroll 4
      for (int j = 0; j < count; j++) add_lane(k + j, w[j]);
    };
    if (k + 4 == lanes) {
      vu w[4];
      transpose4(row + k, lanes, w);
      add(w, 4);
    } else if (lanes == 2) {
      vu w[2];
      transpose_all(row, w);
      add(w, 2);
    } else if (lanes == 1) {
      vu w[1];
      transpose_all(row, w);
      add(w, 1);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) T::store16(y + r * y_stride, acc[r]);
  }
}
#endif

// For any rank, and compilers that cannot turn vectors in registers.
template <class T, int R>
void expand_turned(const uint32_t* h, long h_stride, const B<T>& b, long panels, typename T::elem* y, long y_stride,
                   uint32_t* turned) {
  for (long p = 0; p < panels; p++, y += LANES) {
    turn(b.from(p * LANES), LANES, turned);
    vf acc[R];
    for (int r = 0; r < R; r++) acc[r] = T::load16(y + r * y_stride);
    for (long k = 0; k < b.lanes; k++)
      for (int r = 0; r < R; r++) acc[r] = T::dot(acc[r], splat(h[r * h_stride + k]), load(turned + k * LANES));
    for (int r = 0; r < R; r++) T::store16(y + r * y_stride, acc[r]);
  }
}

// y += B h for `rows` rows, h_stride lanes apart, and so many panels. `turned` has room for one of B. E is the type of
// B's elements.
template <class T, class E>
void expand_panels_of(const uint32_t* h, long h_stride, const B<T>& b, long rows, long panels, typename T::elem* y,
                   long y_stride, uint32_t* turned) {
  // Taken 8 at a time; where rows of B have not so many, 4 at the end, or all if they are one or two.
  const long lanes = b.rank / E::PER_LANE;
  const bool as_it_lies = b.rank % E::PER_LANE == 0 && (lanes % 4 == 0 || lanes <= 2);
  for (long r = 0; r < rows; r += 8, h += 8 * h_stride, y += 8 * y_stride) {
#if defined(AIO_SHUFFLE)
    if (as_it_lies) {
#define CALL(R) expand_rows<T, E, R>(h, h_stride, b, panels, y, y_stride)
      AIO_SWITCH_ROWS(rows - r, CALL)
#undef CALL
      continue;
    }
#endif
#define CALL(R) expand_turned<T, R>(h, h_stride, b, panels, y, y_stride, turned)
    AIO_SWITCH_ROWS(rows - r, CALL)
#undef CALL
  }
}

template <class T>
void expand_panels(const uint32_t* h, long h_stride, const B<T>& b, long rows, long panels, typename T::elem* y,
                   long y_stride, uint32_t* turned) {
  if (b.int8)
    expand_panels_of<T, Int8>(h, h_stride, b, rows, panels, y, y_stride, turned);
  else
    expand_panels_of<T, T>(h, h_stride, b, rows, panels, y, y_stride, turned);
}

}  // namespace aio
