// Which thread computes which tiles, and what the adapters add to them.
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
// Panels that adapters are added to together, because each time costs a call: so many, or as fit into so many bytes.
constexpr long MOST_WAITING = 12, MOST_WAITING_BYTES = 256 << 10;

// Rows begin..end-1 by up to PANELS adjoining panels from `first` on; the thread's next block has the panels after these if it
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
    b_.resize(panel);
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
    // Tiles are as high as without adapters, wherever segments begin: a tile of a few rows takes longer for each of them.
    for (long row = begin, rows; row < end; row += rows) {
      rows = multiply_.rows(end - row, panels);
      multiply_.tile[panels - 1](l_, w, tools_, row, rows, column);
    }
    if (adapters_ == nullptr) return;
    waiting_ += panels;
    if (adjoins && waiting_ < most_waiting_) return;
    add_adapters(column + (panels - waiting_) * LANES, waiting_);
    waiting_ = 0;
  }

 private:
  using elem = typename Out::elem;

  // What this thread needs first of the linear that follows.
  void want_next_linear() {
    if (next_.begin == nullptr) return;
    const Share share(me_, l_.rows, next_.outputs);
    if (share.count() > 0)
      tools_.fetcher.want((const char*)next_.begin + share[0].first * next_.panel_bytes, share[0].panels * next_.panel_bytes);
  }

  // Finds the segments of some rows, once for all columns. They are added when some blocks are computed, and their matrices
  // come out of memory meanwhile.
  void find_segments(long begin, long end) {
    if (begin == begin_) return;
    begin_ = begin;
    added_.clear();
    for (const Segment* g = first(begin); g < last() && g->begin < end; g++)
      for (long j = 0; j < adapters_->slices; j++) {
        const Where& where = adapters_->slots->where(g->slot, adapters_->first + j);
        const B<Out> b(adapters_->slots->at(where.b, sizeof(elem)), where.b_rank, *adapters_->slots);
        if (b.rank > 0) added_.push_back({b, j, g->begin > begin ? g->begin : begin, g->end < end ? g->end : end});
      }
  }

  void want_adapters(long column, long panels) {
    for (const Added& s : added_) {
      const Slice& slice = adapters_->slice[s.slice];
      const long low = column > slice.offset ? column - slice.offset : 0, top = column + panels * LANES - slice.offset;
      const long high = top < slice.out ? top : slice.out;
      if (low < high) tools_.fetcher.want(s.b.from(low).at, (high - low) * s.b.row_bytes());
    }
  }

  void add_adapters(long column, long panels) {
    const Adapters& a = *adapters_;
    for (long p = 0, count; p < panels; p += count) {
      const long j = slice_at(column + p * LANES);
      count = 1;
      while (p + count < panels && slice_at(column + (p + count) * LANES) == j) count++;
      if (j < 0) continue;
      const long first = column + p * LANES;
      for (const Added& s : added_)
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

  const Member& me_;
  const Linear& l_;
  const Multiply& multiply_;
  const Adapters* adapters_;
  Given given_{};
  Panels next_;
  long left_;  // blocks
  Tools tools_;
  long waiting_ = 0, most_waiting_ = 0;  // panels to which adapters are still to be added
  // Rows of a segment in a block, with a slice's B.
  struct Added {
    B<Out> b;
    long slice, begin, end;
  };
  std::vector<Added> added_;
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
