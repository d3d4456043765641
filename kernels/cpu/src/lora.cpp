// LoRA expand over segments of tokens that share an adapter, for several fused slices at once; shrink.cpp is what precedes it.
// LoRA: Hu et al., 2021, arXiv:2106.09685. Tokens grouped by adapter: Punica, Chen et al., 2023, arXiv:2310.18547.
// A slot has A [rank, in] and B [out, rank] of every module that its adapter targets; a table says where.
#include <vector>

#include "expand.h"
#include "team.h"
#include "transpose.h"

namespace aio {
namespace {

// An adapter is read once a step, from memory: what comes next is asked for early.
inline void fetch(const void* p, long bytes) {
  for (long i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i);
}

// R tokens by a panel of 16 columns, of which `columns` exist.
template <class T, int R>
inline void expand_tile(const uint32_t* h, long h_stride, const uint32_t* b, long lanes, bool int8, typename T::elem* y,
                        long y_stride, long columns) {
  vf acc[R];
  for (int r = 0; r < R; r++) acc[r] = load_some<T>(y + r * y_stride, columns);
  add_lanes<T, R>(h, h_stride, b, lanes, int8, acc);
  for (int r = 0; r < R; r++) store_some<T>(y + r * y_stride, acc[r], columns);
}

constexpr long AHEAD = 4 * LANES;  // rows of B between those in use and those that are fetched

struct Expand {
  const void* h;  // [tokens, slices, width], a whole number of lanes
  const Slots* slots;
  long first;
  const Slice* slice;
  long slices, width;
  void* y;
  long y_stride;
};

template <class T>
void expand(const Expand& e, const Segment* segments, long count, int threads) {
  using elem = typename T::elem;
  struct Task {
    long slice, column;
  };
  std::vector<Task> tasks;
  for (long j = 0; j < e.slices; j++)
    for (long column = 0; column < e.slice[j].out; column += 2 * LANES) tasks.push_back({j, column});
  together(threads, [&](const Member& me) {
    const Given h_of = given<T>(e.h, e.slices, e.width, *e.slots, segments, count);
    const long panel = e.width / T::PER_LANE * LANES;
    std::vector<uint32_t> b(2 * panel);
    Tiles tiles;
    const Range mine = me.share(long(tasks.size()));
    for (const Segment* g = segments; g < segments + count; g++)
      for (long i = mine.begin; i < mine.end; i++) {
        const Slice& slice = e.slice[tasks[i].slice];
        const Where& where = e.slots->where(g->slot, e.first + tasks[i].slice);
        if (where.b_rank == 0) continue;
        const long column = tasks[i].column, columns = slice.out - column;
        const B<T> from = B<T>(e.slots->at(where.b, sizeof(elem)), where.b_rank, *e.slots).from(column);
        const uint32_t* turned[2];
        fetch(from.from(AHEAD).at, 2 * LANES * from.row_bytes());
        if (from.turned && columns >= 2 * LANES) {
          elem* y = (elem*)e.y + g->begin * e.y_stride + slice.offset + column;
          expand_panels<T>(h_of.at(g->begin, tasks[i].slice), h_of.stride(), from, g->end - g->begin, 2, y, e.y_stride, b.data(),
                           tiles);
          continue;
        }
        for (int p = 0; p < 2 && p * LANES < columns; p++) {
          const long rows = columns - p * LANES < LANES ? columns - p * LANES : LANES;
          turned[p] = aio::panel(from.from(p * LANES), rows, b.data() + p * panel);
        }
        constexpr int MOST = most_rows();
        for (long t = g->begin; t < g->end; t += MOST)
          for (int p = 0; p < 2 && p * LANES < columns; p++) {
            const uint32_t* h = h_of.at(t, tasks[i].slice);
            elem* y = (elem*)e.y + t * e.y_stride + slice.offset + column + p * LANES;
#define CALL(R) expand_tile<T, R <= MOST ? R : 1>(h, h_of.stride(), turned[p], from.lanes, from.int8, y, e.y_stride, columns - p * LANES)
            AIO_SWITCH_ROWS(g->end - t < MOST ? g->end - t : MOST, CALL)
#undef CALL
          }
      }
  });
}

template <class T>
void affine(void* y_, long y_stride, const Slots& slots, long first, const Slice* slice, long slices,
            const Segment* segments, long count, int threads) {
  using elem = typename T::elem;
  long products = 0;
  for (const Segment* g = segments; g < segments + count; g++) products += (g->end - g->begin) * slice[0].out;
  together(products < 8192 ? 1 : threads, [&](const Member& me) {
    for (const Segment* g = segments; g < segments + count; g++)
      for (long j = 0; j < slices; j++) {
        const long begin = slots.where(g->slot, first + j).affine;
        if (begin < 0) continue;
        const elem* gain = (const elem*)slots.at(begin, sizeof(elem));
        const elem* shift = gain + slice[j].out;
        const Range mine = me.share(g->end - g->begin);
        for (long t = g->begin + mine.begin; t < g->begin + mine.end; t++) {
          elem* y = (elem*)y_ + t * y_stride + slice[j].offset;
          for (long i = 0; i < slice[j].out; i += LANES) {
            const long n = slice[j].out - i;
            const vf v = load_some<T>(y + i, n);
            store_some<T>(y + i, v + load_some<T>(gain + i, n) * v + load_some<T>(shift + i, n), n);
          }
        }
      }
  });
}

}  // namespace
}  // namespace aio

// slice [slices]; y += B h.
AIO_EXPORT void aio_lora_expand(int bf16, const void* h, const aio::Slots* slots, long first, const aio::Slice* slice,
                                long slices, long width, void* y, long y_stride, const int32_t* segments, long count,
                                int threads) {
  const aio::Expand e{h, slots, first, slice, slices, width, y, y_stride};
  const auto* g = (const aio::Segment*)segments;
  bf16 ? aio::expand<aio::Bf16>(e, g, count, threads) : aio::expand<aio::F32>(e, g, count, threads);
}

// y = y + gain * y + shift, for what DoRA and trained biases come to.
AIO_EXPORT void aio_lora_affine(int bf16, void* y, long y_stride, const aio::Slots* slots, long first,
                                const aio::Slice* slice, long slices, const int32_t* segments, long count, int threads) {
  const auto* g = (const aio::Segment*)segments;
  bf16 ? aio::affine<aio::Bf16>(y, y_stride, *slots, first, slice, slices, g, count, threads)
       : aio::affine<aio::F32>(y, y_stride, *slots, first, slice, slices, g, count, threads);
}
