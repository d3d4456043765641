// What becomes of a tile's products: scales, a bias and what the adapters add; and which thread computes what.
#include "tiles.h"

#include <vector>

#include "expand.h"

namespace aio {
namespace {

// Rows of x, at most, that stay in the L2 cache while the panels pass by; and rows of a thread from which on they are its own.
#if defined(AIO_TILES)
constexpr long ROW_BLOCK = 256, ROWS_TO_SHARE = 128;
#else
constexpr long ROW_BLOCK = 128, ROWS_TO_SHARE = 0;
#endif
constexpr long LONG = 16;        // rows of a segment in a block from which on B is added while the sums are in the caches
// Panels that short segments are added to together, because each time costs a call: so many, or as fit into so many bytes.
constexpr long MOST_WAITING = 4 * PANELS, MOST_WAITING_BYTES = 256 << 10;

// What an adapter adds to a tile: of each panel its B as lanes [lanes][16], and where its slice begins in a row of h, in
// lanes; below zero if nothing is added to the panel.
struct Delta {
  const uint32_t* h;
  long h_stride;
  const uint32_t* b[PANELS];
  long slice[PANELS], lanes[PANELS];
  bool int8;
};

// R rows of a tile's sums, from `skip` on, to y, where they begin with `row`. `delta` may be null.
template <class Out, int R>
void finish(const Linear& l, const vf (&sums)[PANELS][MOST_ROWS], bool whole, long skip, const Delta* delta, long row,
            long column, long panels) {
  using elem = typename Out::elem;
  for (long p = 0; p < panels; p++) {
    const long first = column + p * LANES, count = l.n - first < LANES ? l.n - first : LANES;
    // Loops over rows are unrolled, or y would have to leave the registers.
    vf y[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) y[r] = sums[p][skip + r];
    if (whole) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) y[r] = __builtin_convertvector((vi)y[r], vf);
    }
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
      add_lanes<Out, R>(h, delta->h_stride, delta->b[p], delta->lanes[p], delta->int8, y);
    }
    const long stride = l.y_stride;
    elem* out = (elem*)l.y + row * stride + first;
    if (count == LANES) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) Out::store16(out + r * stride, y[r]);
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        elem last[LANES];
        Out::store16(last, y[r]);
        std::memcpy(out + r * stride, last, count * sizeof(elem));
      }
    }
  }
}

// Rows begin..end-1 by up to 3 adjoining panels from `first` on; the thread's next block has the panels after these if it
// `adjoins`.
struct Block {
  long begin, end, first, panels;
  bool adjoins;

  // Where its weights lie.
  Fetch weights(const Stored& stored) const {
    if (stored.begin == nullptr) return {};
    return {(const char*)stored.begin + first * stored.panel_bytes, panels * stored.panel_bytes};
  }
};

// A thread's blocks: blocks of rows outside, panels inside. A thread has rows of its own where tile registers compute many, so
// that what it makes of them stays in its caches. Else it has the same panels of all rows where these can be shared out evenly, or a contiguous part of all blocks.
// Blocks of rows are as even as tiles allow: a last one of a few rows would have all weights read for these, and those whose
// blocks it has would wait for the others.
class Share {
 public:
  Share(const Member& me, long rows, long n) : panels_(whole(n, LANES)), wide_(whole(panels_, PANELS)) {
    const bool by_rows = ROWS_TO_SHARE > 0 && rows >= ROWS_TO_SHARE * me.count;
    const Range own = by_rows ? me.share(whole(rows, MOST_ROWS)) : Range{0, whole(rows, MOST_ROWS)};
    top_ = own.begin * MOST_ROWS, bottom_ = own.end * MOST_ROWS < rows ? own.end * MOST_ROWS : rows;
    const long blocks = whole(bottom_ - top_, ROW_BLOCK);
    height_ = whole(own.end - own.begin, blocks) * MOST_ROWS;
    if (by_rows) {
      mine_ = {0, blocks * wide_};
    } else if (wide_ % me.count == 0) {
      wide_ /= me.count;
      left_ = me.index * wide_;
      mine_ = {0, blocks * wide_};
    } else {
      mine_ = me.share(blocks * wide_);
    }
  }

  long count() const { return mine_.end - mine_.begin; }

  Block operator[](long i) const {
    const long at = mine_.begin + i, begin = top_ + at / wide_ * height_, first = (left_ + at % wide_) * PANELS;
    const long end = begin + height_ < bottom_ ? begin + height_ : bottom_;
    const bool adjoins = i + 1 < count() && (at + 1) % wide_ != 0;
    return {begin, end, first, panels_ - first < PANELS ? panels_ - first : PANELS, adjoins};
  }

 private:
  static long whole(long n, long of) { return (n + of - 1) / of; }

  const long panels_;
  long wide_, left_ = 0, height_, top_, bottom_;
  Range mine_;
};

// Computes blocks, with what the adapters add, for one thread.
template <class Out>
class Blocks {
 public:
  // `blocks` is how many there will be.
  Blocks(const Member& me, const Linear& l, const Beside& beside, const Multiply& multiply, long blocks)
      : me_(me), l_(l), multiply_(multiply), adapters_(beside.adapters), next_(beside.next), left_(blocks),
        tools_{Fetcher(beside, me.index, me.count, blocks), {}} {
    if (adapters_ == nullptr) return;
    const long panel = adapters_->width / Out::PER_LANE * LANES;
    b_.resize(PANELS * panel);
    given_ = given<Out>(adapters_->h, adapters_->slices, adapters_->width, *adapters_->slots, adapters_->segments, adapters_->count);
    const long fitting = MOST_WAITING_BYTES / (panel * adapters_->count * long(sizeof(uint32_t)) + 1);
    most_waiting_ = fitting < MOST_WAITING ? fitting : MOST_WAITING;
  }

  // `w` are the block's weights; `next` is where those of the next block lie, if it is known.
  void operator()(const uint32_t* w, const Block& block, const Fetch& next) {
    const auto [begin, end, first, panels, adjoins] = block;
    const long lanes = l_.k / multiply_.per_lane, column = first * LANES;
    tools_.fetcher.begin();
    if (adapters_ != nullptr) find_segments(begin, end), want_adapters(column, panels);
    const long most = multiply_.most[PANELS - 1], tiles = (end - begin + most - 1) / most;
    // The hardware is quicker where tile registers take all rows at once.
    if (multiply_.together == 1 || tiles > 1) tools_.fetcher.want(next.begin, next.bytes);
    if (--left_ == 0) want_next_linear();
    tools_.fetcher.ready(tiles * lanes / multiply_.together);
    rows(w, begin, end, column, panels);
    if (adapters_ == nullptr) return;
    waiting_ += panels;
    if (adjoins && waiting_ < most_waiting_) return;
    add_to_short_segments(column + (panels - waiting_) * LANES, waiting_);
    waiting_ = 0;
  }

 private:
  using elem = typename Out::elem;

  // Tiles are as high as without adapters, wherever segments begin: a tile of a few rows takes longer for each of them.
  void rows(const uint32_t* w, long begin, long end, long column, long panels) {
    const bool plain = l_.bias == nullptr && column + panels * LANES <= l_.n;
    auto next = long_.cbegin();  // the segment that is not passed yet
    Delta delta;                 // its own, once its rows have begun
    for (long row = begin, after; row < end; row = after) {
      after = row + multiply_.rows(end - row, panels);
      const bool finished = plain && (next == long_.cend() || next->begin >= after);
      alignas(64) vf sums[PANELS][MOST_ROWS];
      multiply_.tile[panels - 1](l_, w, tools_, row, after - row, column, finished ? nullptr : sums);
      for (long from = row, to; !finished && from < after; from = to) {
        to = after - from < ROWS ? after : from + ROWS;
        const bool adapted = next != long_.cend() && next->begin <= from;
        if (next != long_.cend() && (adapted ? next->end : next->begin) < to) to = adapted ? next->end : next->begin;
        if (adapted && next->begin == from) delta = turned(*next->segment, column, panels);
#define CALL(R) finish<Out, R <= ROWS ? R : 1>(l_, sums, multiply_.whole, from - row, adapted ? &delta : nullptr, from, column, panels)
        AIO_SWITCH_ROWS(to - from, CALL)
#undef CALL
        if (adapted && next->end == to) next++;
      }
    }
  }

  // What this thread needs first of the linear that follows.
  void want_next_linear() {
    if (next_.begin == nullptr) return;
    const Share share(me_, l_.rows, next_.outputs);
    if (share.count() > 0)
      tools_.fetcher.want((const char*)next_.begin + share[0].first * next_.panel_bytes, share[0].panels * next_.panel_bytes);
  }

  // Finds the segments of some rows, once for all columns. Short ones are added when some blocks are computed, and their
  // matrices come out of memory meanwhile. For tile registers all are short: those hold more rows than a call costs.
  void find_segments(long begin, long end) {
    if (begin == begin_) return;
    begin_ = begin;
    long_.clear(), short_.clear();
    for (const Segment* g = first(begin); g < last() && g->begin < end; g++) {
      const long from = g->begin > begin ? g->begin : begin, to = g->end < end ? g->end : end;
      if (to - from >= LONG && !expands_in_tiles<Out>(*adapters_->slots)) {
        long_.push_back({g, from, to});
        continue;
      }
      for (long j = 0; j < adapters_->slices; j++) {
        const B<Out> b = matrix(j, g->slot, 0);
        if (b.rank > 0) short_.push_back({b, j, from, to});
      }
    }
  }

  void want_adapters(long column, long panels) {
    for (const Short& s : short_) {
      const Slice& slice = adapters_->slice[s.slice];
      const long low = column > slice.offset ? column - slice.offset : 0, top = column + panels * LANES - slice.offset;
      const long high = top < slice.out ? top : slice.out;
      if (low < high) tools_.fetcher.want(s.b.from(low).at, (high - low) * s.b.row_bytes());
    }
  }

  void add_to_short_segments(long column, long panels) {
    const Adapters& a = *adapters_;
    for (long p = 0, count; p < panels; p += count) {
      const long j = slice_at(column + p * LANES);
      count = 1;
      while (p + count < panels && slice_at(column + (p + count) * LANES) == j) count++;
      if (j < 0) continue;
      const long first = column + p * LANES;
      for (const Short& s : short_)
        if (s.slice == j)
          expand_panels<Out>(given_.at(s.begin, j), given_.stride(), s.b.from(first - a.slice[j].offset), s.end - s.begin, count,
                             (elem*)l_.y + s.begin * l_.y_stride + first, l_.y_stride, b_.data(), tools_.tiles);
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
    return B<Out>(adapters_->slots->at(where.b, sizeof(elem)), where.b_rank, *adapters_->slots).from(row);
  }

  Delta turned(const Segment& g, long column, long panels) {
    const Adapters& a = *adapters_;
    const long panel = a.width / Out::PER_LANE * LANES;
    Delta delta{given_.begin, given_.stride(), {}, {}, {}, a.slots->int8 != 0};
    for (long p = 0; p < panels; p++) {
      const long j = slice_at(column + p * LANES);
      delta.slice[p] = -1;
      if (j < 0) continue;
      const B<Out> b = matrix(j, g.slot, column + p * LANES - a.slice[j].offset);
      if (b.rank == 0) continue;
      delta.slice[p] = j * given_.words;
      delta.lanes[p] = b.lanes;
      delta.b[p] = aio::panel(b, LANES, b_.data() + p * panel);
    }
    return delta;
  }

  const Member& me_;
  const Linear& l_;
  const Multiply& multiply_;
  const Adapters* adapters_;
  Given given_{};
  Panels next_;
  long left_;  // blocks
  Tools tools_;
  long waiting_ = 0, most_waiting_ = 0;  // panels to which short segments are still to be added
  // Rows of a segment in a block.
  struct Long {
    const Segment* segment;
    long begin, end;
  };
  // The same with a slice's B.
  struct Short {
    B<Out> b;
    long slice, begin, end;
  };
  std::vector<Long> long_;
  std::vector<Short> short_;
  long begin_ = -1;  // the first row of those in which they are
  std::vector<uint32_t> b_;
};

}  // namespace

template <class Out>
void compute_share(const Member& me, const Linear& l, const Beside& beside, const Multiply& multiply,
                   const Stored& stored, Unpack unpack, const void* of) {
  if (l.rows == 0) return;  // there are no blocks to share out
  const Share mine(me, l.rows, l.n);
  Blocks<Out> compute(me, l, beside, multiply, mine.count());
  for (long i = 0; i < mine.count(); i++) {
    const Block block = mine[i];
    compute(unpack(of, block.first, block.panels), block, i + 1 < mine.count() ? mine[i + 1].weights(stored) : Fetch{});
  }
}

template void compute_share<Bf16>(const Member&, const Linear&, const Beside&, const Multiply&, const Stored&, Unpack,
                                  const void*);
template void compute_share<F32>(const Member&, const Linear&, const Beside&, const Multiply&, const Stored&, Unpack,
                                 const void*);

}  // namespace aio
