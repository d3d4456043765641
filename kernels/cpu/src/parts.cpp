// A linear and the adapters on it in one call, as the layers of decoder.cpp compute them.
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

// y [rows, n] = x [rows, k] W^T + bias, and what the adapters add.
AIO_EXPORT void aio_adapted_linear(int bf16, const AdaptedLinear* l, const void* x, void* y, long rows, int threads) {
  const aio::Adapters* a = l->beside.adapters;
  const Matrix& w = l->matrix;
  aio::step_together(threads, [&](const aio::Member&) {
    if (a != nullptr)
      aio_lora_shrink(bf16, x, w.k, a->slots, a->first, (void*)a->h, w.k, a->slices, a->width, (const int32_t*)a->segments,
                      a->count, threads);
    aio::product(bf16, w, x, y, rows, l->beside, {}, threads);
    if (a != nullptr && l->affine_count > 0)
      aio_lora_affine(bf16, y, w.n, a->slots, a->first, l->outputs, a->slices, (const int32_t*)l->affine, l->affine_count,
                      threads);
  });
}
