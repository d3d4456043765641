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

// Whether two rows and two columns are multiplied at once.
template <class T>
constexpr bool IN_PAIRS = false;
#if defined(__ARM_FEATURE_MATMUL_INT8)
template <>
constexpr bool IN_PAIRS<Int8> = true;
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
constexpr bool IN_PAIRS<Bf16> = true;
#endif

// How a panel of T's lanes is stored: as it is. (int4.cpp has one that is not.)
template <class T>
struct Panel {
  using Sums = typename Steps<T>::Sums;
  static constexpr long STEP = IN_PAIRS<T> ? 2 : 1;  // lanes that are read together

  static long words(long k) { return k / T::PER_LANE * LANES; }

  // Adds the products of lanes begin..end-1 of R rows, laid out, and of C registers of columns, from `first` on; panels are
  // so many words apart.
  template <int R, int C>
  static inline void multiply(const uint32_t* x, long x_stride, const uint32_t* w, long panel, int first, long begin,
                              long end, FetchSteps fetch, Sums (&sums)[R][C]) {
    w += first / PER_VECTOR * panel + first % PER_VECTOR * WIDTH;
    const auto column = [&](int c, long k) {
      return load_register<ru>(w + c / PER_VECTOR * panel + k * LANES + c % PER_VECTOR * WIDTH);
    };
    const auto prefetch = [&] {
      __builtin_prefetch(fetch.from, 0, 2);
      __builtin_prefetch(fetch.from + fetch.second, 0, 2);
      fetch.from += fetch.step;
    };
#if defined(__aarch64__)
    if constexpr (IN_PAIRS<T> && R > 1) begin = add_pairs<R, C>(x, x_stride, begin, end, column, prefetch, sums);
#endif
    for (long k = begin; k < end; k++) {
      prefetch();
      const auto row = [&](int r) { return x + r * x_stride + k * Steps<T>::COUNT; };
      add_products<T, R, C>(row, [&](int c) { return column(c, k); }, sums);
    }
  }
};

static inline vf to_float(vf v) { return v; }
static inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }

// `rows` may be a constant; sums(r, p) gives sums of a row and panel.
template <class Out, int P, class Rows, class Sums>
inline void store_scaled(const Linear& l, Rows rows, long row, long column, const Sums& sums) {
  using elem = typename Out::elem;
  const auto left = [&](int p) { return l.n - column - p * LANES; };
  vf scale[P], bias[P];
  for (int p = 0; p < P; p++) {
    scale[p] = l.column_scale != nullptr ? loadf(l.column_scale + column + p * LANES) : vf{};
    bias[p] = l.bias != nullptr ? load_some<Out>((const elem*)l.bias + column + p * LANES, left(p)) : vf{};
  }
  for (int r = 0; r < rows; r++) {
    elem* const to = (elem*)l.y + (row + r) * l.y_stride + column;
    vf y[P];
    for (int p = 0; p < P; p++) {
      y[p] = to_float(sums(r, p));
      if (l.column_scale != nullptr) y[p] *= scale[p] * (l.row_scale != nullptr ? l.row_scale[row + r] : 1.0f);
      if (l.bias != nullptr) y[p] += bias[p];
    }
    if (P == 2 && left(1) >= LANES) {
      Out::store32(to, y[0], y[P - 1]);
    } else {
      for (int p = 0; p < P; p++) store_some<Out>(to + p * LANES, y[p], left(p));
    }
  }
}

template <int P, class Rows, class Sums>
inline void store_scaled(const Linear& l, Rows rows, long row, long column, const Sums& sums) {
  l.bf16 ? store_scaled<Bf16, P>(l, rows, row, column, sums) : store_scaled<F32, P>(l, rows, row, column, sums);
}

// Products for R rows and P panels.
template <class T, int R, int P>
void products(const Linear& l, const uint32_t* w, Fetcher& fetcher, long row, long column) {
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
    const long rate = fetcher.rate() > 1 ? 2 : 1;
    for (long k = 0, until; k < lanes; k = until) {
      long count;
      const char* from = fetcher.take((lanes - k) * rate, count);
      const FetchSteps fetch =
          count > 0 ? FetchSteps{from, rate * 64, (rate - 1) * 64} : FetchSteps{(const char*)x, 0, 0};
      // Lines that are too few for a step ask for their neighbours as well.
      const long steps = (count + rate * Panel<T>::STEP - 1) / (rate * Panel<T>::STEP) * Panel<T>::STEP;
      until = count > 0 && k + steps < lanes ? k + steps : lanes;
      Panel<T>::template multiply<R, SOME>(x, stride, w, panel, first, k, until, fetch, acc);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int c = 0; c < SOME; c++)
        std::memcpy((char*)&all[r] + (first + c) * sizeof(Register), &acc[r][c], sizeof(Register));
  }
  store_scaled<P>(l, std::integral_constant<int, R>{}, row, column, [&](int r, int p) { return all[r][p]; });
}

// Fewer panels than usual are rare: not worth as many kinds of tiles.
template <class T, int P>
constexpr int MOST = P == PANELS ? ROWS : FEW_ROWS;

template <class T, int P>
void some_products(const Linear& l, const uint32_t* w, Tools& tools, long row, long rows, long column) {
#define CALL(R) products<T, R <= MOST<T, P> ? R : 1, P>(l, w, tools.fetcher, row, column)
  AIO_SWITCH_ROWS(rows, CALL)
#undef CALL
}

template <class T, int... P>
constexpr Multiply multiply_panels(std::integer_sequence<int, P...>) {
  return {T::PER_LANE, 1, {MOST<T, P + 1>...}, {some_products<T, P + 1>...}};
}
template <class T>
constexpr Multiply MULTIPLY = multiply_panels<T>(std::make_integer_sequence<int, PANELS>{});

#if defined(AIO_TILES)
// Fetches lines into the first cache.
template <int COUNT>
inline __attribute__((always_inline)) void fetch_near(const void* from, long stride) {
  asm volatile("" : "+r"(from));  // or each line's address is kept where registers are short
  for (int i = 0; i < COUNT; i++) __builtin_prefetch((const char*)from + i * stride, 0, 3);
}

// The same in tile registers, for H of these in height and P panels.
template <class T, int H, int P>
void products_of_registers(const Linear& l, const uint32_t* w, Fetcher& fetcher, long row, long column,
                           typename T::acc (*sums)[MOST_ROWS]) {
  constexpr long AHEAD = 4 * LANES;  // weights that are fetched are used so many lanes later, which may be the next panels'
  const long lanes = l.k / T::PER_LANE, panel = lanes * LANES;
  const long stride = l.x_stride / T::PER_LANE * long(sizeof(uint32_t)), rate = fetcher.rate();
  const uint32_t* const x = (const uint32_t*)((const char*)l.x + row * stride);
  unrolled<H * P>([&](auto i) {
    if (l.start != nullptr)
      load_tile<i>(l.start + column + i % P * LANES, 0);  // the same for all rows
    else
      zero_tile<i>();
  });
  // Operands come into the first cache between the products of those before: loads of whole registers would wait for them.
  const uint32_t* const next_rows = (const uint32_t*)((const char*)x + H * TILE_ROWS * stride);
  const uint32_t* const next_weights = row + H * TILE_ROWS < l.rows ? w : w + P * panel;
  // Nor may stores wait for lines of y, which other threads have read.
  const long y_bytes = l.y_stride * (l.bf16 ? 2 : 4), each = (H * TILE_ROWS * LANES + lanes - 1) / lanes;
  const char* y = (const char*)l.y + row * y_bytes + column * (l.bf16 ? 2 : 4);
  const char* const y_end = y + H * TILE_ROWS * y_bytes;
  for (long k = 0; k < lanes; k += LANES) {
    fetcher.fetch(rate);
    for (long i = 0; i < each && y < y_end; i++, y += y_bytes) __builtin_prefetch(y, 1, 3);
    const uint32_t* const left = k + LANES == lanes ? next_rows : x + k + LANES;
    const uint32_t* const right = (k + AHEAD < lanes ? w : next_weights - lanes * LANES) + (k + AHEAD) * LANES;
    unrolled<H>([&](auto h) { load_tile<LEFT + h>((const char*)(x + k) + h * TILE_ROWS * stride, stride); });
    unrolled<P>([&](auto p) { load_tile<RIGHT + p>(w + p * panel + k * LANES, TILE_BYTES); });
    unrolled<H * P>([&](auto i) {
      constexpr int h = i / P, p = i % P;
      multiply_tiles<T, i, LEFT + h, RIGHT + p>();
      fetch_near<LANES / H>(right + p * panel + h * LANES / H * LANES, TILE_BYTES);
      fetch_near<LANES / P>((const char*)left + (h * TILE_ROWS + p * LANES / P) * stride, stride);
    });
  }
  unrolled<H * P>([&](auto i) { store_tile<i>(&sums[i % P][i / P * TILE_ROWS], TILE_BYTES); });
}

template <class T, int P>
void products_of_tiles(const Linear& l, const uint32_t* w, Tools& tools, long row, long rows, long column) {
  alignas(64) typename T::acc sums[P][MOST_ROWS];
  tools.tiles.use(int(rows < TILE_ROWS ? rows : TILE_ROWS));
  (rows > TILE_ROWS ? products_of_registers<T, 2, P> : products_of_registers<T, 1, P>)(l, w, tools.fetcher, row, column, sums);
  store_scaled<P>(l, rows, row, column, [&](int r, int p) { return sums[p][r]; });
}

// Whether as many inputs are whole registers.
template <class T>
constexpr bool fills_tiles(long k) {
  return k % (LANES * T::PER_LANE) == 0;
}

template <class T>
constexpr Multiply MULTIPLY_TILES{
    T::PER_LANE, LANES, {MOST_ROWS, MOST_ROWS}, {products_of_tiles<T, 1>, products_of_tiles<T, 2>}};
#endif

}  // namespace aio
