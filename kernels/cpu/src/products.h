// The products of the tiles of tiles.h, for each type of weights.
#pragma once

#include <utility>

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
  using Sums = typename Steps<T>::Sums;
  static constexpr long STEP = 1;  // lanes that are read together

  static long words(long k) { return k / T::PER_LANE * LANES; }

  // Adds the products of lanes begin..end-1 of R rows, laid out, and of C registers of columns, from `first` on; panels are
  // so many words apart.
  template <int R, int C>
  static inline void multiply(const uint32_t* x, long x_stride, const uint32_t* w, long panel, int first, long begin,
                              long end, FetchSteps fetch, Sums (&sums)[R][C]) {
    w += first / PER_VECTOR * panel + first % PER_VECTOR * WIDTH;
    for (long k = begin; k < end; k++, fetch.from += fetch.step) {
      __builtin_prefetch(fetch.from, 0, 2);
      __builtin_prefetch(fetch.from + fetch.second, 0, 2);
      const auto row = [&](int r) { return x + r * x_stride + k * Steps<T>::COUNT; };
      const auto column = [&](int c) {
        return load_register<ru>(w + c / PER_VECTOR * panel + k * LANES + c % PER_VECTOR * WIDTH);
      };
      add_products<T, R, C>(row, column, sums);
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
  constexpr int COLUMNS = P * PER_VECTOR, SOME = at_once(R, COLUMNS);
  using Register = typename Panel<T>::Sums;
  const long lanes = l.k / T::PER_LANE, panel = Panel<T>::words(l.k);
  long stride = l.x_stride / T::PER_LANE;
  const uint32_t* x = (const uint32_t*)l.x + row * stride;
  if constexpr (Steps<T>::COUNT > 1) {
    const long words = lanes * Steps<T>::COUNT;
    uint32_t* const wide = room<LAID_OUT>(ROWS * words * long(sizeof(uint32_t)));
    for (int r = 0; r < R; r++) lay_out<T>(x + r * stride, lanes, wide + r * words);
    x = wide, stride = words;
  }
  typename T::acc all[R][P];
  for (int first = 0; first < COLUMNS; first += SOME) {
    Register acc[R][SOME];
#pragma GCC unroll 16
    for (int c = 0; c < SOME; c++) {
      Register start = {};
      if (l.start != nullptr) std::memcpy(&start, l.start + column + (first + c) * WIDTH, sizeof start);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r][c] = start;  // unrolled, or it becomes a call that clears memory
    }
    const long rate = fetcher.twice() ? 2 : 1;
    for (long k = 0, until; k < lanes; k = until) {
      long count;
      const char* from = fetcher.take((lanes - k) * rate, count);
      const FetchSteps fetch =
          count > 0 ? FetchSteps{from, rate * 64, (rate - 1) * 64} : FetchSteps{(const char*)x, 0, 0};
      // Lines that are too few for a step ask for their neighbours as well.
      until = count > 0 ? k + (count + rate * Panel<T>::STEP - 1) / (rate * Panel<T>::STEP) * Panel<T>::STEP : lanes;
      Panel<T>::template multiply<R, SOME>(x, stride, w, panel, first, k, until, fetch, acc);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int c = 0; c < SOME; c++)
        std::memcpy((char*)&all[r] + (first + c) * sizeof(Register), &acc[r][c], sizeof(Register));
  }
  if (sums == nullptr) return store_scaled(l, all, row, column);
  for (int p = 0; p < P; p++)
    for (int r = 0; r < R; r++) sums[p][r] = to_float(all[r][p]);
}

// The tiles of 1 to as many rows.
template <class T, int P, int... R>
constexpr void fill(Products (&tiles)[ROWS], std::integer_sequence<int, R...>) {
  ((tiles[R] = products<T, R + 1, P>), ...);
}

// Fewer panels than usual are rare: not worth as many kinds of tiles.
template <class T>
constexpr Multiply all_tiles() {
  Multiply all{T::PER_LANE, {}};
  fill<T, 1>(all.tile[0], std::make_integer_sequence<int, FEW_ROWS>{});
  fill<T, 2>(all.tile[1], std::make_integer_sequence<int, FEW_ROWS>{});
  fill<T, 3>(all.tile[2], std::make_integer_sequence<int, ROWS>{});
  return all;
}

template <class T>
constexpr Multiply MULTIPLY = all_tiles<T>();

}  // namespace aio
