// The packed linear, which all kinds of weights share.
//
// Packed weights are panels of 16 output columns: [ceil(N / 16)][K lanes][16 lanes], zero where N ends. A
// tile of up to 8 rows by 3 panels is kept in registers of AVX-512: 24 accumulators, and each weight that is
// loaded is used for every row. (Tiling as in Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", 2008.) Other machines have room for fewer rows, and for a part of the panels at a time (registers.h).
//
// Where a CPU has tile registers (tile_registers.h), a tile is up to 32 rows by 2 panels, as two by two of these, whose right
// operands are 16 lanes of a panel as they lie. Two by three would leave one register for each side, which are then loaded seven
// times for six products: where a core's other thread works too, no load runs beside a product.
//
// A tile's products are in products.h; which thread computes what, and what the adapters add, is in tiles.cpp.
#pragma once

#include "fetcher.h"
#include "registers.h"
#include "team.h"
#include "tile_registers.h"

namespace aio {

constexpr int ROWS = most_rows();
constexpr int FEW_ROWS = ROWS < 4 ? ROWS : 4;  // of a tile of fewer panels
#if defined(AIO_TILES)
constexpr int MOST_ROWS = 2 * TILE_ROWS, PANELS = 2;  // in tile registers
#else
constexpr int MOST_ROWS = ROWS, PANELS = 3;
#endif

// What there is to compute: y = x W^T, times a scale of each row and column if there are such, plus a bias if there
// is one. x [rows, k] has elements of the tile's type, y [rows, n] of the output's.
struct Linear {
  bool bf16;  // the type of y, else float32
  const void* x;
  long x_stride;  // in elements
  const void* bias;
  void* y;
  long y_stride;
  long rows, n, k;
  const float *row_scale, *column_scale;  // may be null, row_scale alone too; column_scale has room for whole panels
  const int32_t* start;                   // what the sums of each column begin with; null: zero
};

// What a thread has while it computes tiles.
struct Tools {
  Fetcher fetcher;
  Tiles tiles;
};

// Computes a tile of y, from `row` and `column` on; `w` are the panels' weights.
using Products = void (*)(const Linear& l, const uint32_t* w, Tools& tools, long row, long rows, long column);

// How weights of a type are multiplied.
struct Multiply {
  long per_lane;           // elements
  long together;           // lanes: more than one in tile registers
  long most[PANELS];       // rows of a tile, by the number of panels
  Products tile[PANELS];

  // How many of the rows that are left to compute at once: registers of tiles are full, or hold the last rows.
  long rows(long left, long panels) const {
    long some = most[panels - 1];
    while (some > left && some > LANES) some /= 2;
    return some < left ? some : left;
  }
};

// Those that are compiled once: T is Bf16 or F32 (linear.cpp) or Int8 (quantized.cpp). Where sums are rounded, the number of
// rows may not decide which it is, or a row's bits depended on it.
template <class T>
const Multiply& multiply(const Linear& l);

// Weights as they lie in memory, panel after panel; begin null: in no way that could be fetched early.
struct Stored {
  const void* begin;
  long panel_bytes;
};

// Gives the weights of so many panels, as they are multiplied. `of` is what it takes them from.
using Unpack = const uint32_t* (*)(const void* of, long first, long panels);

// Computes a thread's share of a linear, with what the adapters add. Out is the type of y.
template <class Out>
void compute_share(const Member& me, const Linear& l, const Beside& beside, const Multiply& multiply,
                   const Stored& stored, Unpack unpack, const void* of);

// The same with a lambda: weights(first, panels).
template <class Out, class Weights>
void compute_share(const Member& me, const Linear& l, const Beside& beside, const Multiply& multiply,
                   const Stored& stored, const Weights& weights) {
  const Unpack unpack = [](const void* of, long first, long panels) { return (*(const Weights*)of)(first, panels); };
  compute_share<Out>(me, l, beside, multiply, stored, unpack, &weights);
}

// Rows of x and y that are sorted by expert, whose weights are one below the other. Without `begin` there are none.
struct Experts {
  const int32_t* begin;  // [count + 1] the first row of each
  long count;
};

// The same for linears of which each row takes one expert's; `l` is that of all rows, with an expert's outputs. The
// experts' rows lie in y apart from each other, so nobody has to wait between them.
template <class Out, class Weights>
void compute_experts(const Member& me, const Linear& l, const Beside& beside, const Experts& experts,
                     const Multiply& multiply, const Stored& stored, const Weights& weights) {
  if (experts.begin == nullptr) return compute_share<Out>(me, l, beside, multiply, stored, weights);
  const auto at = [](const auto* p, long i) { return p == nullptr ? nullptr : p + i; };
  const long panels = l.n / LANES, x_bytes = l.x_stride * long(sizeof(uint32_t)) / multiply.per_lane;
  const long y_bytes = l.y_stride * long(sizeof(typename Out::elem));
  for (long e = 0, next; e < experts.count; e = next) {
    for (next = e + 1; next < experts.count && experts.begin[next] == experts.begin[next + 1];) next++;
    const long row = experts.begin[e], rows = experts.begin[e + 1] - row, first = e * panels;
    if (rows == 0) continue;
    const auto place = [&](long expert) { return at((const char*)stored.begin, expert * panels * stored.panel_bytes); };
    Linear own = l;
    own.x = (const char*)l.x + row * x_bytes, own.y = (char*)l.y + row * y_bytes, own.rows = rows;
    own.bias = at((const typename Out::elem*)l.bias, e * l.n);
    own.row_scale = at(l.row_scale, row), own.column_scale = at(l.column_scale, e * l.n), own.start = at(l.start, e * l.n);
    const Panels after{next < experts.count ? place(next) : nullptr, l.n, stored.panel_bytes};
    const auto mine = [&](long from, long many) { return weights(first + from, many); };
    compute_share<Out>(me, own, {nullptr, 0, nullptr, after}, multiply, {place(e), stored.panel_bytes}, mine);
  }
}

}  // namespace aio
