// The library's C interface, as far as its own files call it: operations on plain pointers. `bf16` chooses between bfloat16
// and float32 elements; strides are in elements; every operation runs on `threads` OpenMP threads. The definitions say the
// shapes.
#pragma once

#include "common.h"

namespace aio {
struct Fetch {
  const void* begin;
  long bytes;
};

// Tokens begin..end-1 use the adapter in `slot`, and what it adds is multiplied by the weight.
struct Segment {
  int32_t slot, begin, end, rank;
  float weight;
};

// Where a slot has the matrices of a module, in elements from the beginning of the slots' memory: bytes if the matrices
// are int8. slots.py names these.
struct Where {
  int64_t a, a_rank;  // A [a_rank, k]; a_rank 0: the adapter does not target the module
  int64_t b, b_rank;  // B [out, b_rank]
  int64_t affine;     // [2, out]; below 0: there is none
  int64_t scale;      // [a_rank] of A's rows, float32, if the matrices are int8
};

// The memory of all slots, and the table [slots][places] of what is where.
struct Slots {
  const void* memory;
  const Where* table;
  int64_t places;
  int64_t int8;    // whether the matrices are
  int64_t turned;  // whether matrices B are turned: see expand.h

  // What is at an offset of a table, which has elements of `size` bytes unless they are int8.
  const char* at(long offset, long size) const { return (const char*)memory + offset * (int8 ? 1 : size); }

  const Where& where(long slot, long place) const { return table[slot * places + place]; }
};

// Rows of a weight as a quantized checkpoint stores them; see blocks.h.
struct Part;

struct Slice {
  int64_t out, offset;
};

// Norms of queries and of keys, each of `size` elements together: a head's, or all heads'. structs.py names these.
struct HeadNorms {
  const void *q, *k;
  int64_t q_size, k_size, rounded;
  double eps, offset;
};

// What adapters add to a linear: B h, for h [tokens, slices, width]. Slice j is the place `first` + j of a slot.
struct Adapters {
  const Segment* segments;
  long count;
  const void* h;
  const Slots* slots;
  long first;
  const Slice* slice;
  long slices, width;
};

enum Activation { SILU, GELU, CLAMPED_SWIGLU };  // structs.py names these

// An activation of gates times what these are for, and where it is written: structs.py names these.
struct Gate {
  int64_t bf16, activation;  // an Activation
  double alpha, limit;       // of CLAMPED_SWIGLU
  void* out;
};

// A packed weight: panels of 16 outputs, each of so many bytes.
struct Panels {
  const void* begin;  // null: none
  long outputs, panel_bytes;
};

// What a linear does beside its own product. Columns of slices must begin and end where panels do.
struct Beside {
  const Fetch* fetch;  // memory that is needed afterwards
  long fetch_count;
  const Adapters* adapters;  // may be null
  Panels next;               // the weight of the linear that follows, for as many rows
};
}  // namespace aio

AIO_EXPORT void aio_gather(int bf16, const void* packed, const int64_t* rows, void* out, long count, long k,
                           int threads);
AIO_EXPORT void aio_attention(int bf16, const void* q, long q_stride, const void* keys, const void* values,
                              const int32_t* tables, long table_width, const int32_t* spans, long sequences,
                              void* out, long heads, long kv_heads, long head_dim, long block_size,
                              long window, float scale, float soft_cap, const void* sinks, int int8, int threads);
AIO_EXPORT void aio_rope_store(int bf16, void* qkv, const float* cos, const float* sin, const int64_t* cells,
                               const uint8_t* last, void* keys, void* values, long tokens, long heads, long kv_heads,
                               long head_dim, long block_size, long half, int neighbours, int int8,
                               const aio::HeadNorms* norms, int threads);
AIO_EXPORT void aio_add_rms_norm(int bf16, void* hidden, void* delta, const void* delta_weight, const void* weight, void* out,
                                 long rows, long size, float factor, float eps, int rounded, float offset, int threads);
AIO_EXPORT void aio_activate(const aio::Gate* gate, const void* gate_up, long rows, long size, int threads);
AIO_EXPORT void aio_argmax(int bf16, const void* x, long rows, long size, int64_t* best, int threads);
AIO_EXPORT void aio_lora_shrink(int bf16, const void* x, long x_stride, const aio::Slots* slots, long first, void* h,
                                long k, long slices, long width, const int32_t* segments, long count, int threads);
AIO_EXPORT void aio_lora_expand(int bf16, const void* h, const aio::Slots* slots, long first, const aio::Slice* slice,
                                long slices, long width, void* y, long y_stride, const int32_t* segments, long count,
                                int threads);
AIO_EXPORT void aio_lora_affine(int bf16, void* y, long y_stride, const aio::Slots* slots, long first,
                                const aio::Slice* slice, long slices, const int32_t* segments, long count, int threads);
