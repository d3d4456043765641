// The products of the tiles of tiles.h, for each type of weights.
#pragma once

#include "tiles.h"

namespace aio {

// Memory to fetch during some steps of the inner loop: how many bytes from step to step, and from a step's first line to
// its second. They are zero where there is nothing to fetch: then a line that is there already is asked for, which costs
// less than a loop of its own.
struct FetchSteps {
  const char* from;
  long step, second;
};

// How a panel of T's lanes is stored: as it is. (int4.cpp has one that is not.)
template <class T>
struct Panel {
  static constexpr long STEP = 1;  // lanes that are read together

  static long words(long k) { return k / T::PER_LANE * LANES; }

  // acc += x W over lanes begin..end-1; panels are so many words apart.
  template <int R, int P>
  static inline void multiply(const uint32_t* x, long x_stride, const uint32_t* w, long panel, long begin, long end,
                              FetchSteps fetch, typename T::acc (&acc)[R][P]) {
    for (long k = begin; k < end; k++, fetch.from += fetch.step) {
      vu b[P];
      for (int p = 0; p < P; p++) b[p] = load(w + p * panel + k * LANES);
      __builtin_prefetch(fetch.from, 0, 2);
      __builtin_prefetch(fetch.from + fetch.second, 0, 2);
      for (int r = 0; r < R; r++) {
        const vu a = splat(x[r * x_stride + k]);
        for (int p = 0; p < P; p++) acc[r][p] = T::dot(acc[r][p], a, b[p]);
      }
    }
  }
};

static inline vf to_float(vf v) { return v; }
static inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }

template <class V, int R, int P>
inline void store_scaled(const Linear& l, const V (&sums)[R][P], long row, long column) {
  for (int p = 0; p < P; p++) {
    const vf scale = l.column_scale != nullptr ? loadf(l.column_scale + column + p * LANES) : vf{};
    for (int r = 0; r < R; r++) {
      vf y = to_float(sums[r][p]);
      if (l.column_scale != nullptr) y *= scale * (l.row_scale != nullptr ? l.row_scale[row + r] : 1.0f);
      const long at = (row + r) * l.y_stride + column + p * LANES;
      l.bf16 ? Bf16::store16((uint16_t*)l.y + at, y) : F32::store16((float*)l.y + at, y);
    }
  }
}

// Products for R rows and P panels.
template <class T, int R, int P>
void products(const Linear& l, const uint32_t* w, Fetcher& fetcher, long row, long column, vf (*sums)[ROWS]) {
  const long lanes = l.k / T::PER_LANE, panel = Panel<T>::words(l.k), stride = l.x_stride / T::PER_LANE;
  const uint32_t* x = (const uint32_t*)l.x + row * stride;
  typename T::acc acc[R][P];
#pragma GCC unroll 3
  for (int p = 0; p < P; p++) {
    typename T::acc start = {};
    if (l.start != nullptr) std::memcpy(&start, l.start + column + p * LANES, sizeof start);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[r][p] = start;  // unrolled, or it becomes a call that clears memory
  }
  const long rate = fetcher.twice() ? 2 : 1;
  for (long k = 0, until; k < lanes; k = until) {
    long count;
    const char* from = fetcher.take((lanes - k) * rate, count);
    const FetchSteps fetch =
        count > 0 ? FetchSteps{from, rate * 64, (rate - 1) * 64} : FetchSteps{(const char*)x, 0, 0};
    // Lines that are too few for a step ask for their neighbours as well.
    until = count > 0 ? k + (count + rate * Panel<T>::STEP - 1) / (rate * Panel<T>::STEP) * Panel<T>::STEP : lanes;
    Panel<T>::template multiply<R, P>(x, stride, w, panel, k, until, fetch, acc);
  }
  if (sums == nullptr) return store_scaled(l, acc, row, column);
  for (int p = 0; p < P; p++)
    for (int r = 0; r < R; r++) sums[p][r] = to_float(acc[r][p]);
}

// Fewer panels than usual are rare: not worth as many kinds of tiles.
template <class T>
constexpr Multiply MULTIPLY = {
    T::PER_LANE,
    {{products<T, 1, 1>, products<T, 2, 1>, products<T, 3, 1>, products<T, 4, 1>},
     {products<T, 1, 2>, products<T, 2, 2>, products<T, 3, 2>, products<T, 4, 2>},
     {products<T, 1, 3>, products<T, 2, 3>, products<T, 3, 3>, products<T, 4, 3>, products<T, 5, 3>, products<T, 6, 3>,
      products<T, 7, 3>, products<T, 8, 3>}}};

}  // namespace aio
