// Tiles of the packed linear, which all kinds of weights share.
//
// Packed weights are panels of 16 output columns: [ceil(N / 16)][K lanes][16 lanes], zero where N ends. A
// tile of up to 8 rows by 3 panels is kept in registers: 24 accumulators, and each weight that is
// loaded is used for every row. (Tiling as in Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", 2008.)
#pragma once

#include <omp.h>

#include <vector>

#include "transpose.h"

namespace aio {

constexpr int ROWS = 8, PANELS = 3;
constexpr long ROW_BLOCK = 64;  // rows of x that stay in the L2 cache while the panels pass by

// Gives out the cache lines of some ranges of memory, a few at a time: first those that are wanted now, then a thread's
// share of those that are wanted afterwards, in the last of its `steps`, or what comes in between would drive them out.
class Fetcher {
 public:
  Fetcher(const Beside& beside, long index, long threads, long steps)
      : later_(beside.fetch), now_(nullptr), now_end_(nullptr) {
    long total = 0;
    for (long i = 0; i < beside.fetch_count; i++) total += lines(beside.fetch[i]);
    const Range mine = share(total, index, threads);
    left_ = mine.end - mine.begin;
    line_ = mine.begin;
    while (left_ > 0 && line_ >= lines(*later_)) line_ -= lines(*later_++);
    steps_ = steps - 2 * left_;
  }

  // These first; they must stay where they are.
  void want(const std::vector<Fetch>& ranges) {
    now_ = ranges.data(), now_end_ = now_ + ranges.size();
    now_line_ = 0;
  }

  // Up to `count` lines that adjoin: where they begin, and how many.
  inline __attribute__((always_inline)) const char* take(long count, long& taken) {
    if (now_ != now_end_) {
      const char* at = (const char*)now_->begin + now_line_ * 64;
      taken = lines(*now_) - now_line_;
      if (taken <= count) {
        now_++, now_line_ = 0;
      } else {
        taken = count, now_line_ += count;
      }
      return at;
    }
    taken = 0;
    steps_ -= count;
    if (left_ == 0 || steps_ > 0) return nullptr;
    if (line_ == lines(*later_)) later_++, line_ = 0;
    const char* at = (const char*)later_->begin + line_ * 64;
    taken = lines(*later_) - line_;
    if (taken > left_) taken = left_;
    if (taken > count) taken = count;
    line_ += taken;
    left_ -= taken;
    return at;
  }

 private:
  static long lines(const Fetch& r) { return (r.bytes + 63) / 64; }

  const Fetch *later_, *now_, *now_end_;
  long line_, left_, steps_, now_line_ = 0;
};

// What there is to compute: y = x W^T, times a scale of each row and column if there are such, plus a bias if there
// is one. x [rows, k] has elements of the tile's type, y [rows, n] of the output's.
struct Linear {
  const void* x;
  long x_stride;  // in elements
  const void* bias;
  void* y;
  long y_stride;
  long rows, n, k;
  const float *row_scale, *column_scale;  // may be null; column_scale and start have room for whole panels
  const int32_t* start;                   // what the sums of each column begin with; null: zero
};

// What an adapter adds to a tile: its B as lanes [panels][lanes][16], and of each panel where its slice begins in a row
// of h, in lanes; below zero if the panel belongs to none.
struct Delta {
  const uint32_t *b, *h;
  long panel, lanes, h_stride;
  long slice[PANELS];
};

// acc += x W over lanes begin..end-1, fetching a cache line for each if there is something to fetch.
template <class T, int R, int P, bool FETCH>
inline void multiply(const uint32_t* x, long x_stride, const uint32_t* w, long panel, long begin, long end,
                     const char* fetch, typename T::acc (&acc)[R][P]) {
  for (long k = begin; k < end; k++) {
    vu b[P];
    for (int p = 0; p < P; p++) b[p] = load(w + p * panel + k * LANES);
    if (FETCH) __builtin_prefetch(fetch + (k - begin) * 64, 0, 2);
    for (int r = 0; r < R; r++) {
      const vu a = splat(x[r * x_stride + k]);
      for (int p = 0; p < P; p++) acc[r][p] = T::dot(acc[r][p], a, b[p]);
    }
  }
}

static inline vf to_float(vf v) { return v; }
static inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }

// R rows by P panels, from `row` and `column` on; `w` are the panels' weights. Out is the type of y. `delta` may be null.
template <class T, class Out, int R, int P>
void tile(const Linear& l, const uint32_t* w, Fetcher& fetcher, const Delta* delta, long row, long column) {
  using elem = typename Out::elem;
  const long lanes = l.k / T::PER_LANE, panel = lanes * LANES, stride = l.x_stride / T::PER_LANE;
  const uint32_t* x = (const uint32_t*)l.x + row * stride;
  typename T::acc acc[R][P];
  for (int p = 0; p < P; p++) {
    typename T::acc start = {};
    if (l.start != nullptr) std::memcpy(&start, l.start + column + p * LANES, sizeof start);
    for (int r = 0; r < R; r++) acc[r][p] = start;
  }
  long k = 0;
  while (k < lanes) {
    long fetches;
    const char* fetch = fetcher.take(lanes - k, fetches);
    if (fetches == 0) break;
    multiply<T, R, P, true>(x, stride, w, panel, k, k + fetches, fetch, acc);
    k += fetches;
  }
  multiply<T, R, P, false>(x, stride, w, panel, k, lanes, nullptr, acc);
  for (int p = 0; p < P; p++) {
    const long first = column + p * LANES, count = l.n - first < LANES ? l.n - first : LANES;
    const vf scale = l.column_scale != nullptr ? loadf(l.column_scale + first) : splatf(1.0f);
    vf bias = {};
    if (l.bias != nullptr) {
      elem b[LANES] = {};
      std::memcpy(b, (const elem*)l.bias + first, count * sizeof(elem));
      bias = Out::load16(b);
    }
    vf y[R];
    for (int r = 0; r < R; r++) {
      y[r] = to_float(acc[r][p]) * scale;
      if (l.row_scale != nullptr) y[r] *= l.row_scale[row + r];
      y[r] += bias;
    }
    if (delta != nullptr && delta->slice[p] >= 0) {
      const uint32_t* h = delta->h + row * delta->h_stride + delta->slice[p];
      for (long k = 0; k < delta->lanes; k++) {
        const vu b = load(delta->b + p * delta->panel + k * LANES);
        for (int r = 0; r < R; r++) y[r] = Out::dot(y[r], splat(h[r * delta->h_stride + k]), b);
      }
    }
    for (int r = 0; r < R; r++) {
      const vf v = y[r];
      elem* out = (elem*)l.y + (row + r) * l.y_stride + first;
      if (count == LANES) {
        Out::store16(out, v);
      } else {
        elem last[LANES];
        Out::store16(last, v);
        std::memcpy(out, last, count * sizeof(elem));
      }
    }
  }
}

template <class T, class Out, int P>
void row_tiles(const Linear& l, const uint32_t* w, Fetcher& fetcher, const Delta* delta, long begin, long end,
               long column) {
  long row = begin;
  for (; row + ROWS <= end; row += ROWS) tile<T, Out, ROWS, P>(l, w, fetcher, delta, row, column);
#define CALL(R) tile<T, Out, R, P>(l, w, fetcher, delta, row, column)
  if (row < end) AIO_SWITCH_ROWS(end - row, CALL)
#undef CALL
}

// y += B h for R rows of one panel, B as a slot holds it: 16 rows, `stride` lanes apart. `lanes` is what an adapter's rank
// comes to; if it is a multiple of 8, B is turned in registers.
template <class T, int R>
inline void add_panel(const uint32_t* h, long h_stride, const typename T::elem* b, long stride, long lanes, long rank,
                      typename T::elem* y, long y_stride, uint32_t* turned) {
  constexpr int CHAINS = R <= 4 ? 2 : 1;  // sums side by side, so that products do not wait for one another
  vf acc[R][CHAINS];
  for (int r = 0; r < R; r++) {
    acc[r][0] = T::load16(y + r * y_stride);
    if (CHAINS == 2) acc[r][CHAINS - 1] = vf{};
  }
#if defined(AIO_SHUFFLE)
  if (lanes % 8 == 0 && rank == lanes * T::PER_LANE) {
    for (long k = 0; k < lanes; k += 8) {
      vu w[8];
      transpose8((const uint32_t*)b + k, stride, w);
      for (int j = 0; j < 8; j++)
        for (int r = 0; r < R; r++)
          acc[r][j % CHAINS] = T::dot(acc[r][j % CHAINS], splat(h[r * h_stride + k + j]), w[j]);
    }
  } else
#endif
  {
    transpose<T>(b, stride * T::PER_LANE, rank, LANES, turned);
    for (long k = 0; k < lanes; k++)
      for (int r = 0; r < R; r++)
        acc[r][0] = T::dot(acc[r][0], splat(h[r * h_stride + k]), load(turned + k * LANES));
  }
  for (int r = 0; r < R; r++) T::store16(y + r * y_stride, CHAINS == 2 ? acc[r][0] + acc[r][CHAINS - 1] : acc[r][0]);
}

// Computes blocks of rows and up to 3 adjoining panels, with what the adapters add, for one thread.
template <class T, class Out>
class Blocks {
 public:
  Blocks(const Linear& l, const Beside& beside)
      : l_(l), adapters_(beside.adapters),
        fetcher_(beside, omp_get_thread_num(), omp_get_num_threads(), steps() / omp_get_num_threads()) {
    if (adapters_ != nullptr) b_.resize(PANELS * adapters_->max_rank / Out::PER_LANE * LANES);
  }

  void operator()(const uint32_t* w, long begin, long end, long column, long panels) {
    if (adapters_ == nullptr)
      rows(w, nullptr, begin, end, column, panels);
    else if (adapters_->long_segments)
      adapted_in_registers(w, begin, end, column, panels);
    else
      adapted_afterwards(w, begin, end, column, panels);
  }

 private:
  using elem = typename Out::elem;

  long steps() const {
    const long groups = (l_.n + PANELS * LANES - 1) / (PANELS * LANES);
    return (l_.rows + ROWS - 1) / ROWS * groups * (l_.k / T::PER_LANE);
  }

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
      const Delta delta = turn(*g, column, panels);
      const long from = row < g->begin ? g->begin : row;
      row = g->end < end ? g->end : end;
      rows(w, &delta, from, row, column, panels);
    }
    if (row < end) rows(w, nullptr, row, end, column, panels);
  }

  // Short segments would make tiles too small. Their matrices come out of memory while the block is computed.
  void adapted_afterwards(const uint32_t* w, long begin, long end, long column, long panels) {
    const Adapters& a = *adapters_;
    const Segment* const from = first(begin);
    wanted_.clear();
    for (const Segment* g = from; g < last() && g->begin < end; g++)
      for (long j = 0; j < a.slices; j++) {
        const long low = column > a.slice[j].offset ? column - a.slice[j].offset : 0;
        const long top = column + panels * LANES - a.slice[j].offset;
        const long high = top < a.slice[j].out ? top : a.slice[j].out;
        if (low < high)
          wanted_.push_back({matrix(a.slice[j], g->slot, low), (high - low) * a.max_rank * long(sizeof(elem))});
      }
    fetcher_.want(wanted_);
    rows(w, nullptr, begin, end, column, panels);
    const long width = a.max_rank / Out::PER_LANE, h_stride = a.slices * width;
    for (long p = 0; p < panels; p++) {
      const long j = slice_at(column + p * LANES);
      if (j < 0) continue;
      const long within = column + p * LANES - a.slice[j].offset;
      for (const Segment* g = from; g < last() && g->begin < end; g++) {
        const elem* b = matrix(a.slice[j], g->slot, within);
        const long until = g->end < end ? g->end : end, lanes = (g->rank + Out::PER_LANE - 1) / Out::PER_LANE;
        for (long row = g->begin > begin ? g->begin : begin; row < until; row += ROWS) {
          const uint32_t* h = (const uint32_t*)a.h + row * h_stride + j * width;
          elem* y = (elem*)l_.y + row * l_.y_stride + column + p * LANES;
#define CALL(R) add_panel<Out, R>(h, h_stride, b, width, lanes, g->rank, y, l_.y_stride, b_.data())
          AIO_SWITCH_ROWS(until - row, CALL)
#undef CALL
        }
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

  const elem* matrix(const Slice& slice, long slot, long row) const {
    return (const elem*)slice.b + slot * slice.b_stride + row * adapters_->max_rank;
  }

  Delta turn(const Segment& g, long column, long panels) {
    const Adapters& a = *adapters_;
    const long width = a.max_rank / Out::PER_LANE, panel = width * LANES;
    const long lanes = (g.rank + Out::PER_LANE - 1) / Out::PER_LANE;
    Delta delta{b_.data(), (const uint32_t*)a.h, panel, lanes, a.slices * width, {}};
    for (long p = 0; p < panels; p++) {
      const long j = slice_at(column + p * LANES);
      delta.slice[p] = j < 0 ? -1 : j * width;
      if (j < 0) continue;
      const elem* b = matrix(a.slice[j], g.slot, column + p * LANES - a.slice[j].offset);
      transpose<Out>(b, a.max_rank, g.rank, LANES, b_.data() + p * panel);
    }
    return delta;
  }

  const Linear& l_;
  const Adapters* adapters_;
  Fetcher fetcher_;
  std::vector<Fetch> wanted_;
  std::vector<uint32_t> b_;
};

// Calls visit(begin, end, panel, panels) for every block that is this thread's: blocks of rows outside, panels inside,
// and a thread's share is contiguous in that order.
template <class Visit>
void visit_blocks(long rows, long n, const Visit& visit) {
  const long panels = (n + LANES - 1) / LANES, groups = (panels + PANELS - 1) / PANELS;
  const long blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
  const Range mine = share(blocks * groups, omp_get_thread_num(), omp_get_num_threads());
  for (long i = mine.begin; i < mine.end; i++) {
    const long begin = i / groups * ROW_BLOCK, first = i % groups * PANELS;
    const long end = begin + ROW_BLOCK < rows ? begin + ROW_BLOCK : rows;
    visit(begin, end, first, panels - first < PANELS ? panels - first : PANELS);
  }
}

}  // namespace aio
