// The small operations of a decoder layer, each one pass over its data.
#include <cmath>

#include "ops.h"
#include "quantized_cache.h"
#include "team.h"

namespace aio {
namespace {

// Threads are worth their start only for enough elements; within a step they are there.
inline int worth(long elements, int threads) { return elements < 8192 ? 1 : threads; }

// hidden += delta (if there is one); out = norm(hidden) * weight: rounded to the element type after the sum, after the
// norm and after the weight, as the models were trained. Zhang and Sennrich, 2019, arXiv:1910.07467.
template <class T>
void norm_row(const typename T::elem* x, const typename T::elem* weight, typename T::elem* out, long size, float eps) {
  vf squares = vf{};
  float rest = 0.0f;
  long i = 0;
  for (; i + LANES <= size; i += LANES) {
    const vf v = T::load16(x + i);
    squares = multiply_add(v, v, squares);
  }
  for (; i < size; i++) rest += T::widen(x[i]) * T::widen(x[i]);
  const float scale = 1.0f / std::sqrt((sum(squares) + rest) / float(size) + eps);
  for (i = 0; i + LANES <= size; i += LANES) {
    T::store16(out + i, T::load16(x + i) * scale);
    T::store16(out + i, T::load16(out + i) * T::load16(weight + i));
  }
  for (; i < size; i++) out[i] = T::narrow(T::widen(T::narrow(T::widen(x[i]) * scale)) * T::widen(weight[i]));
}

template <class T>
void add_rms_norm(void* hidden_, const void* delta_, const void* weight, void* out, long rows, long size, float eps,
                  int threads) {
  using elem = typename T::elem;
  together(worth(rows * size, threads), [&](const Member& me) {
    const Range mine = me.share(rows);
    for (long row = mine.begin; row < mine.end; row++) {
      elem* hidden = (elem*)hidden_ + row * size;
      if (delta_ != nullptr) {
        const elem* delta = (const elem*)delta_ + row * size;
        long i = 0;
        for (; i + LANES <= size; i += LANES) T::store16(hidden + i, T::load16(hidden + i) + T::load16(delta + i));
        for (; i < size; i++) hidden[i] = T::narrow(T::widen(hidden[i]) + T::widen(delta[i]));
      }
      norm_row<T>(hidden, (const elem*)weight, (elem*)out + row * size, size, eps);
    }
  });
}

template <class T>
void head_norm(void* heads, const void* weight, long rows, long stride, long count, long size, float eps, int threads) {
  using elem = typename T::elem;
  together(worth(rows * count * size, threads), [&](const Member& me) {
    const Range mine = me.share(rows);
    for (long row = mine.begin; row < mine.end; row++)
      for (long h = 0; h < count; h++) {
        elem* x = (elem*)heads + row * stride + h * size;
        norm_row<T>(x, (const elem*)weight, x, size, eps);
      }
  });
}

// silu(gate) * up, with the sigmoid from e^-|gate|, which cannot overflow.
template <class T>
inline void silu16(const typename T::elem* gate, const typename T::elem* up, typename T::elem* out) {
  const vf g = T::load16(gate);
  const vf e = exp_negative(g < 0.0f ? g : -g);
  const vf sigmoid = (g < 0.0f ? e : splatf(1.0f)) / (1.0f + e);
  T::store16(out, g * sigmoid);
  T::store16(out, T::load16(out) * T::load16(up));
}

// out[t, i] = silu(gate) * up for gate_up [rows, 2 * size]. Shazeer, 2020, arXiv:2002.05202.
template <class T>
void silu_and_mul(const void* gate_up_, void* out_, long rows, long size, int threads) {
  using elem = typename T::elem;
  together(worth(rows * size, threads), [&](const Member& me) {
    const Range mine = me.share(rows);
    for (long row = mine.begin; row < mine.end; row++) {
      const elem *gate = (const elem*)gate_up_ + row * 2 * size, *up = gate + size;
      elem* out = (elem*)out_ + row * size;
      long i = 0;
      for (; i + LANES <= size; i += LANES) silu16<T>(gate + i, up + i, out + i);
      if (i < size) {
        elem g[LANES] = {}, u[LANES] = {}, o[LANES];
        std::memcpy(g, gate + i, (size - i) * sizeof(elem));
        std::memcpy(u, up + i, (size - i) * sizeof(elem));
        silu16<T>(g, u, o);
        std::memcpy(out + i, o, (size - i) * sizeof(elem));
      }
    }
  });
}

struct Rope {
  void* qkv;  // [tokens, (heads + 2 kv_heads) * head_dim]
  const float *cos, *sin;  // [tokens, head_dim / 2]
  const int64_t* cells;    // [tokens] block * block_size + offset
  const uint8_t* last;     // [tokens] whether nothing of the token's sequence follows it in this step
  void *keys, *values;
  long tokens, heads, kv_heads, head_dim, block_size, block_bytes;  // from block to block
  bool int8;
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

// Rotates q and k in place (RoFormer, arXiv:2104.09864, half-split layout) and stores k and v into the cache, whose
// layout attention.cpp describes.
template <class T>
void rope_store(const Rope& r, int threads) {
  using elem = typename T::elem;
  const long width = (r.heads + 2 * r.kv_heads) * r.head_dim, half = r.head_dim / 2, lanes = r.head_dim / T::PER_LANE;
  together(worth(r.tokens * width, threads), [&](const Member& me) {
    const Range mine = me.share(r.tokens);
    for (long t = mine.begin; t < mine.end; t++) {
      elem* row = (elem*)r.qkv + t * width;
      const float *cos = r.cos + t * half, *sin = r.sin + t * half;
      for (long h = 0; h < r.heads + r.kv_heads; h++) {
        elem *x = row + h * r.head_dim, *y = x + half;
        for (long i = 0; i < half; i++) {
          const float a = T::widen(x[i]), b = T::widen(y[i]);
          x[i] = T::narrow(a * cos[i] - b * sin[i]);
          y[i] = T::narrow(b * cos[i] + a * sin[i]);
        }
      }
      const long block = r.cells[t] / r.block_size, offset = r.cells[t] % r.block_size;
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

// hidden, delta, out [rows, size]; delta may be null.
AIO_EXPORT void aio_add_rms_norm(int bf16, void* hidden, const void* delta, const void* weight, void* out, long rows,
                                 long size, float eps, int threads) {
  bf16 ? aio::add_rms_norm<aio::Bf16>(hidden, delta, weight, out, rows, size, eps, threads)
       : aio::add_rms_norm<aio::F32>(hidden, delta, weight, out, rows, size, eps, threads);
}

// In place, each of `count` adjoining heads of every row on its own; weight [size].
AIO_EXPORT void aio_head_norm(int bf16, void* heads, const void* weight, long rows, long stride, long count, long size,
                              float eps, int threads) {
  bf16 ? aio::head_norm<aio::Bf16>(heads, weight, rows, stride, count, size, eps, threads)
       : aio::head_norm<aio::F32>(heads, weight, rows, stride, count, size, eps, threads);
}

AIO_EXPORT void aio_silu_and_mul(int bf16, const void* gate_up, void* out, long rows, long size, int threads) {
  bf16 ? aio::silu_and_mul<aio::Bf16>(gate_up, out, rows, size, threads)
       : aio::silu_and_mul<aio::F32>(gate_up, out, rows, size, threads);
}

AIO_EXPORT void aio_rope_store(int bf16, void* qkv, const float* cos, const float* sin, const int64_t* cells,
                               const uint8_t* last, void* keys, void* values, long tokens, long heads, long kv_heads,
                               long head_dim, long block_size, long block_bytes, int int8, int threads) {
  const aio::Rope r{qkv,    cos,   sin,      cells,    last,       keys,        values,
                    tokens, heads, kv_heads, head_dim, block_size, block_bytes, int8 != 0};
  bf16 ? aio::rope_store<aio::Bf16>(r, threads) : aio::rope_store<aio::F32>(r, threads);
}
