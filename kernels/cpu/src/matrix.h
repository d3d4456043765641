// A matrix in any form in which it is stored, and its product.
#pragma once

#include "ops.h"

extern "C" {

// How a matrix is stored; structs.py names these, too.
enum Kind { PACKED, INT8, INT4, PARTS };

struct Matrix {
  const void* packed;
  const void* bias;  // may be null
  int64_t n, k, kind;
  int64_t panel_bytes;  // of 16 outputs, where all panels take as many; else 0
  // Of int8 and int4 weights (see quantized.cpp and int4.cpp); else null and zero.
  const float* scale;
  const int32_t* start;
  int64_t rotation, group;
  const aio::Part* part;  // of weights in parts (see blocks.cpp); else null
  int64_t parts;
};

}  // extern "C"

namespace aio {

// y [rows, n] = x [rows, k] W^T + bias, with what is done beside it.
inline void product(int bf16, const Matrix& w, const void* x, void* y, long rows, const Beside& beside, int threads) {
  switch (w.kind) {
    case PACKED:
      return aio_linear_beside(bf16, x, w.k, w.packed, w.bias, y, w.n, rows, w.n, w.k, &beside, threads);
    case INT8:
      return aio_linear_int8(bf16, x, w.k, w.packed, w.scale, w.start, w.rotation, w.bias, y, w.n, rows, w.n, w.k, &beside,
                             threads);
    case INT4:
      return aio_linear_int4(bf16, x, w.k, w.packed, w.scale, w.start, w.group, w.rotation, w.bias, y, w.n, rows, w.n, w.k,
                             &beside, threads);
    case PARTS:
      return aio_linear_blocks(bf16, x, w.k, w.part, w.bias, y, w.n, rows, w.n, w.k, &beside, threads);
  }
}

}  // namespace aio
