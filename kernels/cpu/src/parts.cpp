// Parts of a layer, each in one call: operations of ops.h, one after the other, by one team of threads.
//
// They are for models whose modules run in Python. There the threads often fall asleep between two operations, and with
// other work on the machine it takes long until all of them go on: the fewer such places, the better.
#include <cstring>
#include <vector>

#include "fetcher.h"
#include "matrix.h"
#include "team.h"

extern "C" {

// A linear and the adapters on it; structs.py names these.
struct AdaptedLinear {
  Matrix matrix;
  aio::Beside beside;  // without adapters: the linear alone
  const aio::Slice* outputs;  // of its slices, for what is scaled and shifted
  const aio::Segment* affine;
  int64_t affine_count;
};

// A layer of attention and a gated MLP; structs.py names these. Norms before the two and of their outputs, those of heads, and
// sinks may be null.
struct Block {
  const AdaptedLinear *qkv, *o, *gate_up, *down;
  const AdaptedLinear* next;  // of the layer that follows; null if it is not known
  const void *input_norm, *attention_norm, *mlp_input_norm, *mlp_norm, *sinks;
  const aio::HeadNorms* head_norms;
  void *keys, *values;
  int64_t size, heads, kv_heads, head_dim, block_size, block_bytes, half, neighbours, window, gelu, norm_rounded;
  double eps, norm_offset, residual_scale, attention_scale, soft_cap;
};

// What all layers of a step share: x [tokens, size], wide and narrow [tokens, the widest] are scratch.
struct BlockStep {
  void *x, *wide, *narrow;
  const int64_t* cells;
  const uint8_t* last;
  const int32_t *tables, *spans;
  int64_t tokens, table_width, sequences;
};

}  // extern "C"

namespace {

// `next` is the linear that follows, if it is known: memory that is needed next is fetched.
void linear(int bf16, const AdaptedLinear& l, const void* x, void* y, long rows, int threads, const AdaptedLinear* next = nullptr) {
  const aio::Adapters* a = l.beside.adapters;
  const Matrix& w = l.matrix;
  if (a != nullptr)
    aio_lora_shrink(bf16, x, w.k, a->slots, a->first, (void*)a->h, w.k, a->slices, a->width, (const int32_t*)a->segments,
                    a->count, threads);
  aio::Beside beside = l.beside;
  std::vector<aio::Fetch> fetch;
  if (next != nullptr) {
    const Matrix& after = next->matrix;
    beside.next = {after.packed, after.n, after.panel_bytes};
    if (next->beside.adapters != nullptr) fetch = aio::matrices(*next->beside.adapters, after.k, bf16 ? 2 : 4);
    beside.fetch = fetch.data(), beside.fetch_count = long(fetch.size());
  }
  aio::product(bf16, w, x, y, rows, beside, threads);
  if (a != nullptr && l.affine_count > 0)
    aio_lora_affine(bf16, y, w.n, a->slots, a->first, l.outputs, a->slices, (const int32_t*)l.affine, l.affine_count,
                    threads);
}

}  // namespace

// y [rows, n] = x [rows, k] W^T + bias, and what the adapters add.
AIO_EXPORT void aio_adapted_linear(int bf16, const AdaptedLinear* l, const void* x, void* y, long rows, int threads) {
  aio::step_together(threads, [&](const aio::Member&) { linear(bf16, *l, x, y, rows, threads); });
}

// y = down(act(gate(x)) * up(x)), where act is SiLU, or GELU by its tanh. wide [rows, gate_up's n] and narrow [rows, down's k]
// are scratch.
AIO_EXPORT void aio_gated_mlp(int bf16, const AdaptedLinear* gate_up, const AdaptedLinear* down, int gelu, const void* x,
                              void* wide, void* narrow, void* y, long rows, int threads) {
  aio::step_together(threads, [&](const aio::Member&) {
    linear(bf16, *gate_up, x, wide, rows, threads, down);
    (gelu ? aio_gelu_and_mul : aio_silu_and_mul)(bf16, wide, narrow, rows, down->matrix.k, threads);
    linear(bf16, *down, narrow, y, rows, threads);
  });
}

// aio_rope_store and aio_attention, for qkv [tokens, heads + 2 kv_heads, head_dim].
AIO_EXPORT void aio_store_and_attend(int bf16, void* qkv, const float* cos, const float* sin, const int64_t* cells,
                                     const uint8_t* last, void* keys, void* values, long tokens, long heads, long kv_heads,
                                     long head_dim, long block_size, long block_bytes, long half, int neighbours,
                                     const int32_t* tables, long table_width, const int32_t* spans, long sequences,
                                     void* out, long window, float scale, float soft_cap, const void* sinks, int threads) {
  aio::step_together(threads, [&](const aio::Member&) {
    aio_rope_store(bf16, qkv, cos, sin, cells, last, keys, values, tokens, heads, kv_heads, head_dim, block_size,
                   block_bytes, half, neighbours, 0, nullptr, threads);
    aio_attention(bf16, qkv, (heads + 2 * kv_heads) * head_dim, keys, values, tables, table_width, spans, sequences, out,
                  heads, kv_heads, head_dim, block_size, block_bytes, window, scale, soft_cap, sinks, 0, threads);
  });
}

namespace {

// hidden [tokens, size] becomes what the layer makes of it.
void layer(int bf16, const Block& b, const BlockStep& s, void* hidden, const float* cos, const float* sin, int threads) {
  const auto norm = [&](void* delta, const void* delta_weight, const void* weight) -> const void* {
    aio_add_rms_norm(bf16, hidden, delta, delta_weight, weight, s.x, s.tokens, b.size, b.residual_scale, b.eps,
                     int(b.norm_rounded), b.norm_offset, threads);
    return weight != nullptr ? s.x : hidden;
  };
  const void* x = b.input_norm != nullptr ? norm(nullptr, nullptr, b.input_norm) : hidden;
  linear(bf16, *b.qkv, x, s.wide, s.tokens, threads, b.o);
  aio_rope_store(bf16, s.wide, cos, sin, s.cells, s.last, b.keys, b.values, s.tokens, b.heads, b.kv_heads, b.head_dim,
                 b.block_size, b.block_bytes, b.half, int(b.neighbours), 0, b.head_norms, threads);
  aio_attention(bf16, s.wide, (b.heads + 2 * b.kv_heads) * b.head_dim, b.keys, b.values, s.tables, s.table_width, s.spans,
                s.sequences, s.narrow, b.heads, b.kv_heads, b.head_dim, b.block_size, b.block_bytes, b.window,
                b.attention_scale, b.soft_cap, b.sinks, 0, threads);
  linear(bf16, *b.o, s.narrow, s.x, s.tokens, threads, b.gate_up);
  x = norm(s.x, b.attention_norm, b.mlp_input_norm);
  linear(bf16, *b.gate_up, x, s.wide, s.tokens, threads, b.down);
  (b.gelu ? aio_gelu_and_mul : aio_silu_and_mul)(bf16, s.wide, s.narrow, s.tokens, b.down->matrix.k, threads);
  linear(bf16, *b.down, s.narrow, s.x, s.tokens, threads, b.next);
  norm(s.x, b.mlp_norm, nullptr);
}

}  // namespace

// What each of some layers, one after the other, makes of x [tokens, size], to out [count][tokens, size]. cos and sin
// [tokens, half].
AIO_EXPORT void aio_blocks(int bf16, const Block* const* blocks, long count, const BlockStep* step, const void* x, void* out,
                           const float* cos, const float* sin, int threads) {
  const long row = blocks[0]->size * (bf16 ? 2 : 4);
  aio::step_together(threads, [&](const aio::Member&) {
    const char* from = (const char*)x;
    char* to = (char*)out;
    for (long i = 0; i < count; i++, from = to, to += step->tokens * row) {
      aio::together(threads, [&](const aio::Member& me) {
        const aio::Range mine = me.share(step->tokens);
        std::memcpy(to + mine.begin * row, from + mine.begin * row, (mine.end - mine.begin) * row);
      });
      layer(bf16, *blocks[i], *step, to, cos, sin, threads);
    }
  });
}
