// Parts of a layer, each in one call: operations of ops.h, one after the other, by one team of threads.
//
// They are for models whose modules run in Python. There the threads often fall asleep between two operations, and with
// other work on the machine it takes long until all of them go on: the fewer such places, the better.
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

}  // extern "C"

namespace {

void linear(int bf16, const AdaptedLinear& l, const void* x, void* y, long rows, int threads) {
  const aio::Adapters* a = l.beside.adapters;
  const Matrix& w = l.matrix;
  if (a != nullptr)
    aio_lora_shrink(bf16, x, w.k, a->slots, a->first, (void*)a->h, w.k, a->slices, a->width, (const int32_t*)a->segments,
                    a->count, threads);
  aio::product(bf16, w, x, y, rows, l.beside, threads);
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
    linear(bf16, *gate_up, x, wide, rows, threads);
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
