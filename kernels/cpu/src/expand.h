// What an adapter adds to a few rows of a linear: y += B h, with B as a slot holds it, by output.
//
// For a few rows the products are taken along the ranks and their lanes added up: then B is read once and as it lies.
// For more, B is turned first, 16 outputs to a vector, which is then used for every row.
#pragma once

#include "transpose.h"

namespace aio {

constexpr long FEW_ROWS = 1;

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

// Lanes 0..3, 4..7, ... of the result are rows 0..3, 4..7, ...: lane i is the sum of the lower half of v[i]'s lanes, and
// lane 8 + i of the upper half.
inline vf half_sums(const vf (&v)[8]) {
#if defined(AIO_SHUFFLE)
  vf a[4], b[2];
#pragma GCC unroll 8
  for (int i = 0; i < 4; i++)
    a[i] = __builtin_shufflevector(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 8
  for (int i = 0; i < 2; i++)
    b[i] = __builtin_shufflevector(a[i], a[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a[i], a[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(b[0], b[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(b[0], b[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#else
  vf out = {};
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) out[i] += v[i][j], out[8 + i] += v[i][8 + j];
  return out;
#endif
}

typedef uint32_t half __attribute__((vector_size(32)));

inline half load_half(const uint32_t* p) {
  half v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline vu join(half low, half high) {
#if defined(AIO_SHUFFLE)
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  vu v;
  std::memcpy(&v, &low, sizeof low);
  std::memcpy((char*)&v + sizeof low, &high, sizeof high);
  return v;
#endif
}

// Of 16 rows, the sums of the products of 4 lanes.
template <class T>
inline vf quarter_sums(const uint32_t* h, const uint32_t* rows, long stride) {
#if defined(AIO_SHUFFLE)
  const vu x = every_fourth(h, 0, 0);
  vf acc[4], turned[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) acc[i] = T::dot(vf{}, x, every_fourth(rows, stride, i));
  transpose_groups(acc, turned);
  return (turned[0] + turned[1]) + (turned[2] + turned[3]);
#else
  vf total = {};
  for (int k = 0; k < 4; k++) {
    vu lane;
    for (int i = 0; i < LANES; i++) lane[i] = rows[i * stride + k];
    total = T::dot(total, splat(h[k]), lane);
  }
  return total;
#endif
}

// A matrix B from one of its rows on: rows `stride` lanes apart, of which an adapter's rank takes up `lanes`.
template <class T>
struct B {
  const typename T::elem* at;
  long stride, lanes, rank;
};

// y += B h for one row and so many panels, products along the ranks. `lanes` is a multiple of 4 that B has; what is
// beyond the adapter's rank is zero.
template <class T>
inline void expand_row(const uint32_t* h, const B<T>& b, long lanes, long panels, typename T::elem* y) {
  const uint32_t* row = (const uint32_t*)b.at;
  const long whole = lanes - lanes % LANES, quarter = lanes % 8 == 4 ? lanes - 4 : lanes;
  const vu tail = quarter > whole ? join(load_half(h + whole), load_half(h + whole)) : vu{};
  for (long p = 0; p < panels; p++, row += LANES * b.stride) {
    vf total = T::load16(y + p * LANES);
    if (whole > 0) {
      vf acc[LANES];
      const vu first = load(h);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) acc[i] = T::dot(vf{}, first, load(row + i * b.stride));
      for (long k = LANES; k < whole; k += LANES) {
        const vu x = load(h + k);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) acc[i] = T::dot(acc[i], x, load(row + i * b.stride + k));
      }
      total += sums(acc);
    }
    if (quarter > whole) {
      vf acc[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        const uint32_t* at = row + i * b.stride + whole;
        acc[i] = T::dot(vf{}, tail, join(load_half(at), load_half(at + 8 * b.stride)));
      }
      total += half_sums(acc);
    }
    if (lanes > quarter) total += quarter_sums<T>(h + quarter, row + quarter, b.stride);
    T::store16(y + p * LANES, total);
  }
}

#if defined(AIO_SHUFFLE)
// The same for R rows: B is turned in registers, 16 outputs to a vector, and each vector is used for all rows.
template <class T, int R>
inline void expand_rows(const uint32_t* h, long h_stride, const B<T>& b, long lanes, long panels, typename T::elem* y,
                        long y_stride) {
  constexpr int CHAINS = R <= 4 ? 2 : 1;  // sums side by side, so that products do not wait for one another
  const uint32_t* row = (const uint32_t*)b.at;
  for (long p = 0; p < panels; p++, row += LANES * b.stride, y += LANES) {
    vf acc[R][CHAINS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      acc[r][0] = T::load16(y + r * y_stride);
      if (CHAINS == 2) acc[r][CHAINS - 1] = vf{};
    }
    long k = 0;
    for (; k + 8 <= lanes; k += 8) {
      vu w[8];
      transpose8(row + k, b.stride, w);
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
          acc[r][j % CHAINS] = T::dot(acc[r][j % CHAINS], splat(h[r * h_stride + k + j]), w[j]);
    }
    const auto add = [&](auto& w, int count) {
#pragma GCC unroll 4
      for (int j = 0; j < count; j++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
          acc[r][j % CHAINS] = T::dot(acc[r][j % CHAINS], splat(h[r * h_stride + k + j]), w[j]);
    };
    if (k + 4 == lanes) {
      vu w[4];
      transpose4(row + k, b.stride, w);
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
    for (int r = 0; r < R; r++) T::store16(y + r * y_stride, CHAINS == 2 ? acc[r][0] + acc[r][CHAINS - 1] : acc[r][0]);
  }
}
#endif

// For any rank, and compilers that cannot turn vectors in registers.
template <class T, int R>
void expand_turned(const uint32_t* h, long h_stride, const B<T>& b, long panels, typename T::elem* y, long y_stride,
                   uint32_t* turned) {
  for (long p = 0; p < panels; p++, y += LANES) {
    transpose<T>(b.at + p * LANES * b.stride * T::PER_LANE, b.stride * T::PER_LANE, b.rank, LANES, turned);
    vf acc[R];
    for (int r = 0; r < R; r++) acc[r] = T::load16(y + r * y_stride);
    for (long k = 0; k < b.lanes; k++)
      for (int r = 0; r < R; r++) acc[r] = T::dot(acc[r], splat(h[r * h_stride + k]), load(turned + k * LANES));
    for (int r = 0; r < R; r++) T::store16(y + r * y_stride, acc[r]);
  }
}

// y += B h for `rows` rows, h_stride lanes apart, and so many panels. `turned` has room for one of B.
template <class T>
void expand_panels(const uint32_t* h, long h_stride, const B<T>& b, long rows, long panels, typename T::elem* y,
                   long y_stride, uint32_t* turned) {
  // Taken 8 at a time; where rows of B have not so many, 4 at the end, or all if they are one or two.
  const long by_8 = (b.lanes + 7) / 8 * 8, by_4 = (b.lanes + 3) / 4 * 4;
  const long lanes = by_8 <= b.stride ? by_8 : by_4 <= b.stride ? by_4 : b.stride;
  const bool as_it_lies = lanes % 4 == 0 || lanes <= 2;
  if (as_it_lies && lanes >= 8 && rows <= FEW_ROWS) {
    for (long r = 0; r < rows; r++) expand_row<T>(h + r * h_stride, b, lanes, panels, y + r * y_stride);
    return;
  }
  for (long r = 0; r < rows; r += 8, h += 8 * h_stride, y += 8 * y_stride) {
#if defined(AIO_SHUFFLE)
    if (as_it_lies) {
#define CALL(R) expand_rows<T, R>(h, h_stride, b, lanes, panels, y, y_stride)
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

}  // namespace aio
