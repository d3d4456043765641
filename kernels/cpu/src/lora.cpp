// LoRA shrink and expand over segments of tokens that share an adapter, for several fused slices at once.
//
// LoRA: Hu et al., 2021, arXiv:2106.09685. Tokens grouped by adapter: Punica, Chen et al., 2023, arXiv:2310.18547.
// The pools hold A [slices * R, in] and B [out, R] of every slot, slot_stride elements apart; only an adapter's own rank
// is computed.
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
  const void* a;
  void* h;  // [tokens, slices, max_rank]
  long slot_stride, k, slices, max_rank;
};

template <class T>
void shrink(const Shrink& s, const Segment* segments, long count, int threads) {
  using elem = typename T::elem;
  struct Task {
    const Segment* segment;
    long begin, slice, row;
  };
  constexpr long TOKENS = 32;     // of a task, so that a long prompt is shared out too
  constexpr long TASKS_AHEAD = 3;  // between the rows in use and those that are fetched
  std::vector<Task> tasks;
  for (const Segment* g = segments; g < segments + count; g++)
    for (long t = g->begin; t < g->end; t += TOKENS)
      for (long j = 0; j < s.slices; j++)
        for (long r = 0; r == 0 || r < g->rank; r += 4) tasks.push_back({g, t, j, r});
  together(threads, [&](const Member& me) {
    const Range mine = me.share(long(tasks.size()));
    for (long i = mine.begin; i < mine.end; i++) {
      const Task& task = tasks[i];
      const Segment& g = *task.segment;
      const long rows = g.rank - task.row < 4 ? g.rank - task.row : 4;
      const auto rows_of = [&](const Task& of) {
        return (const elem*)s.a + of.segment->slot * s.slot_stride + (of.slice * s.max_rank + of.row) * s.k;
      };
      const elem* first = rows_of(task);
      const elem* later = rows_of(tasks[i + TASKS_AHEAD < mine.end ? i + TASKS_AHEAD : i]);
      const elem* a[4];
      for (int r = 0; r < 4; r++) a[r] = first + (r < rows ? r : 0) * s.k;
      const long end = task.begin + TOKENS < g.end ? task.begin + TOKENS : g.end;
      for (long t = task.begin; t < end; t += 4) {
        const elem* x = (const elem*)s.x + t * s.x_stride;
        const long tokens = end - t < 4 ? end - t : 4;
        vf found;
        switch (tokens) {
          case 1: found = products<T, 1>(x, s.x_stride, a, s.k, later); break;
          case 2: found = products<T, 2>(x, s.x_stride, a, s.k, later); break;
          case 3: found = products<T, 3>(x, s.x_stride, a, s.k, later); break;
          default: found = products<T, 4>(x, s.x_stride, a, s.k, later); break;
        }
        for (long u = 0; u < tokens; u++) {
          elem* h = (elem*)s.h + ((t + u) * s.slices + task.slice) * s.max_rank + task.row;
          for (long r = 0; r < rows; r++) h[r] = T::narrow(found[u * 4 + r]);
          if (task.row + 4 >= g.rank)
            for (long r = rows; r < s.max_rank - task.row; r++) h[r] = elem{};
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
  const void* h;  // [tokens, slices, max_rank]
  const Slice* slice;
  long slices, max_rank;
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
  const long width = (e.max_rank + T::PER_LANE - 1) / T::PER_LANE;
  // h as whole lanes: where it is, or copied if a rank of 1 leaves half a lane.
  const bool whole = e.max_rank % T::PER_LANE == 0;
  const long h_stride = e.slices * width;
  const uint32_t* lanes_of_h = (const uint32_t*)e.h;
  std::vector<uint32_t> copy;
  if (!whole) {
    const long begin = segments[0].begin, end = segments[count - 1].end;
    copy.resize(end * h_stride);
    for (long i = begin * e.slices; i < end * e.slices; i++)
      std::memcpy(&copy[i * width], (const elem*)e.h + i * e.max_rank, e.max_rank * sizeof(elem));
    lanes_of_h = copy.data();
  }
  together(threads, [&](const Member& me) {
    const long panel = width * LANES;
    std::vector<uint32_t> b(2 * panel);
    const Range mine = me.share(long(tasks.size()));
    for (const Segment* g = segments; g < segments + count; g++) {
      const long lanes = (g->rank + T::PER_LANE - 1) / T::PER_LANE;
      for (long i = mine.begin; i < mine.end; i++) {
        const Slice& slice = e.slice[tasks[i].slice];
        const long column = tasks[i].column;
        const long columns = slice.out - column;
        fetch<T>((const elem*)slice.b + g->slot * slice.b_stride + (column + AHEAD) * e.max_rank, 2 * LANES * e.max_rank);
        for (int p = 0; p < 2 && p * LANES < columns; p++) {
          const long rows = columns - p * LANES < LANES ? columns - p * LANES : LANES;
          const elem* from = (const elem*)slice.b + g->slot * slice.b_stride + (column + p * LANES) * e.max_rank;
          transpose<T>(from, e.max_rank, g->rank, rows, b.data() + p * panel);
        }
        for (long t = g->begin; t < g->end; t += 8) {
          const uint32_t* h = lanes_of_h + t * h_stride + tasks[i].slice * width;
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
    }
  });
}

template <class T>
void affine(void* y_, long y_stride, const Slice* slice, long slices, const Segment* segments, long count,
            int threads) {
  using elem = typename T::elem;
  long products = 0;
  for (const Segment* g = segments; g < segments + count; g++) products += (g->end - g->begin) * slice[0].out;
  together(products < 8192 ? 1 : threads, [&](const Member& me) {
    for (const Segment* g = segments; g < segments + count; g++)
      for (long j = 0; j < slices; j++) {
        const elem* gain = (const elem*)slice[j].affine + g->slot * slice[j].affine_stride;
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

// segments [count][slot, begin, end, rank]. h [tokens, slices, max_rank] is zero beyond an adapter's rank; rows of no
// segment stay as they are.
AIO_EXPORT void aio_lora_shrink(int bf16, const void* x, long x_stride, const void* a, void* h, long slot_stride,
                                long k, long slices, long max_rank, const int32_t* segments, long count, int threads) {
  const aio::Shrink s{x, x_stride, a, h, slot_stride, k, slices, max_rank};
  const auto* g = (const aio::Segment*)segments;
  bf16 ? aio::shrink<aio::Bf16>(s, g, count, threads) : aio::shrink<aio::F32>(s, g, count, threads);
}

// slice [slices], a Slice each; y += B h.
AIO_EXPORT void aio_lora_expand(int bf16, const void* h, const void* slice, long slices, long max_rank, void* y,
                                long y_stride, const int32_t* segments, long count, int threads) {
  const aio::Expand e{h, (const aio::Slice*)slice, slices, max_rank, y, y_stride};
  const auto* g = (const aio::Segment*)segments;
  bf16 ? aio::expand<aio::Bf16>(e, g, count, threads) : aio::expand<aio::F32>(e, g, count, threads);
}

// y = y + gain * y + shift, for what DoRA and trained biases come to.
AIO_EXPORT void aio_lora_affine(int bf16, void* y, long y_stride, const void* slice, long slices,
                                const int32_t* segments, long count, int threads) {
  const auto* s = (const aio::Slice*)slice;
  const auto* g = (const aio::Segment*)segments;
  bf16 ? aio::affine<aio::Bf16>(y, y_stride, s, slices, g, count, threads)
       : aio::affine<aio::F32>(y, y_stride, s, slices, g, count, threads);
}
