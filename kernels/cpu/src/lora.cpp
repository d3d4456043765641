// LoRA shrink and expand over segments of tokens that share an adapter, for several fused slices at once.
//
// LoRA: Hu et al., 2021, arXiv:2106.09685. Tokens grouped by adapter: Punica, Chen et al., 2023, arXiv:2310.18547.
// A slot has A [rank, in] and B [out, rank] of every module that its adapter targets; a table says where.
#include <vector>

#include "expand.h"
#include "team.h"

namespace aio {
namespace {

template <class T>
inline vu load_tail(const typename T::elem* p, long count) {
  vu v = {};
  std::memcpy(&v, p, count * sizeof(typename T::elem));
  return v;
}

// An adapter is read once a step, from memory: what comes next is asked for early.
template <class T>
inline void fetch(const typename T::elem* p, long elements) {
  for (long i = 0; i < elements; i += 64 / long(sizeof *p)) __builtin_prefetch(p + i);
}

// Products of up to 4 tokens with up to 4 rows of A: sums[t * 4 + r]. Meanwhile the 4 rows at `later` are fetched.
template <class T, int TOKENS>
inline vf products(const typename T::elem* x, long x_stride, const typename T::elem* const (&a)[4], long k,
                   const typename T::elem* later) {
  constexpr long STEP = LANES * T::PER_LANE;
  vf acc[16];
  for (int i = 0; i < 16; i++) acc[i] = vf{};
  long i = 0;
  for (; i + STEP <= k; i += STEP) {
    vu row[4];
    for (int r = 0; r < 4; r++) {
      row[r] = load((const uint32_t*)(a[r] + i));
      __builtin_prefetch(later + r * k + i, 0, 2);
    }
    for (int t = 0; t < TOKENS; t++) {
      const vu token = load((const uint32_t*)(x + t * x_stride + i));
      for (int r = 0; r < 4; r++) acc[t * 4 + r] = T::dot(acc[t * 4 + r], token, row[r]);
    }
  }
  if (i < k)
    for (int t = 0; t < TOKENS; t++) {
      const vu token = load_tail<T>(x + t * x_stride + i, k - i);
      for (int r = 0; r < 4; r++) acc[t * 4 + r] = T::dot(acc[t * 4 + r], token, load_tail<T>(a[r] + i, k - i));
    }
  return sums(acc);
}

struct Shrink {
  const void* x;
  long x_stride;
  const Slots* slots;
  long first;
  void* h;  // [tokens, slices, width]
  long k, slices, width;
};

template <class T>
void shrink(const Shrink& s, const Segment* segments, long count, int threads) {
  using elem = typename T::elem;
  struct Task {
    const Segment* segment;
    const Where* where;
    long begin, slice, row;
  };
  constexpr long TOKENS = 32;     // of a task, so that a long prompt is shared out too
  constexpr long TASKS_AHEAD = 3;  // between the rows in use and those that are fetched
  std::vector<Task> tasks;
  for (const Segment* g = segments; g < segments + count; g++)
    for (long t = g->begin; t < g->end; t += TOKENS)
      for (long j = 0; j < s.slices; j++) {
        const Where* where = &s.slots->where(g->slot, s.first + j);
        for (long r = 0; r == 0 || r < where->a_rank; r += 4) tasks.push_back({g, where, t, j, r});
      }
  together(threads, [&](const Member& me) {
    const Range mine = me.share(long(tasks.size()));
    for (long i = mine.begin; i < mine.end; i++) {
      const Task& task = tasks[i];
      const Segment& g = *task.segment;
      const long rank = task.where->a_rank;
      const long rows = rank - task.row < 4 ? rank - task.row : 4;
      const auto rows_of = [&](const Task& of) { return (const elem*)s.slots->memory + of.where->a + of.row * s.k; };
      const elem* first = rows_of(task);
      const elem* later = rows_of(tasks[i + TASKS_AHEAD < mine.end ? i + TASKS_AHEAD : i]);
      const elem* a[4];
      for (int r = 0; r < 4; r++) a[r] = first + (r < rows ? r : 0) * s.k;
      const long end = task.begin + TOKENS < g.end ? task.begin + TOKENS : g.end;
      for (long t = task.begin; t < end; t += 4) {
        const elem* x = (const elem*)s.x + t * s.x_stride;
        const long tokens = end - t < 4 ? end - t : 4;
        vf found = {};
        switch (rows == 0 ? 0 : tokens) {
          case 0: break;  // the module is not targeted
          case 1: found = products<T, 1>(x, s.x_stride, a, s.k, later); break;
          case 2: found = products<T, 2>(x, s.x_stride, a, s.k, later); break;
          case 3: found = products<T, 3>(x, s.x_stride, a, s.k, later); break;
          default: found = products<T, 4>(x, s.x_stride, a, s.k, later); break;
        }
        for (long u = 0; u < tokens; u++) {
          elem* h = (elem*)s.h + ((t + u) * s.slices + task.slice) * s.width + task.row;
          for (long r = 0; r < rows; r++) h[r] = T::narrow(found[u * 4 + r]);
          if (task.row + 4 >= rank)
            for (long r = rows; r < s.width - task.row; r++) h[r] = elem{};
        }
      }
    }
  });
}

template <class T>
inline vf load_some(const typename T::elem* p, long count) {
  if (count >= LANES) return T::load16(p);
  typename T::elem some[LANES] = {};
  std::memcpy(some, p, count * sizeof *p);
  return T::load16(some);
}

template <class T>
inline void store_some(typename T::elem* p, vf v, long count) {
  if (count >= LANES) return T::store16(p, v);
  typename T::elem some[LANES];
  T::store16(some, v);
  std::memcpy(p, some, count * sizeof *p);
}

// R tokens by P panels of 16 columns, of which `columns` exist: two panels, so that the dot products of a few tokens
// do not wait for one another.
template <class T, int R, int P>
inline void expand_tile(const uint32_t* h, long h_stride, const uint32_t* b, long panel, long lanes,
                        typename T::elem* y, long y_stride, long columns) {
  vf acc[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) acc[r][p] = load_some<T>(y + r * y_stride + p * LANES, columns - p * LANES);
  for (long i = 0; i < lanes; i++) {
    vu w[P];
    for (int p = 0; p < P; p++) w[p] = load(b + p * panel + i * LANES);
    for (int r = 0; r < R; r++) {
      const vu a = splat(h[r * h_stride + i]);
      for (int p = 0; p < P; p++) acc[r][p] = T::dot(acc[r][p], a, w[p]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) store_some<T>(y + r * y_stride + p * LANES, acc[r][p], columns - p * LANES);
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
  const long width = e.width / T::PER_LANE, h_stride = e.slices * width;
  together(threads, [&](const Member& me) {
    const long panel = width * LANES;
    std::vector<uint32_t> b(2 * panel);
    const Range mine = me.share(long(tasks.size()));
    for (const Segment* g = segments; g < segments + count; g++)
      for (long i = mine.begin; i < mine.end; i++) {
        const Slice& slice = e.slice[tasks[i].slice];
        const Where& where = e.slots->where(g->slot, e.first + tasks[i].slice);
        const long rank = where.b_rank, lanes = (rank + T::PER_LANE - 1) / T::PER_LANE;
        if (rank == 0) continue;
        const long column = tasks[i].column;
        const long columns = slice.out - column;
        const elem* from = (const elem*)e.slots->memory + where.b + column * rank;
        fetch<T>(from + AHEAD * rank, 2 * LANES * rank);
        for (int p = 0; p < 2 && p * LANES < columns; p++) {
          const long rows = columns - p * LANES < LANES ? columns - p * LANES : LANES;
          transpose<T>(from + p * LANES * rank, rank, rank, rows, b.data() + p * panel);
        }
        for (long t = g->begin; t < g->end; t += 8) {
          const uint32_t* h = (const uint32_t*)e.h + t * h_stride + tasks[i].slice * width;
          elem* y = (elem*)e.y + t * e.y_stride + slice.offset + column;
          if (columns > LANES) {
#define CALL(R) expand_tile<T, R, 2>(h, h_stride, b.data(), panel, lanes, y, e.y_stride, columns)
            AIO_SWITCH_ROWS(g->end - t, CALL)
#undef CALL
          } else {
#define CALL(R) expand_tile<T, R, 1>(h, h_stride, b.data(), panel, lanes, y, e.y_stride, columns)
            AIO_SWITCH_ROWS(g->end - t, CALL)
#undef CALL
          }
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
        const elem* gain = (const elem*)slots.memory + begin;
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

// segments [count][slot, begin, end, rank]. h [tokens, slices, width] is zero beyond A's rows; rows of no segment stay as
// they are.
AIO_EXPORT void aio_lora_shrink(int bf16, const void* x, long x_stride, const aio::Slots* slots, long first, void* h,
                                long k, long slices, long width, const int32_t* segments, long count, int threads) {
  const aio::Shrink s{x, x_stride, slots, first, h, k, slices, width};
  const auto* g = (const aio::Segment*)segments;
  bf16 ? aio::shrink<aio::Bf16>(s, g, count, threads) : aio::shrink<aio::F32>(s, g, count, threads);
}

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
