// A matrix in any form in which it is stored, and its product. Panels are of 16 outputs, whose number must be a multiple.
#pragma once

#include "tiles.h"

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

// What is asked of a form of storage.
struct Product {
  Linear l;
  Beside beside;
  Experts experts;
  int threads;
};

void multiply_packed(const Matrix& w, const Product& p);  // linear.cpp
void multiply_int8(const Matrix& w, const Product& p);    // quantized.cpp
void multiply_int4(const Matrix& w, const Product& p);    // int4.cpp
void multiply_parts(const Matrix& w, const Product& p);   // blocks.cpp

// y [rows, n] = x [rows, k] W^T + bias, with what is done beside it: memory that is needed next is fetched, because with few
// rows the arithmetic leaves the memory idle, and adapters are added while the results are in the cache. With experts, whose
// matrices are one below the other, each row takes one expert's outputs.
void product(int bf16, const Matrix& w, const void* x, void* y, long rows, const Beside& beside, const Experts& experts,
             int threads);

}  // namespace aio
