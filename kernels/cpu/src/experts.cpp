// What sends tokens to experts and adds up what these make of them; the products are linear.cpp's and lora.cpp's.
//
// All of it in float32 and in orders that depend on one token alone, so that its bits do not depend on the batch.
#include <algorithm>
#include <cmath>
#include <vector>

#include "expand.h"
#include "experts.h"
#include "team.h"

namespace aio {
namespace {

template <class T>
inline float dot(const typename T::elem* a, const typename T::elem* b, long n) {
  vf acc = {};
  for (long i = 0; i < n; i += LANES) acc = multiply_add(T::load16(a + i), T::load16(b + i), acc);
  return sum(acc);
}

template <class T>
inline float element(const Slots& slots, const char* p, long i) {
  return slots.int8 ? float(((const int8_t*)p)[i]) : T::widen(((const typename T::elem*)p)[i]);
}

// Adds an adapter's B A x, times a weight, to y [n], and then what scales and shifts it.
template <class T>
void adapt(const typename T::elem* x, long k, const Slots& slots, const Where& where, float weight, float* y, long n) {
  using elem = typename T::elem;
  const long size = sizeof(elem);
  std::vector<float> h(where.a_rank);
  for (long r = 0; r < where.a_rank; r++) {
    const char* a = slots.at(where.a, size);
    float acc = 0;
    if (slots.int8) {
      for (long i = 0; i < k; i++) acc += T::widen(x[i]) * element<T>(slots, a, r * k + i);
      acc *= ((const float*)slots.at(where.scale, 1))[r];
    } else {
      acc = dot<T>(x, (const elem*)a + r * k, k);
    }
    h[r] = acc * weight;
  }
  const B<T> b(slots.at(where.b, size), where.b_rank, slots);
  const long each = slots.int8 ? Int8::PER_LANE : T::PER_LANE;  // elements of a lane
  for (long j = 0; j < n; j++) {
    float acc = 0;
    const bool turned = b.turned && j < n / LANES * LANES;
    for (long r = 0; r < b.rank; r++) {
      const long lane = (r / each * LANES + j % LANES) * each + r % each;
      acc += element<T>(slots, (const char*)b.at, turned ? j / LANES * LANES * b.rank + lane : j * b.rank + r) * h[r];
    }
    y[j] += acc;
  }
  if (where.affine < 0) return;
  const elem* gain = (const elem*)slots.at(where.affine, size);
  for (long j = 0; j < n; j++) y[j] += T::widen(gain[j]) * y[j] + T::widen(gain[n + j]);
}

template <class T>
void scores(const void* x_, long k, const void* weight, const void* bias_, long n, float* y, long rows, int threads) {
  using elem = typename T::elem;
  const elem *x = (const elem*)x_, *bias = (const elem*)bias_;
  together(threads, [&](const Member& me) {
    const Range mine = me.share(rows * n);
    for (long i = mine.begin; i < mine.end; i++)
      y[i] = dot<T>(x + i / n * k, (const elem*)weight + i % n * k, k) + (bias == nullptr ? 0.0f : T::widen(bias[i % n]));
  });
}

template <class T>
void adapt_scores(const void* x_, long k, long n, const Slots& slots, long place, const Segment* segments, long count,
                  float* y, int threads) {
  const auto* x = (const typename T::elem*)x_;
  together(threads, [&](const Member& me) {
    for (const Segment* g = segments; g < segments + count; g++) {
      const Where& where = slots.where(g->slot, place);
      const Range mine = me.share(g->end - g->begin);
      for (long t = g->begin + mine.begin; t < g->begin + mine.end; t++)
        adapt<T>(x + t * k, k, slots, where, g->weight, y + t * n, n);
    }
  });
}

template <class T>
void total(const void* y_, const void* shared_, const float* gate, const Routes& r, void* out_, long size, int threads) {
  using elem = typename T::elem;
  const elem *y = (const elem*)y_, *shared = (const elem*)shared_;
  together(threads, [&](const Member& me) {
    const Range mine = me.share(r.tokens);
    for (long t = mine.begin; t < mine.end; t++) {
      const float sigmoid = shared == nullptr ? 0 : 1 / (1 + std::exp(-gate[t]));
      for (long i = 0; i < size; i += LANES) {
        vf acc = {};
        for (long j = 0; j < r.per_token; j++) {
          const long at = t * r.per_token + j;
          acc = multiply_add(T::load16(y + r.row[at] * size + i), splatf(r.weight[at]), acc);
        }
        if (shared != nullptr) acc = multiply_add(T::load16(shared + t * size + i), splatf(sigmoid), acc);
        T::store16((elem*)out_ + t * size + i, acc);
      }
    }
  });
}

}  // namespace

void Routes::choose(const float* scores, bool normalized, int threads) const {
  together(threads, [&](const Member& me) {
    std::vector<std::pair<float, int32_t>> order(experts);
    const Range mine = me.share(tokens);
    for (long t = mine.begin; t < mine.end; t++) {
      const float* s = scores + t * experts;
      const float top = *std::max_element(s, s + experts);
      float all = 0, some = 0;
      for (long e = 0; e < experts; e++) {
        const float p = std::exp(s[e] - top);
        all += p;
        // A token that is not finite goes to the first experts, and stays so.
        order[e] = {std::isnan(p) ? -1.0f : p, int32_t(e)};
      }
      const auto better = [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; };
      std::partial_sort(order.begin(), order.begin() + per_token, order.end(), better);
      for (long j = 0; j < per_token; j++) some += order[j].first;
      for (long j = 0; j < per_token; j++) {
        chosen[t * per_token + j] = order[j].second;
        weight[t * per_token + j] = std::isnan(all) ? all : order[j].first / (normalized ? some : all);
      }
    }
  });
}

void Routes::sort() const {
  std::fill(begin, begin + experts + 1, 0);
  const long rows = tokens * per_token;
  for (long i = 0; i < rows; i++) begin[chosen[i] + 1]++;
  for (long e = 0; e < experts; e++) begin[e + 1] += begin[e];
  std::vector<int32_t> next(begin, begin + experts);
  for (long i = 0; i < rows; i++) {
    row[i] = next[chosen[i]]++;
    token[row[i]] = int32_t(i / per_token);
  }
}

long Routes::segments(const Segment* of, long count, long per_slot, long per_expert, Segment* out) const {
  long found = 0;
  for (long e = 0; e < experts; e++) {
    const Segment* g = of;
    for (long i = begin[e]; i < begin[e + 1]; i++) {
      while (g < of + count && g->end <= token[i]) g++;
      if (g == of + count) break;
      if (token[i] < g->begin) continue;
      const int32_t place = int32_t(g->slot * per_slot + e * per_expert);
      Segment* const last = found > 0 ? out + found - 1 : nullptr;
      if (last != nullptr && last->slot == place && last->end == i && last->weight == g->weight)
        last->end++;
      else
        out[found++] = {place, int32_t(i), int32_t(i + 1), g->rank, g->weight};
    }
  }
  return found;
}

void Routes::spread(const void* x, void* out, long bytes, int threads) const {
  together(threads, [&](const Member& me) {
    const Range mine = me.share(tokens * per_token);
    for (long i = mine.begin; i < mine.end; i++)
      std::memcpy((char*)out + i * bytes, (const char*)x + token[i] * bytes, bytes);
  });
}

void small_linear(bool bf16, const void* x, long k, const void* weight, const void* bias, long n, float* y, long rows,
                  int threads) {
  bf16 ? scores<Bf16>(x, k, weight, bias, n, y, rows, threads) : scores<F32>(x, k, weight, bias, n, y, rows, threads);
}

void adapt_small_linear(bool bf16, const void* x, long k, long n, const Slots& slots, long place, const Segment* segments,
                        long count, float* y, int threads) {
  bf16 ? adapt_scores<Bf16>(x, k, n, slots, place, segments, count, y, threads)
       : adapt_scores<F32>(x, k, n, slots, place, segments, count, y, threads);
}

void Routes::total(bool bf16, const void* y, const void* shared, const float* gate, void* out, long size,
                   int threads) const {
  bf16 ? aio::total<Bf16>(y, shared, gate, *this, out, size, threads)
       : aio::total<F32>(y, shared, gate, *this, out, size, threads);
}

}  // namespace aio
