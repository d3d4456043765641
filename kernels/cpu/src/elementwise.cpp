// The small operations of a decoder layer, each one pass over its data.
#include <cmath>

#include "ops.h"
#include "quantized_cache.h"
#include "team.h"

namespace aio {
namespace {

// Threads are worth their start only for enough elements; within a step they are there.
inline int worth(long elements, int threads) { return elements < 8192 ? 1 : threads; }

// What a root-mean-square norm is like (Zhang and Sennrich, 2019, arXiv:1910.07467): times the weight, after it is rounded
// to the element type; or times the weight plus `offset`, rounded once.
struct NormRule {
  float eps;
  bool rounded;
  float offset;
};

template <class T>
float squares(const typename T::elem* x, long size) {
  vf found = vf{};
  float rest = 0.0f;
  long i = 0;
  for (; i + LANES <= size; i += LANES) {
    const vf v = T::load16(x + i);
    found = multiply_add(v, v, found);
  }
  for (; i < size; i++) rest += T::widen(x[i]) * T::widen(x[i]);
  return sum(found) + rest;
}

// out = norm(x) * weight; `out` may be `x`.
template <class T>
void norm_row(const typename T::elem* x, const typename T::elem* weight, typename T::elem* out, long size,
              const NormRule& rule) {
  const float scale = 1.0f / std::sqrt(squares<T>(x, size) / float(size) + rule.eps);
  long i = 0;
  if (!rule.rounded) {
    for (; i + LANES <= size; i += LANES)
      T::store16(out + i, T::load16(x + i) * scale * (T::load16(weight + i) + rule.offset));
    for (; i < size; i++) out[i] = T::narrow(T::widen(x[i]) * scale * (T::widen(weight[i]) + rule.offset));
    return;
  }
  for (; i + LANES <= size; i += LANES) {
    T::store16(out + i, T::load16(x + i) * scale);
    T::store16(out + i, T::load16(out + i) * T::load16(weight + i));
  }
  for (; i < size; i++) out[i] = T::narrow(T::widen(T::narrow(T::widen(x[i]) * scale)) * T::widen(weight[i]));
}

// hidden += factor * delta (if there is one), rounded to the element type, and its norm (if there is a weight). The delta
// is normed before that, in place, if it has a weight.
template <class T>
void add_rms_norm(void* hidden_, void* delta_, const void* delta_weight, const void* weight, void* out, long rows, long size,
                  float factor, const NormRule& rule, int threads) {
  using elem = typename T::elem;
  together(worth(rows * size, threads), [&](const Member& me) {
    const Range mine = me.share(rows);
    for (long row = mine.begin; row < mine.end; row++) {
      elem* hidden = (elem*)hidden_ + row * size;
      if (delta_ != nullptr) {
        elem* delta = (elem*)delta_ + row * size;
        if (delta_weight != nullptr) norm_row<T>(delta, (const elem*)delta_weight, delta, size, rule);
        long i = 0;
        for (; i + LANES <= size; i += LANES) 
          T::store16(hidden + i, T::load16(hidden + i) + T::load16(delta + i) * factor);
        for (; i < size; i++) hidden[i] = T::narrow(T::widen(hidden[i]) + T::widen(delta[i]) * factor);
      }
      if (weight != nullptr) norm_row<T>(hidden, (const elem*)weight, (elem*)out + row * size, size, rule);
    }
  });
}

// In place, the queries or keys of a token, in parts of `size`.
template <class T>
void norm_heads(typename T::elem* x, long width, const void* weight, long size, const HeadNorms& norms) {
  const NormRule rule{float(norms.eps), norms.rounded != 0, float(norms.offset)};
  for (long at = 0; at < width; at += size)
    norm_row<T>(x + at, (const typename T::elem*)weight, x + at, size, rule);
}

// act(gate) * up, where act is z -> z * sigmoid(z), or GELU by its tanh (Hendrycks and Gimpel, 2016, arXiv:1606.08415),
// which is a sigmoid, too; or what Backend.clamped_swiglu says. The sigmoid comes from e^-|z|, which cannot overflow.
// Shazeer, 2020, arXiv:2002.05202.
template <class T, Activation A>
inline void activate16(const typename T::elem* gate, const typename T::elem* up, typename T::elem* out, float alpha, float limit) {
  const auto all = [](float f) { return rf{} + f; };
  for (int at = 0; at < LANES; at += WIDTH) {
    rf g = T::load_register(gate + at), u = T::load_register(up + at);
    if (A == CLAMPED_SWIGLU) g = g > limit ? all(limit) : g;
    const rf z = A == SILU ? g : A == GELU ? (g + g * g * g * 0.044715f) * 1.5957691216f : g * alpha;
    const rf e = exp_negative_as<ri>(z < 0.0f ? z : -z);
    const rf sigmoid = (z < 0.0f ? e : all(1.0f)) / (1.0f + e);
    if (A == CLAMPED_SWIGLU) {
      u = u > limit ? all(limit) : u < -limit ? all(-limit) : u;
      T::store_register(out + at, g * sigmoid * (u + 1.0f));
      continue;
    }
    T::store_register(out + at, g * sigmoid);
    T::store_register(out + at, T::load_register(out + at) * u);
  }
}

template <class T, Activation A>
void activate_row(const Gate& g, const void* gates, const void* up_, void* out_, long count) {
  using elem = typename T::elem;
  const elem *gate = (const elem*)gates, *up = (const elem*)up_;
  elem* out = (elem*)out_;
  long i = 0;
  for (; i + LANES <= count; i += LANES) activate16<T, A>(gate + i, up + i, out + i, g.alpha, g.limit);
  if (i == count) return;
  elem last[3][LANES] = {};
  std::memcpy(last[0], gate + i, (count - i) * sizeof(elem));
  std::memcpy(last[1], up + i, (count - i) * sizeof(elem));
  activate16<T, A>(last[0], last[1], last[2], g.alpha, g.limit);
  std::memcpy(out + i, last[2], (count - i) * sizeof(elem));
}

template <class T, Activation A>
void activate_rows(const Gate& g, const void* gate_up, long rows, long size, int threads) {
  const long bytes = size * long(sizeof(typename T::elem));
  together(worth(rows * size, threads), [&](const Member& me) {
    const Range mine = me.share(rows);
    for (long row = mine.begin; row < mine.end; row++) {
      const char* const gates = (const char*)gate_up + row * 2 * bytes;
      activate_row<T, A>(g, gates, gates + bytes, (char*)g.out + row * bytes, size);
    }
  });
}

template <class T>
void activate(const Gate& g, const void* gate_up, long rows, long size, int threads) {
  switch (g.activation) {
    case SILU: return activate_rows<T, SILU>(g, gate_up, rows, size, threads);
    case GELU: return activate_rows<T, GELU>(g, gate_up, rows, size, threads);
    default: return activate_rows<T, CLAMPED_SWIGLU>(g, gate_up, rows, size, threads);
  }
}

// cap * tanh(x / cap) in place. Gemma 2: arXiv:2408.00118, section 2.
template <class T>
void soft_cap(void* x_, long count, float cap, int threads) {
  using elem = typename T::elem;
  together(worth(count, threads), [&](const Member& me) {
    const Range mine = me.share(count / LANES);
    for (long i = mine.begin; i < mine.end; i++) {
      elem* x = (elem*)x_ + i * LANES;
      T::store16(x, tanh(T::load16(x) / cap) * cap);
    }
  });
}

struct Rope {
  void* qkv;  // [tokens, (heads + 2 kv_heads) * head_dim]
  const float *cos, *sin;  // [tokens, half]
  const int64_t* cells;    // [tokens] block * block_size + offset
  const uint8_t* last;     // [tokens] whether nothing of the token's sequence follows it in this step
  void *keys, *values;
  long tokens, heads, kv_heads, head_dim, block_size, block_bytes;
  long half;         // pairs of each head that are rotated, its first 2 * half elements; the others are as they are
  bool neighbours;   // pairs are (2 i, 2 i + 1) instead of (i, i + half)
  bool int8;
  const HeadNorms* norms;  // of queries and keys, before they are rotated; null: there are none
};

// A token's key and value of one head of a block, in int8.
template <class T>
void store_int8(const Rope& r, const typename T::elem* k, const typename T::elem* v, long block, long head,
                long offset) {
  const long begin = block * r.block_bytes;
  const Int8Head keys((char*)r.keys + begin, head, r.block_size, r.head_dim);
  const Int8Head values((char*)r.values + begin, head, r.block_size, r.head_dim);
  constexpr long N = Int8Head::PER_LANE;
  int8_t* key = keys.elements + offset / LANES * LANES * r.head_dim + offset % LANES * N;
  keys.scales[offset] =
      quantize_head<T>(k, r.head_dim, [&](long i, int8_t q) { key[i / N * LANES * N + i % N] = q; });
  int8_t* value = values.elements + offset / N * N * r.head_dim + offset % N;
  values.scales[offset] = quantize_head<T>(v, r.head_dim, [&](long i, int8_t q) { value[i * N] = q; });
}

// Rotates pairs of x (RoFormer, arXiv:2104.09864): element i with the one `half` behind it, or neighbours.
template <class T>
inline void rotate(typename T::elem* x, const float* cos, const float* sin, long half, bool neighbours) {
  const auto pair = [&](typename T::elem& x1, typename T::elem& x2, float c, float s) {
    const float a = T::widen(x1), b = T::widen(x2);
    x1 = T::narrow(a * c - b * s);
    x2 = T::narrow(b * c + a * s);
  };
  if (neighbours)
    for (long i = 0; i < half; i++) pair(x[2 * i], x[2 * i + 1], cos[i], sin[i]);
  else
    for (long i = 0; i < half; i++) pair(x[i], x[i + half], cos[i], sin[i]);
}

// Fetches the lines of a cell that rope_store() writes: each lane of a key is in another one.
template <class T>
inline void fetch_cell(const Rope& r, long cell) {
  const long block = cell / r.block_size, offset = cell % r.block_size, lanes = r.head_dim / T::PER_LANE;
  for (long h = 0; h < r.kv_heads && !r.int8; h++) {
    const long base = h * r.block_size * lanes;
    const auto* keys = (const uint32_t*)((const char*)r.keys + block * r.block_bytes) + base + offset / LANES * lanes * LANES;
    const auto* values = (const uint32_t*)((const char*)r.values + block * r.block_bytes) + base + offset / T::PER_LANE * r.head_dim;
    for (long i = 0; i < lanes; i++) __builtin_prefetch(keys + i * LANES, 1);
    for (long i = 0; i < r.head_dim; i += LANES) __builtin_prefetch(values + i, 1);
  }
}

// Norms and rotates q and k in place and stores k and v into the cache, whose layout attention.cpp describes.
template <class T>
void rope_store(const Rope& r, int threads) {
  using elem = typename T::elem;
  const long width = (r.heads + 2 * r.kv_heads) * r.head_dim, lanes = r.head_dim / T::PER_LANE;
  together(worth(r.tokens * width, threads), [&](const Member& me) {
    const Range mine = me.share(r.tokens);
    for (long t = mine.begin; t < mine.end; t++) {
      elem* row = (elem*)r.qkv + t * width;
      const float *cos = r.cos + t * r.half, *sin = r.sin + t * r.half;
      if (r.norms != nullptr) {
        norm_heads<T>(row, r.heads * r.head_dim, r.norms->q, r.norms->q_size, *r.norms);
        norm_heads<T>(row + r.heads * r.head_dim, r.kv_heads * r.head_dim, r.norms->k, r.norms->k_size, *r.norms);
      }
      for (long h = 0; h < r.heads + r.kv_heads; h++) rotate<T>(row + h * r.head_dim, cos, sin, r.half, r.neighbours);
      const long block = r.cells[t] / r.block_size, offset = r.cells[t] % r.block_size;
      if (t + 1 < mine.end) fetch_cell<T>(r, r.cells[t + 1]);
      for (long h = 0; h < r.kv_heads; h++) {
        const elem* k = row + (r.heads + h) * r.head_dim;
        const elem* v = k + r.kv_heads * r.head_dim;
        if (r.int8) {
          store_int8<T>(r, k, v, block, h, offset);
          continue;
        }
        const long base = h * r.block_size * lanes;
        uint32_t* to = (uint32_t*)((char*)r.keys + block * r.block_bytes) + base + offset / LANES * lanes * LANES + offset % LANES;
        for (long i = 0; i < lanes; i++) {
          uint32_t lane;
          std::memcpy(&lane, k + i * T::PER_LANE, 4);
          to[i * LANES] = lane;
        }
        const long part = offset % T::PER_LANE;
        elem* cell = (elem*)((uint32_t*)((char*)r.values + block * r.block_bytes) + base + offset / T::PER_LANE * r.head_dim) + part;
        for (long i = 0; i < r.head_dim; i++) cell[i * T::PER_LANE] = v[i];
        // The neighbour in the lane is multiplied by a weight of zero until it is written: it must not be NaN.
        if (T::PER_LANE == 2 && part == 0 && r.last[t])
          for (long i = 0; i < r.head_dim; i++) cell[i * 2 + 1] = 0;
      }
    }
  });
}

}  // namespace
}  // namespace aio

// hidden, delta, out [rows, size]; delta, or its weight, or weight and out, may be null; out may be delta.
AIO_EXPORT void aio_add_rms_norm(int bf16, void* hidden, void* delta, const void* delta_weight, const void* weight, void* out,
                                 long rows, long size, float factor, float eps, int rounded, float offset, int threads) {
  const aio::NormRule rule{eps, rounded != 0, offset};
  bf16 ? aio::add_rms_norm<aio::Bf16>(hidden, delta, delta_weight, weight, out, rows, size, factor, rule, threads)
       : aio::add_rms_norm<aio::F32>(hidden, delta, delta_weight, weight, out, rows, size, factor, rule, threads);
}

// out [rows, size] = act(gate) * up for gate_up [rows, 2 * size].
AIO_EXPORT void aio_activate(const aio::Gate* gate, const void* gate_up, long rows, long size, int threads) {
  (gate->bf16 ? aio::activate<aio::Bf16> : aio::activate<aio::F32>)(*gate, gate_up, rows, size, threads);
}

// x [count] in place, count a multiple of 16.
AIO_EXPORT void aio_soft_cap(int bf16, void* x, long count, float cap, int threads) {
  bf16 ? aio::soft_cap<aio::Bf16>(x, count, cap, threads) : aio::soft_cap<aio::F32>(x, count, cap, threads);
}

AIO_EXPORT void aio_rope_store(int bf16, void* qkv, const float* cos, const float* sin, const int64_t* cells,
                               const uint8_t* last, void* keys, void* values, long tokens, long heads, long kv_heads,
                               long head_dim, long block_size, long half, int neighbours, int int8,
                               const aio::HeadNorms* norms, int threads) {
  const long block_bytes = aio::block_bytes(bf16, int8, kv_heads, head_dim, block_size);
  const aio::Rope r{qkv,      cos,      sin,        cells,       last, keys,            values,   tokens, heads,
                    kv_heads, head_dim, block_size, block_bytes, half, neighbours != 0, int8 != 0, norms};
  bf16 ? aio::rope_store<aio::Bf16>(r, threads) : aio::rope_store<aio::F32>(r, threads);
}
