// Linears whose weights are four bits, made of any weight at load.
//
// Sixteen or 32 neighbouring inputs of an output are a group, whose weights are q * step + low times the output's scale,
// for q of 0 to 15 and whole numbers `step` and `low`, such that the result is an int8 (two levels of scales, as in
// QServe, Lin et al., 2024, arXiv:2405.04532). So a weight becomes int8 by one multiplication of 16 bits for two of them,
// in which nothing carries over, and one addition; the products are then those of int8 weights, and nothing is rounded on
// the way. A thread's panels are expanded as it comes to them, once for up to 128 rows.
//
// A panel of 16 outputs is [k / 8][16] words, whose low halves of bytes are an int8 lane of tiles.h and the high ones the
// next, then [groups][16] bytes of steps and [groups][16] of lows.
#include <cmath>
#include <vector>

#include "int8_rows.h"
#include "matrix.h"
#include "products.h"

namespace aio {
namespace {

constexpr int LEVELS = 15;                // the largest q
constexpr int STEPS = 16, MOST_STEPS = 17;  // about the widest group's step, and the largest there can be: 17 * 15 = 255

constexpr long GROUP = 32;     // inputs of a group, if their number is a multiple
constexpr long ROWS_TO_EXPAND = 16;  // whose tiles expand the weights for themselves

struct Form {
  long k, group;

  long groups() const { return k / group; }
  long words() const { return k / 8 * LANES; }
  long panel_bytes() const { return words() * long(sizeof(uint32_t)) + 2 * groups() * LANES; }
  const uint32_t* panel(const void* packed, long index) const {
    return (const uint32_t*)((const char*)packed + index * panel_bytes());
  }
  const uint8_t* steps(const uint32_t* panel) const { return (const uint8_t*)(panel + words()); }
  const int8_t* lows(const uint32_t* panel) const { return (const int8_t*)steps(panel) + groups() * LANES; }
};

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint8_t bytes64 __attribute__((vector_size(64)));
typedef uint16_t halves32 __attribute__((vector_size(64)));

// 16 bytes, one to a lane.
inline vu lanes_of(const void* from) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));  // convertvector takes 40 instructions
#elif defined(__AVX2__)
  const auto half = [&](int at) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)from + at))); };
  const __m256i halves[2] = {half(0), half(8)};
  vu v;
  std::memcpy(&v, halves, sizeof v);
  return v;
#else
  bytes16 b;
  std::memcpy(&b, from, sizeof b);
  return __builtin_convertvector(b, vu);
#endif
}

// What makes int8 of a group's bits.
struct Scaling {
  halves32 step;
  bytes64 low;

  Scaling() = default;
  Scaling(const uint8_t* steps, const int8_t* lows) {
    const vu by = lanes_of(steps);
    vu to = lanes_of(lows);
    to |= to << 8;
    step = (halves32)(by | by << 16), low = (bytes64)(to | to << 16);
  }
  inline vu lane(vu four_bits) const { return (vu)((bytes64)((halves32)four_bits * step) + low); }
  inline vu first(vu word) const { return lane(word & 0x0f0f0f0f); }
  inline vu second(vu word) const { return lane((word >> 4) & 0x0f0f0f0f); }
};

// A panel as int8 lanes.
void expand(const Form& form, const uint32_t* panel, uint32_t* out) {
  const uint8_t* step = form.steps(panel);
  const int8_t* low = form.lows(panel);
  for (long g = 0; g < form.groups(); g++, step += LANES, low += LANES) {
    const Scaling scaling(step, low);
    for (long i = 0; i < form.group / 8; i++, panel += LANES, out += 2 * LANES) {
      const vu word = load(panel);
      store(out, scaling.first(word));
      store(out + LANES, scaling.second(word));
    }
  }
}

#if defined(__AVX512VNNI__)
// Int8 lanes that are expanded as they are multiplied.
struct Int4 : Int8 {};
#endif

}  // namespace

#if defined(__AVX512VNNI__)
template <>
struct Steps<Int4> : Steps<Int8> {};

template <>
struct Panel<Int4> {
  using Sums = vi;
  static constexpr long STEP = GROUP / Int8::PER_LANE;

  static long words(long k) { return Form{k, GROUP}.panel_bytes() / long(sizeof(uint32_t)); }

  template <int R, int P>
  static inline void multiply(const uint32_t* x, long x_stride, const uint32_t* w, long panel, int, long begin, long end,
                              FetchSteps fetch, vi (&acc)[R][P]) {
    const Form form{panel * long(sizeof(uint32_t)) / (LANES * (GROUP / 2 + 2)) * GROUP, GROUP};  // by a group's bytes
    for (long k = begin; k < end; k += STEP) {
      for (int f = 0; f < STEP; f++, fetch.from += fetch.step) {
        __builtin_prefetch(fetch.from, 0, 2);
        __builtin_prefetch(fetch.from + fetch.second, 0, 2);
      }
      vu lanes[STEP][P];
      for (int p = 0; p < P; p++) {
        const uint32_t* words = w + p * panel;
        const Scaling scaling(form.steps(words) + k / STEP * LANES, form.lows(words) + k / STEP * LANES);
#pragma GCC unroll 4
        for (long i = 0; i < STEP; i += 2) {
          const vu word = load(words + (k + i) / 2 * LANES);
          lanes[i][p] = scaling.first(word), lanes[i + 1][p] = scaling.second(word);
        }
      }
      for (long i = 0; i < STEP; i++)
        for (int r = 0; r < R; r++) {
          const vu a = splat(x[r * x_stride + k + i]);
          for (int p = 0; p < P; p++) acc[r][p] = Int8::dot(acc[r][p], a, lanes[i][p]);
        }
    }
  }
};
#endif

namespace {

// How a group is stored.
struct Choice {
  int step = 1, low = -8;
  float error = INFINITY;
};

// Tries steps and lows about those that span the group, whose weights are `w`, and takes what is nearest to all (squares).
template <int VECTORS>
Choice nearest_choice(const vf (&w)[VECTORS]) {
  vf top = w[0], bottom = w[0];
  for (int v = 1; v < VECTORS; v++) top = w[v] > top ? w[v] : top, bottom = w[v] < bottom ? w[v] : bottom;
  const float high = max(top), low = -max(-bottom);
  const float middle = (low + high) / 2;
  const int about = int(std::nearbyint((high - low) / LEVELS));
  Choice best;
  for (int step = about > 1 ? about - 1 : 1; step <= about + 1 && step <= MOST_STEPS; step++)
    for (int shift = -2; shift <= 2; shift++) {
      const float wanted = std::nearbyint(middle + step * (0.25f * shift - 0.5f * LEVELS));
      const float bound = float(127 - LEVELS * step);
      const float from = wanted < -128.0f ? -128.0f : wanted > bound ? bound : wanted;
      vf error = {};
      for (int v = 0; v < VECTORS; v++) {
        vf q = (w[v] - from) * (1.0f / step);
        q = q < 0.0f ? vf{} : q;
        q = q > float(LEVELS) ? splatf(LEVELS) : q;
        const vf off = to_float(nearest(q)) * float(step) + from - w[v];
        error += off * off;
      }
      const float total = sum(error);
      if (total < best.error) best = {step, int(from), total};
    }
  return best;
}

// A group of a row, of weights in units of the row's scale: its words, from `out` on, and its step and low. Returns the
// sum of the int8 that it stands for.
template <int VECTORS>
int32_t quantize_group(const float* from, uint32_t* out, uint8_t* step, int8_t* low) {
  vf w[VECTORS];
  for (int v = 0; v < VECTORS; v++) w[v] = loadf(from + v * LANES);
  const Choice choice = nearest_choice<VECTORS>(w);
  *step = uint8_t(choice.step), *low = int8_t(choice.low);
  int32_t total = 0;
  for (int i = 0; i < VECTORS * LANES / 8; i++) {
    uint32_t word = 0;
    for (int j = 0; j < 8; j++) {
      const float at = std::nearbyint((from[8 * i + j] - choice.low) / choice.step);
      const uint32_t q = at > 0.0f ? (at < LEVELS ? uint32_t(at) : LEVELS) : 0;
      total += int32_t(q) * choice.step + choice.low;
      word |= q << (8 * (j % 4) + 4 * (j / 4));
    }
    out[i * LANES] = word;
  }
  return total;
}

template <class T>
void quantize(const void* weight, void* packed, float* scale, int32_t* start, const Form& form, long n, long rotation,
              int threads) {
  const long k = form.k, vectors = form.group / LANES;
  together(threads, [&](const Member& me) {
    std::vector<float> floats(k);
    const Range mine = me.share(n);
    for (long row = mine.begin; row < mine.end; row++) {
      const float largest = rotated<T>((const typename T::elem*)weight + row * k, k, rotation, floats.data());
      float unit = largest / LARGEST;
      for (long g = 0; g < form.groups(); g++) {
        const float* w = floats.data() + g * form.group;
        float low = w[0], high = w[0];
        for (long i = 1; i < form.group; i++) low = w[i] < low ? w[i] : low, high = w[i] > high ? w[i] : high;
        unit = (high - low) / (LEVELS * STEPS) > unit ? (high - low) / (LEVELS * STEPS) : unit;
      }
      const bool finite = largest - largest == 0.0f;
      const float up = finite && unit > 0.0f ? 1.0f / unit : 0.0f;
      for (long i = 0; i < k; i++) floats[i] = finite ? floats[i] * up : 0.0f;
      auto* const panel = (uint32_t*)form.panel(packed, row / LANES);
      int32_t total = 0;
      for (long g = 0; g < form.groups(); g++) {
        uint32_t* const out = panel + g * form.group / 8 * LANES + row % LANES;
        auto* const step = (uint8_t*)form.steps(panel) + g * LANES + row % LANES;
        auto* const low = (int8_t*)form.lows(panel) + g * LANES + row % LANES;
        const float* const w = floats.data() + g * form.group;
        total += vectors == 2 ? quantize_group<2>(w, out, step, low) : quantize_group<1>(w, out, step, low);
      }
      scale[row] = finite ? unit : NAN;
      if (start != nullptr) start[row] = -Int8::ZERO * total;
    }
  });
}

template <class T>
void dequantize(const void* packed, const float* scale, const int64_t* rows, void* out, const Form& form, long count,
                long rotation, int threads) {
  const long k = form.k;
  together(count < 16 ? 1 : threads, [&](const Member& me) {
    std::vector<float> floats(k);
    const Range mine = me.share(count);
    for (long r = mine.begin; r < mine.end; r++) {
      const long row = rows[r], at = row % LANES;
      const uint32_t* panel = form.panel(packed, row / LANES);
      for (long i = 0; i < k; i++) {
        const uint32_t q = panel[i / 8 * LANES + at] >> (8 * (i % 4) + 4 * (i / 4 % 2)) & 15;
        const long g = i / form.group * LANES + at;
        floats[i] = float(int32_t(q) * form.steps(panel)[g] + form.lows(panel)[g]);
      }
      rotate_back<T>(floats.data(), k, rotation, scale[row], (typename T::elem*)out + r * k);
    }
  });
}

// Computes a thread's blocks, whose panels are expanded first: into int8, and those into T if that is another type.
template <class T, class Out>
void multiply_expanded(const Member& me, const Matrix& w, const Product& p, const Linear& l) {
  const Form form{w.k, w.group};
  const long lanes = w.k / Int8::PER_LANE;
  uint32_t* const expanded = room<EXPANDED>(PANELS * lanes * long(sizeof(vu)));
  const auto weights = [&](long first, long panels) -> const uint32_t* {
    for (long i = 0; i < panels; i++) expand(form, form.panel(w.packed, first + i), expanded + i * lanes * LANES);
    if constexpr (T::PER_LANE == Int8::PER_LANE) {
      return expanded;
    } else {
      uint32_t* const wide = room<WIDENED>(PANELS * w.k / T::PER_LANE * long(sizeof(vu)));
      widen<T>(expanded, panels * lanes, wide);
      return wide;
    }
  };
  compute_experts<Out>(me, l, p.beside, p.experts, multiply<T>(l), {w.packed, form.panel_bytes()}, weights);
}

template <class T>
void linear(const Matrix& w, const Product& p) {
  together(p.threads, [&](const Member& me) {
    if (w.start == nullptr) return multiply_expanded<T, T>(me, w, p, p.l);
    const Linear l = with_int8_rows<T>(me, p.l, w.rotation);
#if defined(__AVX512VNNI__)
    if (l.rows <= ROWS_TO_EXPAND && w.group == GROUP) {  // expanded in registers, for each tile anew
      const Form form{w.k, w.group};
      const auto weights = [&](long first, long) { return form.panel(w.packed, first); };
      return compute_experts<T>(me, l, p.beside, p.experts, MULTIPLY<Int4>, {w.packed, form.panel_bytes()}, weights);
    }
#endif
    multiply_expanded<Int8, T>(me, w, p, l);
  });
}

}  // namespace

void multiply_int4(const Matrix& w, const Product& p) { (p.l.bf16 ? linear<Bf16> : linear<F32>)(w, p); }

}  // namespace aio

// weight [n, k] -> packed, n / 16 panels, with scale [n], and, for int8 activations, start [n] (else null). n must be a
// multiple of 16, k of `group`: 16 or 32. `rotation`: see aio_quantize.
AIO_EXPORT void aio_quantize_int4(int bf16, const void* weight, void* packed, float* scale, int32_t* start, long n,
                                  long k, long group, long rotation, int threads) {
  const aio::Form form{k, group};
  bf16 ? aio::quantize<aio::Bf16>(weight, packed, scale, start, form, n, rotation, threads)
       : aio::quantize<aio::F32>(weight, packed, scale, start, form, n, rotation, threads);
}

// out [count, k]: the given rows of the weight that is in effect.
AIO_EXPORT void aio_dequantize_int4(int bf16, const void* packed, const float* scale, const int64_t* rows, void* out,
                                    long count, long k, long group, long rotation, int threads) {
  const aio::Form form{k, group};
  bf16 ? aio::dequantize<aio::Bf16>(packed, scale, rows, out, form, count, rotation, threads)
       : aio::dequantize<aio::F32>(packed, scale, rows, out, form, count, rotation, threads);
}
