// Tiles of the packed linear, which all kinds of weights share.
//
// Packed weights are panels of 16 output columns: [ceil(N / 16)][K lanes][16 lanes], zero where N ends. A
// tile of up to 8 rows by 3 panels is kept in registers: 24 accumulators, and each weight that is
// loaded is used for every row. (Tiling as in Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", 2008.)
#pragma once

#include <vector>

#include "expand.h"
#include "fetcher.h"
#include "team.h"

namespace aio {

constexpr int ROWS = 8, PANELS = 3;
constexpr long ROW_BLOCK = 128;  // rows of x, at most, that stay in the L2 cache while the panels pass by

// What there is to compute: y = x W^T, times a scale of each row and column if there are such, plus a bias if there
// is one. x [rows, k] has elements of the tile's type, y [rows, n] of the output's.
struct Linear {
  const void* x;
  long x_stride;  // in elements
  const void* bias;
  void* y;
  long y_stride;
  long rows, n, k;
  const float *row_scale, *column_scale;  // may be null, row_scale alone too; column_scale has room for whole panels
  const int32_t* start;                   // what the sums of each column begin with; null: zero
};

// What an adapter adds to a tile: its B as lanes [panels][lanes][16], and of each panel where its slice begins in a row
// of h, in lanes; below zero if nothing is added to the panel.
struct Delta {
  const uint32_t *b, *h;
  long panel, h_stride;
  long slice[PANELS], lanes[PANELS];
};

// How a panel of T's lanes is stored: as it is. (int4.cpp has one that is not.)
template <class T>
struct Stored {
  static constexpr long STEP = 1;  // lanes that are read together

  static long words(long k) { return k / T::PER_LANE * LANES; }  // of a panel

  // acc += x W over lanes begin..end-1, fetching FETCH cache lines for each; panels are so many words apart.
  template <int R, int P, int FETCH>
  static inline void multiply(const uint32_t* x, long x_stride, const uint32_t* w, long panel, long begin, long end,
                              const char* fetch, typename T::acc (&acc)[R][P]) {
    for (long k = begin; k < end; k++) {
      vu b[P];
      for (int p = 0; p < P; p++) b[p] = load(w + p * panel + k * LANES);
      for (int f = 0; f < FETCH; f++) __builtin_prefetch(fetch + ((k - begin) * FETCH + f) * 64, 0, 2);
      for (int r = 0; r < R; r++) {
        const vu a = splat(x[r * x_stride + k]);
        for (int p = 0; p < P; p++) acc[r][p] = T::dot(acc[r][p], a, b[p]);
      }
    }
  }
};

static inline vf to_float(vf v) { return v; }
static inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }

// R rows by P panels, from `row` and `column` on; `w` are the panels' weights. Out is the type of y. `delta` may be null.
template <class T, class Out, int R, int P>
void tile(const Linear& l, const uint32_t* w, Fetcher& fetcher, const Delta* delta, long row, long column) {
  using elem = typename Out::elem;
  const long lanes = l.k / T::PER_LANE, panel = Stored<T>::words(l.k), stride = l.x_stride / T::PER_LANE;
  const uint32_t* x = (const uint32_t*)l.x + row * stride;
  typename T::acc acc[R][P];
  for (int p = 0; p < P; p++) {
    typename T::acc start = {};
    if (l.start != nullptr) std::memcpy(&start, l.start + column + p * LANES, sizeof start);
    for (int r = 0; r < R; r++) acc[r][p] = start;
  }
  long k = 0;
  const int rate = fetcher.twice() ? 2 : 1;
  while (k < lanes) {
    long count;
    const char* fetch = fetcher.take((lanes - k) * rate, count);
    if (count == 0) break;
    // Lines that are too few for a step ask for their neighbours as well.
    const long until = k + (count + rate * Stored<T>::STEP - 1) / (rate * Stored<T>::STEP) * Stored<T>::STEP;
    if (rate == 1)
      Stored<T>::template multiply<R, P, 1>(x, stride, w, panel, k, until, fetch, acc);
    else
      Stored<T>::template multiply<R, P, 2>(x, stride, w, panel, k, until, fetch, acc);
    k = until;
  }
  Stored<T>::template multiply<R, P, 0>(x, stride, w, panel, k, lanes, nullptr, acc);
  // All of this is unrolled, or the sums would have to leave the registers.
#pragma GCC unroll 3
  for (int p = 0; p < P; p++) {
    const long first = column + p * LANES, count = l.n - first < LANES ? l.n - first : LANES;
    vf y[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) y[r] = to_float(acc[r][p]);
    if (l.column_scale != nullptr) {
      const vf scale = loadf(l.column_scale + first);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) y[r] *= scale * (l.row_scale != nullptr ? l.row_scale[row + r] : 1.0f);
    }
    if (l.bias != nullptr) {
      elem b[LANES] = {};
      std::memcpy(b, (const elem*)l.bias + first, count * sizeof(elem));
      const vf bias = Out::load16(b);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) y[r] += bias;
    }
    if (delta != nullptr && delta->slice[p] >= 0) {
      const uint32_t* h = delta->h + row * delta->h_stride + delta->slice[p];
      // As where it is added to stored results, because which of the two it is depends on a row's neighbours.
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) y[r] = Out::round16(y[r]);
      for (long k = 0; k < delta->lanes[p]; k++) {
        const vu b = load(delta->b + p * delta->panel + k * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) y[r] = Out::dot(y[r], splat(h[r * delta->h_stride + k]), b);
      }
    }
    elem* out = (elem*)l.y + row * l.y_stride + first;
    if (count == LANES) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) Out::store16(out + r * l.y_stride, y[r]);
    } else {
      for (int r = 0; r < R; r++) {
        elem last[LANES];
        Out::store16(last, y[r]);
        std::memcpy(out + r * l.y_stride, last, count * sizeof(elem));
      }
    }
  }
}

template <class T, class Out, int P>
void row_tiles(const Linear& l, const uint32_t* w, Fetcher& fetcher, const Delta* delta, long begin, long end,
               long column) {
#define CALL(R) tile<T, Out, R, P>(l, w, fetcher, delta, row, column)
  if constexpr (P == PANELS) {
    for (long row = begin; row < end; row += ROWS) AIO_SWITCH_ROWS(end - row, CALL)
  } else {  // fewer panels than usual are rare: not worth as many kinds of tiles
    for (long row = begin; row < end; row += 4) AIO_SWITCH_FEW(end - row, CALL)
  }
#undef CALL
}

// Rows begin..end-1 by up to 3 adjoining panels from `first` on; the thread's next block has the `next` panels after
// these (0: others).
struct Block {
  long begin, end, first, panels, next;

  // Where those lie in weights whose panels take so many bytes each.
  Fetch following(const void* weights, long panel_bytes) const {
    return {(const char*)weights + (first + panels) * panel_bytes, next * panel_bytes};
  }
};

// A thread's blocks: blocks of rows outside, panels inside. It has the same panels of all rows where these can be shared
// out evenly, else a contiguous part of all blocks. Blocks of rows are as even as tiles allow: a last one of a few rows
// would have all weights read for these, and those whose blocks it has would wait for the others.
class Share {
 public:
  Share(const Member& me, long rows, long n) : rows_(rows), panels_(whole(n, LANES)), wide_(whole(panels_, PANELS)) {
    const long blocks = whole(rows, ROW_BLOCK);
    height_ = whole(whole(rows, ROWS), blocks) * ROWS;
    if (wide_ % me.count == 0) {
      wide_ /= me.count;
      left_ = me.index * wide_;
      mine_ = {0, blocks * wide_};
    } else {
      mine_ = me.share(blocks * wide_);
    }
  }

  long count() const { return mine_.end - mine_.begin; }

  Block operator[](long i) const {
    const long at = mine_.begin + i, begin = at / wide_ * height_, first = (left_ + at % wide_) * PANELS;
    const long end = begin + height_ < rows_ ? begin + height_ : rows_;
    const bool adjoins = i + 1 < count() && (at + 1) % wide_ != 0;
    return {begin, end, first, panels(first), adjoins ? panels(first + PANELS) : 0};
  }

 private:
  // From `first` on, at most a block's.
  long panels(long first) const { return panels_ - first < PANELS ? panels_ - first : PANELS; }

  static long whole(long n, long of) { return (n + of - 1) / of; }

  long rows_, panels_, wide_, left_ = 0, height_;
  Range mine_;
};

// Computes blocks, with what the adapters add, for one thread.
template <class T, class Out>
class Blocks {
 public:
  // `blocks` is how many there will be.
  Blocks(const Member& me, const Linear& l, const Beside& beside, long blocks)
      : me_(me), l_(l), adapters_(beside.adapters), next_(beside.next), left_(blocks),
        fetcher_(beside, me.index, me.count, blocks) {
    if (adapters_ != nullptr) b_.resize(PANELS * adapters_->width / Out::PER_LANE * LANES);
  }

  // `w` are the block's weights; `next` is where those of the next block lie, if it is known.
  void operator()(const uint32_t* w, const Block& block, const Fetch& next) {
    const auto [begin, end, first, panels, adjoining] = block;
    const bool afterwards = adapters_ != nullptr && !adapters_->long_segments;
    const long lanes = l_.k / T::PER_LANE, column = first * LANES;
    fetcher_.begin();
    if (afterwards) want_adapters(begin, end, column, panels);
    fetcher_.want(next.begin, next.bytes);
    if (--left_ == 0) want_next_linear();
    fetcher_.ready((end - begin + ROWS - 1) / ROWS * lanes);
    if (adapters_ != nullptr && !afterwards) return adapted_in_registers(w, begin, end, column, panels);
    rows(w, nullptr, begin, end, column, panels);
    if (afterwards) add_adapters(begin, end, column, panels);
  }

 private:
  using elem = typename Out::elem;

  void rows(const uint32_t* w, const Delta* delta, long begin, long end, long column, long panels) {
    switch (panels) {
      case 1: row_tiles<T, Out, 1>(l_, w, fetcher_, delta, begin, end, column); break;
      case 2: row_tiles<T, Out, 2>(l_, w, fetcher_, delta, begin, end, column); break;
      default: row_tiles<T, Out, 3>(l_, w, fetcher_, delta, begin, end, column); break;
    }
  }

  // Rows are cut where segments begin and end, so that what is in registers is one adapter's.
  void adapted_in_registers(const uint32_t* w, long begin, long end, long column, long panels) {
    long row = begin;
    for (const Segment* g = first(begin); g < last() && g->begin < end; g++) {
      if (row < g->begin) rows(w, nullptr, row, g->begin, column, panels);
      const Delta delta = turned(*g, column, panels);
      const long from = row < g->begin ? g->begin : row;
      row = g->end < end ? g->end : end;
      rows(w, &delta, from, row, column, panels);
    }
    if (row < end) rows(w, nullptr, row, end, column, panels);
  }

  // What this thread needs first of the linear that follows.
  void want_next_linear() {
    if (next_.begin == nullptr) return;
    const Share share(me_, l_.rows, next_.outputs);
    if (share.count() > 0)
      fetcher_.want((const char*)next_.begin + share[0].first * next_.panel_bytes, share[0].panels * next_.panel_bytes);
  }

  // Short segments would make tiles too small: they are added when the block is computed, and their matrices come out
  // of memory meanwhile.
  void want_adapters(long begin, long end, long column, long panels) {
    const Adapters& a = *adapters_;
    for (const Segment* g = first(begin); g < last() && g->begin < end; g++)
      for (long j = 0; j < a.slices; j++) {
        const long low = column > a.slice[j].offset ? column - a.slice[j].offset : 0;
        const long top = column + panels * LANES - a.slice[j].offset;
        const long high = top < a.slice[j].out ? top : a.slice[j].out;
        const B<Out> b = matrix(j, g->slot, low);
        if (low < high && b.rank > 0) fetcher_.want(b.at, (high - low) * b.row_bytes());
      }
  }

  void add_adapters(long begin, long end, long column, long panels) {
    const Adapters& a = *adapters_;
    const Segment* const from = first(begin);
    const long width = a.width / Out::PER_LANE, h_stride = a.slices * width;
    for (long p = 0, count; p < panels; p += count) {
      const long j = slice_at(column + p * LANES);
      count = 1;
      while (p + count < panels && slice_at(column + (p + count) * LANES) == j) count++;
      if (j < 0) continue;
      const long within = column + p * LANES - a.slice[j].offset;
      for (const Segment* g = from; g < last() && g->begin < end; g++) {
        const long low = g->begin > begin ? g->begin : begin, high = g->end < end ? g->end : end;
        const B<Out> b = matrix(j, g->slot, within);
        if (b.rank == 0) continue;
        expand_panels<Out>((const uint32_t*)a.h + low * h_stride + j * width, h_stride, b, high - low, count,
                           (elem*)l_.y + low * l_.y_stride + column + p * LANES, l_.y_stride, b_.data());
      }
    }
  }

  // The slice that a column belongs to; below zero if it is none's.
  long slice_at(long column) const {
    for (long j = 0; j < adapters_->slices; j++) {
      const long within = column - adapters_->slice[j].offset;
      if (within >= 0 && within < adapters_->slice[j].out) return j;
    }
    return -1;
  }

  const Segment* last() const { return adapters_->segments + adapters_->count; }

  const Segment* first(long row) const {
    const Segment* g = adapters_->segments;
    while (g < last() && g->end <= row) g++;
    return g;
  }

  // B of a slice, from one of its rows on.
  B<Out> matrix(long slice, long slot, long row) const {
    const Where& where = adapters_->slots->where(slot, adapters_->first + slice);
    return B<Out>(adapters_->slots->at(where.b, sizeof(elem)), where.b_rank, adapters_->slots->int8).from(row);
  }

  Delta turned(const Segment& g, long column, long panels) {
    const Adapters& a = *adapters_;
    const long width = a.width / Out::PER_LANE, panel = width * LANES;
    Delta delta{b_.data(), (const uint32_t*)a.h, panel, a.slices * width, {}, {}};
    for (long p = 0; p < panels; p++) {
      const long j = slice_at(column + p * LANES);
      delta.slice[p] = -1;
      if (j < 0) continue;
      const B<Out> b = matrix(j, g.slot, column + p * LANES - a.slice[j].offset);
      if (b.rank == 0) continue;
      delta.slice[p] = j * width;
      delta.lanes[p] = b.lanes;
      turn(b, LANES, b_.data() + p * panel);
    }
    return delta;
  }

  const Member& me_;
  const Linear& l_;
  const Adapters* adapters_;
  Panels next_;
  long left_;  // blocks
  Fetcher fetcher_;
  std::vector<uint32_t> b_;
};

// Compiled once, in linear.cpp.
extern template class Blocks<Bf16, Bf16>;
extern template class Blocks<F32, F32>;

}  // namespace aio
