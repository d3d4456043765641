// Adapters added to rows of a linear; expand.h says how.
#include "expand.h"

#include "transpose.h"

namespace aio {

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

namespace {

#if defined(AIO_SHUFFLE) && defined(__AVX512F__)
#define AIO_TURN_IN_REGISTERS 1
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

// For any rank, and machines whose registers cannot hold what is turned.
template <class T, int R>
void expand_turned(const uint32_t* h, long h_stride, const B<T>& b, long panels, typename T::elem* y, long y_stride,
                   uint32_t* turned) {
  for (long p = 0; p < panels; p++, y += LANES) {
    turn(b.from(p * LANES), LANES, turned);
    vf acc[R];
    for (int r = 0; r < R; r++) acc[r] = T::load16(y + r * y_stride);
    add_lanes<T, R>(h, h_stride, turned, b.lanes, acc);
    for (int r = 0; r < R; r++) T::store16(y + r * y_stride, acc[r]);
  }
}

// y += B h for `rows` rows, h_stride lanes apart, and so many panels. `turned` has room for one of B. E is the type of
// B's elements.
template <class T, class E>
void expand_panels_of(const uint32_t* h, long h_stride, const B<T>& b, long rows, long panels, typename T::elem* y,
                   long y_stride, uint32_t* turned) {
  // Lanes are taken 8 at a time; where rows of B have not so many, 4 at the end, or all if they are one or two.
  [[maybe_unused]] const long lanes = b.rank / E::PER_LANE;
  [[maybe_unused]] const bool as_it_lies = b.rank % E::PER_LANE == 0 && (lanes % 4 == 0 || lanes <= 2);
  // Rows, as many as have room; for more of float32 and int8 it is too much code.
  constexpr long MOST = E::PER_LANE / T::PER_LANE == 4 && most_rows() > 4 ? 4 : most_rows();
  for (long r = 0; r < rows; r += MOST, h += MOST * h_stride, y += MOST * y_stride) {
    const long count = rows - r < MOST ? rows - r : MOST;
#if defined(AIO_TURN_IN_REGISTERS)
    if (as_it_lies) {
#define CALL(R) expand_rows<T, E, R <= MOST ? R : 1>(h, h_stride, b, panels, y, y_stride)
      AIO_SWITCH_ROWS(count, CALL)
#undef CALL
      continue;
    }
#endif
#define CALL(R) expand_turned<T, R <= MOST ? R : 1>(h, h_stride, b, panels, y, y_stride, turned)
    AIO_SWITCH_ROWS(count, CALL)
#undef CALL
  }
}

}  // namespace

template <class T>
void expand_panels(const uint32_t* h, long h_stride, const B<T>& b, long rows, long panels, typename T::elem* y,
                   long y_stride, uint32_t* turned) {
  if (b.int8)
    expand_panels_of<T, Int8>(h, h_stride, b, rows, panels, y, y_stride, turned);
  else
    expand_panels_of<T, T>(h, h_stride, b, rows, panels, y, y_stride, turned);
}

template void turn(const B<Bf16>&, long, uint32_t*);
template void turn(const B<F32>&, long, uint32_t*);
template void expand_panels(const uint32_t*, long, const B<Bf16>&, long, long, Bf16::elem*, long, uint32_t*);
template void expand_panels(const uint32_t*, long, const B<F32>&, long, long, F32::elem*, long, uint32_t*);

}  // namespace aio
