// A whole step of a decoder in one call: the operations of ops.h in the order of the Llama family's layers.
//
// Called from Python, a step of 30 layers would be some 400 calls, each of which holds the GIL for a few
// microseconds; in one call it is free throughout.
#include <cstring>
#include <vector>

#include "ops.h"

extern "C" {

struct Matrix {
  const void* packed;
  const void* bias;  // may be null
  int64_t n, k;
};

struct LoraSlice {
  const void* b;       // [out, max_rank] of the first slot
  const void* affine;  // [2, out] of the first slot
  int64_t out, offset, b_stride, affine_stride;
};

// A fused linear's pool; slices = 0: none of it is targeted.
struct LoraPool {
  const void* a;  // [slices * max_rank, k] of the first slot
  int64_t slices;
  LoraSlice slice[3];
};

struct Layer {
  const void *input_norm, *q_norm, *k_norm, *post_norm;
  Matrix qkv, o, gate_up, down;
  LoraPool lora_qkv, lora_o, lora_gate_up, lora_down;
  void *keys, *values;
  int64_t window;  // 0: full attention
};

struct Model {
  int64_t bf16, layers, hidden, heads, kv_heads, head_dim, intermediate, block_size, slot_stride, max_rank;
  double eps, attention_scale;
  const void* norm;
  Matrix head;
  LoraPool lora_head;
  const Layer* layer;
};

// Tokens by adapter slot: segments [count][slot, begin, end, rank]; those in `affine` are scaled and shifted.
struct LoraBatch {
  const int32_t* segments;
  int64_t count;
  const int32_t* affine;
  int64_t affine_count;
};

struct Step {
  int64_t tokens, sequences, table_width, samples, threads;
  void* hidden;  // [tokens, hidden]: the embeddings, overwritten
  const float *cos, *sin;
  const int64_t* cells;
  const uint8_t* last;
  const int32_t *tables, *spans;
  const int64_t* sample_rows;
  LoraBatch lora, sample_lora;
  void* logits;  // [samples, head.n]
  void *x, *wide, *narrow, *h;  // scratch: tokens x hidden, x the widest linear, x intermediate or heads, x 3 max_rank
};

}  // extern "C"

namespace {

constexpr long FETCH_ROWS = 64;         // with more, the adapters are a small part of what is read
constexpr long FETCH_BYTES = 2 << 20;

struct Run {
  const Model& m;
  const Step& s;
  int threads;

  size_t element() const { return m.bf16 ? 2 : 4; }

  // Where the matrices of the batch's adapters lie, A before B as they are needed, as much as caches hold.
  std::vector<aio::Fetch> matrices(const LoraPool& pool, const LoraBatch& batch, long k) const {
    std::vector<aio::Fetch> found;
    long left = FETCH_BYTES;
    const auto add = [&](const void* first, long stride, int slot, long elements) {
      const long bytes = elements * long(element());
      if (bytes > left) return;
      left -= bytes;
      found.push_back({(const char*)first + slot * stride * long(element()), bytes});
    };
    for (long g = 0; g < batch.count; g++)
      add(pool.a, m.slot_stride, batch.segments[g * 4], pool.slices * m.max_rank * k);
    for (long j = 0; j < pool.slices; j++)
      for (long g = 0; g < batch.count; g++)
        add(pool.slice[j].b, pool.slice[j].b_stride, batch.segments[g * 4], pool.slice[j].out * m.max_rank);
    return found;
  }

  void linear(const Matrix& w, const LoraPool& pool, const LoraBatch& batch, const void* x, void* y, long rows) const {
    const bool adapted = pool.slices > 0 && batch.count > 0;
    std::vector<aio::Fetch> next;
    if (adapted && rows <= FETCH_ROWS) next = matrices(pool, batch, w.k);
    aio_linear_fetching(m.bf16, x, w.k, w.packed, w.bias, y, w.n, rows, w.n, w.k, next.data(), long(next.size()),
                        threads);
    if (!adapted) return;
    std::memset(s.h, 0, rows * pool.slices * m.max_rank * element());
    aio_lora_shrink(m.bf16, x, w.k, pool.a, s.h, m.slot_stride, w.k, pool.slices, m.max_rank, batch.segments,
                    batch.count, threads);
    aio_lora_expand(m.bf16, s.h, pool.slice, pool.slices, m.max_rank, y, w.n, batch.segments,
                    batch.count, threads);
    if (batch.affine_count > 0)
      aio_lora_affine(m.bf16, y, w.n, pool.slice, pool.slices, batch.affine, batch.affine_count, threads);
  }

  // `delta` is what the layer before left to be added to the hidden state; returns this layer's.
  void layer(const Layer& l, const void* delta) const {
    const long q_width = m.heads * m.head_dim, qkv_width = l.qkv.n;
    aio_add_rms_norm(m.bf16, s.hidden, delta, l.input_norm, s.x, s.tokens, m.hidden, m.eps, threads);
    linear(l.qkv, l.lora_qkv, s.lora, s.x, s.wide, s.tokens);
    if (l.q_norm != nullptr) {
      char* keys = (char*)s.wide + q_width * element();
      aio_head_norm(m.bf16, s.wide, l.q_norm, s.tokens, qkv_width, m.heads, m.head_dim, m.eps, threads);
      aio_head_norm(m.bf16, keys, l.k_norm, s.tokens, qkv_width, m.kv_heads, m.head_dim, m.eps, threads);
    }
    aio_rope_store(m.bf16, s.wide, s.cos, s.sin, s.cells, s.last, l.keys, l.values, s.tokens, m.heads, m.kv_heads,
                   m.head_dim, m.block_size, threads);
    aio_attention(m.bf16, s.wide, qkv_width, l.keys, l.values, s.tables, s.table_width, s.spans, s.sequences, s.narrow,
                  m.heads, m.kv_heads, m.head_dim, m.block_size, l.window, m.attention_scale, threads);
    linear(l.o, l.lora_o, s.lora, s.narrow, s.x, s.tokens);
    aio_add_rms_norm(m.bf16, s.hidden, s.x, l.post_norm, s.x, s.tokens, m.hidden, m.eps, threads);
    linear(l.gate_up, l.lora_gate_up, s.lora, s.x, s.wide, s.tokens);
    aio_silu_and_mul(m.bf16, s.wide, s.narrow, s.tokens, m.intermediate, threads);
    linear(l.down, l.lora_down, s.lora, s.narrow, s.x, s.tokens);
  }

  void operator()() const {
    const void* delta = nullptr;
    for (long i = 0; i < m.layers; i++) {
      layer(m.layer[i], delta);
      delta = s.x;
    }
    if (s.samples == 0) return;
    // Only the rows that are sampled go on; row i of the samples never lies before row i of the tokens.
    const size_t row = m.hidden * element();
    for (long i = 0; i < s.samples; i++) {
      std::memmove((char*)s.hidden + i * row, (char*)s.hidden + s.sample_rows[i] * row, row);
      std::memmove((char*)s.x + i * row, (char*)s.x + s.sample_rows[i] * row, row);
    }
    aio_add_rms_norm(m.bf16, s.hidden, s.x, m.norm, s.x, s.samples, m.hidden, m.eps, threads);
    linear(m.head, m.lora_head, s.sample_lora, s.x, s.logits, s.samples);
  }
};

}  // namespace

AIO_EXPORT void aio_step(const Model* model, const Step* step) { Run{*model, *step, int(step->threads)}(); }
