// LoRA shrink over segments of tokens that share an adapter, for several fused slices at once: h = A x.
// LoRA: Hu et al., 2021, arXiv:2106.09685. Tokens grouped by adapter: Punica, Chen et al., 2023, arXiv:2310.18547.
// In int8 slots A is whole numbers, which are exact in the type that is computed in; what it gives is multiplied by scales of
// its rows.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "fixed.h"
#include "team.h"
#include "tile_registers.h"
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
    typename T::elem wide[LANES * T::PER_LANE];
    T::store16(wide, load_int8(p)), T::store16(wide + LANES, load_int8(p + LANES));
    return load((const uint32_t*)wide);
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

// Adds products of up to 4 tokens with up to 4 rows of A, of elements of type E, to acc[t * 4 + r], by lane. Meanwhile the 4
// rows at `later` are fetched.
template <class T, class E, int TOKENS>
inline void add_products(const typename T::elem* x, long x_stride, const E* const (&a)[4], long k, const E* later, vf* out) {
  constexpr long STEP = LANES * T::PER_LANE;
  vf acc[TOKENS * 4];
#pragma GCC unroll 16
  for (int i = 0; i < TOKENS * 4; i++) acc[i] = vf{};  // unrolled here and below, or they leave the registers
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
#pragma GCC unroll 16
  for (int j = 0; j < TOKENS * 4; j++) out[j] = acc[j];
}

template <class T, class E>
inline void add_products(long tokens, const typename T::elem* x, long x_stride, const E* const (&a)[4], long k, const E* later,
                         vf* acc) {
  switch (tokens) {
    case 1: return add_products<T, E, 1>(x, x_stride, a, k, later, acc);
    case 2: return add_products<T, E, 2>(x, x_stride, a, k, later, acc);
    case 3: return add_products<T, E, 3>(x, x_stride, a, k, later, acc);
    default: return add_products<T, E, 4>(x, x_stride, a, k, later, acc);
  }
}

// Rows of int8 as T's elements.
template <class T>
struct NotFixed {
  using Wide = typename T::elem;

  NotFixed(const void*, long, long) {}

  static void widen(const int8_t* from, long k, const int8_t*, Wide* to) {
    long i = 0;
    for (; i + LANES * T::PER_LANE <= k; i += LANES * T::PER_LANE) store((uint32_t*)(to + i), load_as<T>(from + i));
    if (i < k) {
      const vu tail = load_tail_as<T>(from + i, k - i);
      std::memcpy(to + i, &tail, (k - i) * sizeof *to);
    }
  }
};

#if defined(AIO_FIXED)
// A thread's tokens as int8 is multiplied by them where T's rows are FIXED.
template <class T>
class FixedTokens {
 public:
  using Wide = int16_t;

  FixedTokens(const void* x, long x_stride, long k) : x_((const typename T::elem*)x), x_stride_(x_stride), k_(k) {}

  void use(long begin, long end) {
    if (begin == begin_ && end == end_) return;
    begin_ = begin, end_ = end;
    rows_ = room<FIXED_INPUT>((end - begin) * words_ * long(sizeof(uint32_t)));
    for (long t = begin; t < end; t++) FixedInput::make(x_ + t * x_stride_, k_, rows_ + (t - begin) * words_);
  }

  template <class E>
  void add_products(long tokens, long first, const E* const (&a)[4], const int8_t* later, vf* acc) const {
    const uint32_t* const row = rows_ + (first - begin_) * words_;
    switch (tokens) {
      case 1: return add_fixed<1>(row, words_, a, k_, later, acc);
      case 2: return add_fixed<2>(row, words_, a, k_, later, acc);
      case 3: return add_fixed<3>(row, words_, a, k_, later, acc);
      default: return add_fixed<4>(row, words_, a, k_, later, acc);
    }
  }

  static void widen(const int8_t* from, long k, const int8_t* later, Wide* to) {
    for (long i = 0; i < k; i += 64) __builtin_prefetch(later + i, 0, 2);
    FixedInput::widen(from, k, to);
  }

  float scale(long t) const { return FixedInput::scale(rows_ + (t - begin_) * words_, k_); }

 private:
  const typename T::elem* x_;
  const long x_stride_, k_, words_ = FixedInput::words(k_);
  long begin_ = -1, end_ = -1;
  uint32_t* rows_ = nullptr;
};
#else
template <class T>
struct FixedTokens {};
#endif

struct Shrink {
  const void* x;
  long x_stride;
  const Slots* slots;
  long first;
  void* h;  // [tokens, slices, width]
  long k, slices, width;
};

#if defined(AIO_TILES)
// A thread's tokens, turned: pairs of 16 of them as lanes [k lanes][16 tokens], right operands of tile registers.
class TurnedTokens {
 public:
  TurnedTokens(const Shrink& s, long tokens)
      : x_((const uint16_t*)s.x), x_stride_(s.x_stride), k_(s.k), tokens_(tokens), words_(s.k / Bf16::PER_LANE * LANES),
        turned_(room<TURNED_TOKENS>(2 * words_ * long(sizeof(uint32_t)))),
        last_((uint16_t*)room<LAST_TOKENS>(LANES * s.k * long(sizeof(uint16_t)))) {}

  // The lanes of the 16 tokens from `first` on.
  const uint32_t* at(long first) {
    const long index = first / LANES % 2, count = tokens_ - first < LANES ? tokens_ - first : LANES;
    uint32_t* const out = turned_ + index * words_;
    if (first_[index] == first) return out;
    first_[index] = first;
    const uint16_t* from = x_ + first * x_stride_;
    if (count == LANES) {
      transpose<Bf16>(from, x_stride_, k_, LANES, out);
      return out;
    }
    for (long t = 0; t < count; t++) std::copy_n(from + t * x_stride_, k_, last_ + t * k_);
    transpose<Bf16>(last_, k_, k_, LANES, out);  // what follows the last token may be anything
    return out;
  }

 private:
  const uint16_t* x_;
  const long x_stride_, k_, tokens_, words_;
  uint32_t* turned_;
  uint16_t* last_;
  long first_[2] = {-1, -1};
};

// Products of up to 16 rows of A, k elements each, with P times 16 tokens. Meanwhile the rows at `later` are fetched.
template <int P>
void products_of_rows(const uint16_t* a, long k, const uint32_t* tokens, const uint16_t* later, vf (*sums)[TILE_ROWS]) {
  const long lanes = k / Bf16::PER_LANE;
  unrolled<P>([](auto p) { zero_tile<p>(); });
  for (long i = 0; i < lanes; i += LANES) {
    for (long r = 0; r < TILE_ROWS; r++) __builtin_prefetch(later + r * k + i * Bf16::PER_LANE, 0, 2);
    add_tile_products<Bf16, 1, P, LEFT, RIGHT>(
        [&](auto) { load_tile<LEFT>((const uint32_t*)a + i, k * long(sizeof(uint16_t))); },
        [&](auto p) { load_tile<RIGHT>(tokens + (p * lanes + i) * LANES, TILE_BYTES); });
  }
  unrolled<P>([&](auto p) { store_tile<p>(sums[p], TILE_BYTES); });
}

// All of it in tile registers.
void shrink_in_tiles(const Shrink& s, const Segment* segments, long count, int threads) {
  struct Task {
    const Where* where;
    long begin, end, slice, row, rows;  // tokens of a pair of 16
    float weight;
  };
  std::vector<Task> tasks;
  for (const Segment* g = segments; g < segments + count; g++)
    for (long t = g->begin, end; t < g->end; t = end) {
      end = (t / (2 * LANES) + 1) * (2 * LANES);
      if (end > g->end) end = g->end;
      for (long j = 0; j < s.slices; j++) {
        const Where* where = &s.slots->where(g->slot, s.first + j);
        for (long r = 0; r == 0 || r < where->a_rank; r += TILE_ROWS)
          tasks.push_back({where, t, end, j, r, where->a_rank - r < TILE_ROWS ? where->a_rank - r : TILE_ROWS, g->weight});
      }
    }
  together(threads, [&](const Member& me) {
    Tiles tiles;
    TurnedTokens turned(s, segments[count - 1].end);
    const Range mine = me.share(long(tasks.size()));
    for (long i = mine.begin; i < mine.end; i++) {
      const Task& task = tasks[i];
      const auto output = [&](long t) { return (uint16_t*)s.h + (t * s.slices + task.slice) * s.width; };
      if (task.row + task.rows >= task.where->a_rank)
        for (long t = task.begin; t < task.end; t++)
          std::fill(output(t) + task.where->a_rank, output(t) + s.width, uint16_t{});
      if (task.rows == 0) continue;  // the module is not targeted
      const auto rows_of = [&](const Task& of) {
        return (const uint16_t*)s.slots->at(of.where->a, sizeof(uint16_t)) + of.row * s.k;
      };
      const uint16_t* const later = rows_of(tasks[i + 1 < mine.end ? i + 1 : i]);
      const long first = task.begin / LANES * LANES;
      const bool two = task.end > first + LANES;
      const uint32_t* const tokens = turned.at(first);
      if (two) turned.at(first + LANES);  // behind the first
      tiles.use(int(task.rows));
      alignas(64) vf sums[2][TILE_ROWS], of_tokens[2][TILE_ROWS];
      (two ? products_of_rows<2> : products_of_rows<1>)(rows_of(task), s.k, tokens, later, sums);
      for (int p = 0; p <= int(two); p++)
        transpose<F32>((const float*)sums[p], LANES, LANES, LANES, (uint32_t*)of_tokens[p]);
      for (long t = task.begin; t < task.end; t++) {
        const vf found = of_tokens[(t - first) / LANES][(t - first) % LANES] * splatf(task.weight);
        store_some<Bf16>(output(t) + task.row, found, task.rows);
      }
    }
  });
}
#endif

// E is the type of A's elements.
template <class T, class E>
void shrink(const Shrink& s, const Segment* segments, long count, int threads) {
  using elem = typename T::elem;
  constexpr bool INT8 = !std::is_same_v<E, elem>, IS_FIXED = INT8 && FIXED<T>;
  struct Task {
    const Where* where;
    long begin, end, slice, row, rows, before;  // before: what all tasks before this one cost
    float weight;
  };
  constexpr long TOKENS = 32;  // of a task, so that a long prompt is shared out too
  constexpr long READING = 4;  // tokens that take as long as reading A
  static thread_local std::vector<Task> kept;
  std::vector<Task>& tasks = kept;  // threads of a team that is made here take their maker's
  tasks.clear();
  long cost = 0;
  for (const Segment* g = segments; g < segments + count; g++)
    for (long t = g->begin; t < g->end; t += TOKENS)
      for (long j = 0; j < s.slices; j++) {
        const Where* where = &s.slots->where(g->slot, s.first + j);
        const long end = t + TOKENS < g->end ? t + TOKENS : g->end;
        const long most = end - t == 1 ? LANES : 4;  // rows, such that with the tokens they fill a vector
        for (long r = 0; r == 0 || r < where->a_rank; r += most) {
          const long rows = where->a_rank - r < most ? where->a_rank - r : most;
          tasks.push_back({where, t, end, j, r, rows, cost, g->weight});
          cost += (end - t + READING) * (rows + 3) / 4;
        }
      }
  const auto first_from = [&](long least) {
    return std::lower_bound(tasks.begin(), tasks.end(), least, [](const Task& t, long c) { return t.before < c; }) -
           tasks.begin();
  };
  together(threads, [&](const Member& me) {
    using Tokens = std::conditional_t<IS_FIXED, FixedTokens<T>, NotFixed<T>>;
    using Wide = typename Tokens::Wide;
    Tokens fixed(s.x, s.x_stride, s.k);
    const Range costs = me.share(cost), mine = {first_from(costs.begin), first_from(costs.end)};
    for (long i = mine.begin; i < mine.end; i++) {
      const Task& task = tasks[i];
      const auto output = [&](long t) { return (elem*)s.h + (t * s.slices + task.slice) * s.width; };
      if (task.row + task.rows >= task.where->a_rank)
        for (long t = task.begin; t < task.end; t++)
          std::fill(output(t) + task.where->a_rank, output(t) + s.width, elem{});
      if (task.rows == 0) continue;  // the module is not targeted
      const auto rows_of = [&](const Task& of) { return (const E*)s.slots->at(of.where->a, sizeof(E)) + of.row * s.k; };
      const long ahead = task.end - task.begin == 1 ? 1 : 3;  // tasks between the rows in use and those that are fetched
      const E* const first = rows_of(task);
      const E* const later = rows_of(tasks[i + ahead < mine.end ? i + ahead : i]);
      const float* const scale = INT8 ? (const float*)s.slots->at(task.where->scale, 1) + task.row : nullptr;
      if constexpr (IS_FIXED) fixed.use(task.begin, task.end);
      // Products of some tokens with 4 of the task's rows, from r on, which lie `stride` apart.
      const auto add = [&](long tokens, long t, const auto* a, long stride, long r, vf* acc) {
        using Row = std::decay_t<decltype(*a)>;
        const Row* rows[4];
        for (int j = 0; j < 4; j++) rows[j] = a + (r + j < task.rows ? r + j : r) * stride;
        const elem* const x = (const elem*)s.x + t * s.x_stride;
        if constexpr (IS_FIXED)
          fixed.add_products(tokens, t, rows, later + r * s.k, acc);
        else if constexpr (std::is_same_v<Row, E>)
          add_products<T, E>(tokens, x, s.x_stride, rows, s.k, later + r * s.k, acc);
        else
          add_products<T, Row>(tokens, x, s.x_stride, rows, s.k, a, acc);
      };
      const auto scaled = [&](vf found, vf of_tokens, vf of_rows) {
        if (IS_FIXED) found *= of_tokens;
        if (INT8) found *= of_rows;
        if (task.weight != 1.0f) found *= splatf(task.weight);
        return found;
      };
      if (task.end - task.begin == 1) {
        vf acc[16] = {}, of_token = {};
        for (long r = 0; r < task.rows; r += 4) add(1, task.begin, first, s.k, r, acc + r);
        if constexpr (IS_FIXED) of_token = splatf(fixed.scale(task.begin));
        const vf found = scaled(sums(acc), of_token, INT8 ? load_some<F32>(scale, task.rows) : vf{});
        store_some<T>(output(task.begin) + task.row, found, task.rows);
        continue;
      }
      // Rows of int8 are widened once for all tokens, and the later ones are fetched meanwhile.
      const bool widened = INT8 && task.end - task.begin > 4;
      const long stride = IS_FIXED ? (s.k + 2 * LANES - 1) / (2 * LANES) * (2 * LANES) : s.k;
      Wide* const wide = widened ? (Wide*)room<WIDE_A>(4 * stride * long(sizeof(Wide))) : nullptr;
      vf of_rows = splatf(1.0f), of_tokens = of_rows;
      if constexpr (INT8)
        for (int r = 0; r < task.rows; r++) {
          if (widened) Tokens::widen(first + r * s.k, s.k, later + r * s.k, wide + r * stride);
          for (int u = 0; u < 4; u++) of_rows[u * 4 + r] = scale[r];
        }
      for (long t = task.begin; t < task.end; t += 4) {
        const long tokens = task.end - t < 4 ? task.end - t : 4;
        vf acc[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) acc[j] = vf{};
        widened ? add(tokens, t, wide, stride, 0, acc) : add(tokens, t, first, s.k, 0, acc);
        if constexpr (IS_FIXED)
          for (int j = 0; j < 4 * tokens; j++) of_tokens[j] = fixed.scale(t + j / 4);
        elem narrow[LANES];
        T::store16(narrow, scaled(sums(acc), of_tokens, of_rows));
        for (long u = 0; u < tokens; u++) std::copy_n(narrow + 4 * u, task.rows, output(t + u) + task.row);
      }
    }
  });
}

template <class T>
void shrink(const Shrink& s, const Segment* segments, long count, int threads) {
#if defined(AIO_TILES)
  if constexpr (T::PER_LANE == 2)
    if (!s.slots->int8 && s.k % (2 * LANES) == 0 && count > 0) return shrink_in_tiles(s, segments, count, threads);
#endif
  s.slots->int8 ? shrink<T, int8_t>(s, segments, count, threads)
                : shrink<T, typename T::elem>(s, segments, count, threads);
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
