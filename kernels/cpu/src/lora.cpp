// LoRA shrink and expand over segments of tokens that share an adapter, for several fused slices at once.
// LoRA: Hu et al., 2021, arXiv:2106.09685. Tokens grouped by adapter: Punica, Chen et al., 2023, arXiv:2310.18547.
// A slot has A [rank, in] and B [out, rank] of every module that its adapter targets; a table says where. In int8 slots both
// are whole numbers, which are exact in the type that is computed in; what A gives is multiplied by scales of its rows.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "expand.h"
#include "registers.h"
#include "team.h"
#include "transpose.h"

namespace aio {
namespace {

template <class T>
inline vu load_tail(const typename T::elem* p, long count) {
  vu v = {};
  std::memcpy(&v, p, count * sizeof(typename T::elem));
  return v;
}

// A vector of T's elements from memory, and from as many int8 in the same order.
template <class T>
inline vu load_as(const typename T::elem* p) {
  return load((const uint32_t*)p);
}
// Compilers make a loop of __builtin_convertvector here.
inline vf load_int8(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  vf out;
  for (int i = 0; i < 2; i++) {
    const __m256 half = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8 * i))));
    std::memcpy((float*)&out + 8 * i, &half, sizeof half);
  }
  return out;
#else
  vf out;
  for (int i = 0; i < LANES; i++) out[i] = p[i];
  return out;
#endif
}
template <class T>
inline vu load_as(const int8_t* p) {
  if constexpr (T::PER_LANE == 1) {
    return (vu)load_int8(p);
  } else {
#if defined(__AVX512BF16__)
    return (vu)_mm512_cvtne2ps_pbh((__m512)load_int8(p + LANES), (__m512)load_int8(p));
#else
    typename T::elem wide[LANES * T::PER_LANE];
    T::store16(wide, load_int8(p)), T::store16(wide + LANES, load_int8(p + LANES));
    return load((const uint32_t*)wide);
#endif
  }
}
template <class T>
inline vu load_tail_as(const typename T::elem* p, long count) {
  return load_tail<T>(p, count);
}
template <class T>
inline vu load_tail_as(const int8_t* p, long count) {
  int8_t some[LANES * T::PER_LANE] = {};
  std::memcpy(some, p, count);
  return load_as<T>(some);
}

// An adapter is read once a step, from memory: what comes next is asked for early.
inline void fetch(const void* p, long bytes) {
  for (long i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i);
}

// The products of TOKENS tokens with 4 rows of A, from position `i` on as long as there are whole vectors, in a part of each
// of these; acc[t * 4 + r]. Returns where it ended.
template <class T, int TOKENS>
inline long add_part(const typename T::elem* x, long x_stride, const typename T::elem* const (&a)[4], long k, int part,
                     const typename T::elem* later, vf* acc) {
  constexpr long STEP = LANES * T::PER_LANE;
  rf sums[TOKENS][4] = {};
  long i = 0;
  for (; i + STEP <= k; i += STEP) {
    if (part == 0)
      for (int r = 0; r < 4; r++) __builtin_prefetch(later + r * k + i, 0, 2);
    const auto lanes = [&](const typename T::elem* p) { return load_register<ru>(p + i + part * WIDTH * T::PER_LANE); };
#pragma GCC unroll 4
    for (int step = 0; step < Steps<T>::COUNT; step++) {
      ru row[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) row[r] = Steps<T>::right(lanes(a[r]), step);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; t++) {
        const ru token = Steps<T>::right(lanes(x + t * x_stride), step);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) sums[t][r] = Steps<T>::add(sums[t][r], token, row[r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) store_register((float*)&acc[t * 4 + r] + part * WIDTH, sums[t][r]);
  return i;
}

// Products of up to 4 tokens with up to 4 rows of A, of elements of type E: sums[t * 4 + r]. Meanwhile the 4 rows at `later`
// are fetched.
template <class T, class E, int TOKENS>
inline vf products(const typename T::elem* x, long x_stride, const E* const (&a)[4], long k, const E* later) {
  constexpr long STEP = LANES * T::PER_LANE;
  vf acc[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) acc[i] = vf{};  // unrolled here and below, or they leave the registers
  long i = 0;
  if constexpr (std::is_same_v<E, typename T::elem> && PER_VECTOR > 1) {
    constexpr int MOST = TOKENS * 4 + 4 + 3 <= REGISTERS ? TOKENS : 2;  // tokens whose sums have room
    for (int part = 0; part < PER_VECTOR; part++)
      for (int t = 0; t < TOKENS; t += MOST) {
        const auto* from = x + t * x_stride;
        if (TOKENS - t >= MOST)
          i = add_part<T, MOST>(from, x_stride, a, k, part, later, acc + t * 4);
        else
          i = add_part<T, 1>(from, x_stride, a, k, part, later, acc + t * 4);
      }
  }
  for (; i + STEP <= k; i += STEP) {
    vu row[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      row[r] = load_as<T>(a[r] + i);
      __builtin_prefetch(later + r * k + i, 0, 2);
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) {
      const vu token = load((const uint32_t*)(x + t * x_stride + i));
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) acc[t * 4 + r] = T::dot(acc[t * 4 + r], token, row[r]);
    }
  }
  if (i < k) {
    vu row[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) row[r] = load_tail_as<T>(a[r] + i, k - i);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) {
      const vu token = load_tail<T>(x + t * x_stride + i, k - i);
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) acc[t * 4 + r] = T::dot(acc[t * 4 + r], token, row[r]);
    }
  }
  return sums(acc);
}

template <class T, class E>
inline vf products(long tokens, const typename T::elem* x, long x_stride, const E* const (&a)[4], long k, const E* later) {
  switch (tokens) {
    case 1: return products<T, E, 1>(x, x_stride, a, k, later);
    case 2: return products<T, E, 2>(x, x_stride, a, k, later);
    case 3: return products<T, E, 3>(x, x_stride, a, k, later);
    default: return products<T, E, 4>(x, x_stride, a, k, later);
  }
}

template <class T, class E>
inline void widen_row(const E* from, long k, typename T::elem* to) {
  long i = 0;
  for (; i + LANES * T::PER_LANE <= k; i += LANES * T::PER_LANE) store((uint32_t*)(to + i), load_as<T>(from + i));
  if (i < k) {
    const vu tail = load_tail_as<T>(from + i, k - i);
    std::memcpy(to + i, &tail, (k - i) * sizeof *to);
  }
}

struct Shrink {
  const void* x;
  long x_stride;
  const Slots* slots;
  long first;
  void* h;  // [tokens, slices, width]
  long k, slices, width;
};

// E is the type of A's elements.
template <class T, class E>
void shrink(const Shrink& s, const Segment* segments, long count, int threads) {
  using elem = typename T::elem;
  constexpr bool INT8 = !std::is_same_v<E, elem>;
  struct Task {
    const Where* where;
    long begin, end, slice, row, before;  // before: what all tasks before this one cost
    float weight;
  };
  constexpr long TOKENS = 32;      // of a task, so that a long prompt is shared out too
  constexpr long TASKS_AHEAD = 3;  // between the rows in use and those that are fetched
  constexpr long READING = 4;      // tokens that take as long as reading A
  static thread_local std::vector<Task> kept;
  std::vector<Task>& tasks = kept;  // threads of a team that is made here take their maker's
  tasks.clear();
  long cost = 0;
  for (const Segment* g = segments; g < segments + count; g++)
    for (long t = g->begin; t < g->end; t += TOKENS)
      for (long j = 0; j < s.slices; j++) {
        const Where* where = &s.slots->where(g->slot, s.first + j);
        const long end = t + TOKENS < g->end ? t + TOKENS : g->end;
        for (long r = 0; r == 0 || r < where->a_rank; r += 4) {
          tasks.push_back({where, t, end, j, r, cost, g->weight});
          cost += end - t + READING;
        }
      }
  const auto first_from = [&](long least) {
    return std::lower_bound(tasks.begin(), tasks.end(), least, [](const Task& t, long c) { return t.before < c; }) -
           tasks.begin();
  };
  together(threads, [&](const Member& me) {
    std::vector<elem> wide(INT8 ? 4 * s.k : 0);
    const Range costs = me.share(cost), mine = {first_from(costs.begin), first_from(costs.end)};
    for (long i = mine.begin; i < mine.end; i++) {
      const Task& task = tasks[i];
      const long rank = task.where->a_rank;
      const long rows = rank - task.row < 4 ? rank - task.row : 4;
      const auto rows_of = [&](const Task& of) { return (const E*)s.slots->at(of.where->a, sizeof(E)) + of.row * s.k; };
      const E* first = rows_of(task);
      const E* later = rows_of(tasks[i + TASKS_AHEAD < mine.end ? i + TASKS_AHEAD : i]);
      const bool widened = INT8 && task.end - task.begin > 4;  // once for all tokens
      const E* a[4];
      const elem* w[4];
      vf scale = splatf(1.0f);
      for (int r = 0; r < 4; r++) {
        const long row = r < rows ? r : 0;
        a[r] = first + row * s.k;
        w[r] = wide.data() + row * s.k;
        if (INT8 && r < rows) {
          if (widened) widen_row<T>(a[r], s.k, wide.data() + r * s.k);
          const float of_row = ((const float*)s.slots->at(task.where->scale, 1))[task.row + r];
          for (int u = 0; u < 4; u++) scale[u * 4 + r] = of_row;
        }
      }
      for (long t = task.begin; t < task.end; t += 4) {
        const elem* x = (const elem*)s.x + t * s.x_stride;
        const long tokens = task.end - t < 4 ? task.end - t : 4;
        vf found = {};
        if (rows > 0) {  // else the module is not targeted
          found = widened ? products<T, elem>(tokens, x, s.x_stride, w, s.k, w[0])
                          : products<T, E>(tokens, x, s.x_stride, a, s.k, later);
          if (INT8) found *= scale;
          if (task.weight != 1.0f) found *= splatf(task.weight);
        }
        elem narrow[LANES];
        T::store16(narrow, found);
        for (long u = 0; u < tokens; u++) {
          elem* h = (elem*)s.h + ((t + u) * s.slices + task.slice) * s.width + task.row;
          for (long r = 0; r < rows; r++) h[r] = narrow[u * 4 + r];
          if (task.row + 4 >= rank)
            for (long r = rows; r < s.width - task.row; r++) h[r] = elem{};
        }
      }
    }
  });
}

template <class T>
void shrink(const Shrink& s, const Segment* segments, long count, int threads) {
  s.slots->int8 ? shrink<T, int8_t>(s, segments, count, threads)
                : shrink<T, typename T::elem>(s, segments, count, threads);
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

// R tokens by a panel of 16 columns, of which `columns` exist.
template <class T, int R>
inline void expand_tile(const uint32_t* h, long h_stride, const uint32_t* b, long lanes, typename T::elem* y, long y_stride,
                        long columns) {
  vf acc[R];
  for (int r = 0; r < R; r++) acc[r] = load_some<T>(y + r * y_stride, columns);
  add_lanes<T, R>(h, h_stride, b, lanes, acc);
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
        const long column = tasks[i].column, columns = slice.out - column;
        const B<T> from = B<T>(e.slots->at(where.b, sizeof(elem)), rank, *e.slots).from(column);
        const uint32_t* turned[2];
        fetch(from.from(AHEAD).at, 2 * LANES * from.row_bytes());
        for (int p = 0; p < 2 && p * LANES < columns; p++) {
          const long rows = columns - p * LANES < LANES ? columns - p * LANES : LANES;
          turned[p] = aio::panel(from.from(p * LANES), rows, b.data() + p * panel);
        }
        constexpr int MOST = most_rows();
        for (long t = g->begin; t < g->end; t += MOST)
          for (int p = 0; p < 2 && p * LANES < columns; p++) {
            const uint32_t* h = (const uint32_t*)e.h + t * h_stride + tasks[i].slice * width;
            elem* y = (elem*)e.y + t * e.y_stride + slice.offset + column + p * LANES;
#define CALL(R) expand_tile<T, R <= MOST ? R : 1>(h, h_stride, turned[p], lanes, y, e.y_stride, columns - p * LANES)
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

// segments [count][slot, begin, end, rank, weight]. h [tokens, slices, width] is zero beyond A's rows, where a segment is.
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
