// Weights as quantized checkpoints store them, and how a panel of 16 outputs is expanded for a product.
//
// A panel keeps the bytes of its 16 rows, turned: first the rows' float16 values that a block begins with, then the
// blocks' words of four bytes, each with its 16 rows side by side. So all arithmetic is by lane, and each format is a
// few shifts. The formats that begin with Q are llama.cpp's (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h);
// values are computed in float32 as that project's package `gguf` does, with the same bits.
#pragma once

#include "common.h"

namespace aio {

// dequantize.py names these, but for the first.
enum Format : int64_t { PLAIN, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, INT4, INT8, FP8, MXFP4 };

// Rows of a weight that are stored alike.
struct Part {
  int64_t format;
  const void* data;
  int64_t panels;
  // Of INT4 and what follows it: w = scale * (code - zero), by groups of inputs.
  const void* scale;       // [panels][groups][16] float; of MXFP4 the exponents, uint8
  const int16_t* zero;     // the same; null: `middle` everywhere
  const int32_t* group_of; // [k], for inputs whose groups do not adjoin; else null
  int64_t group, middle;
};

// 16 float16 values.
static inline vf halves(const void* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  typedef uint16_t vh __attribute__((vector_size(32)));
  vh h;
  std::memcpy(&h, p, sizeof h);
  const vu u = __builtin_convertvector(h, vu);
  const vf magnitude = (vf)((u & 0x7fff) << 13) * splatf(0x1p112f);
  return (vf)((vu)magnitude | (u & 0x8000) << 16);
#endif
}

static inline vf unsigned_float(vu v) { return __builtin_convertvector((vi)v, vf); }
// Byte i of each lane, as a signed number.
static inline vf signed_byte(vu v, int i) { return __builtin_convertvector((vi)(v << (24 - 8 * i)) >> 24, vf); }

// Two neighbouring inputs of 16 outputs, as the tiles want them.
template <class T>
static inline void put(uint32_t* out, long k, vf even, vf odd) {
  if constexpr (T::PER_LANE == 1) {
    store(out + k * LANES, (vu)even);
    store(out + (k + 1) * LANES, (vu)odd);
  } else {
#if defined(__AVX512BF16__)
    const __m512i mixed = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009,
                                           0x180008, 0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001,
                                           0x100000);
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    store(out + k / 2 * LANES, (vu)_mm512_permutexvar_epi16(mixed, (__m512i)both));
#else
    const vu a = (vu)even, b = (vu)odd;
    const vu low = (a + 0x7fff + ((a >> 16) & 1)) >> 16, high = (b + 0x7fff + ((b >> 16) & 1)) & 0xffff0000u;
    store(out + k / 2 * LANES, low | high);
#endif
  }
}

// Four neighbouring inputs: value(i) is the i-th of them.
template <class T, class Value>
static inline void put4(uint32_t* out, long k, const Value& value) {
  put<T>(out, k, value(0), value(1));
  put<T>(out, k + 2, value(2), value(3));
}

// A block of a panel, with so many float16 values first.
struct BlockView {
  const char* at;
  int first;

  vf half(int i) const { return halves(at + i * 32); }
  vu word(int i) const { return load((const uint32_t*)(at + first * 32) + i * LANES); }
};

// 32 values of 4 bits, or 5, whose scale and, in some formats, minimum come first.
template <class T, bool FIFTH, bool MINIMUM>
inline void expand_32(BlockView block, long k, uint32_t* out) {
  const vf d = block.half(0), least = MINIMUM ? block.half(1) : d * (FIFTH ? -16.0f : -8.0f);
  const vu high = FIFTH ? block.word(0) : vu{};
  for (int w = 0; w < 4; w++) {
    const vu v = block.word(w + FIFTH);
    for (int part = 0; part < 2; part++)
      put4<T>(out, k + 16 * part + 4 * w, [&](int i) {
        vu q = (v >> (8 * i + 4 * part)) & 15;
        if (FIFTH) q |= (high >> (16 * part + 4 * w + i) & 1) << 4;
        return multiply_add(unsigned_float(q), d, least);
      });
  }
}

template <class T>
inline void expand_q8_0(BlockView block, long k, uint32_t* out) {
  const vf d = block.half(0);
  for (int w = 0; w < 8; w++) {
    const vu v = block.word(w);
    put4<T>(out, k + 4 * w, [&](int i) { return signed_byte(v, i) * d; });
  }
}

// 256 values of 4 bits, or 5, in eight groups with scales and minima of 6 bits.
template <class T, bool FIFTH>
inline void expand_k45(BlockView block, long k, uint32_t* out) {
  const vf d = block.half(0), low = block.half(1);
  const vu a = block.word(0), b = block.word(1), c = block.word(2);
  for (int g = 0; g < 8; g++) {
    const int at = 8 * (g & 3);
    const vu scale = g < 4 ? (a >> at) & 63 : ((c >> at) & 15) | ((a >> at >> 2) & 48);
    const vu minimum = g < 4 ? (b >> at) & 63 : ((c >> at >> 4) & 15) | ((b >> at >> 2) & 48);
    const vf step = d * unsigned_float(scale), least = -(low * unsigned_float(minimum));
    for (int w = 0; w < 8; w++) {
      const vu v = block.word(3 + 8 * FIFTH + g / 2 * 8 + w) >> (4 * (g & 1));
      const vu high = FIFTH ? block.word(3 + w) >> g : vu{};
      put4<T>(out, k + 32 * g + 4 * w, [&](int i) {
        vu q = (v >> (8 * i)) & 15;
        if (FIFTH) q |= ((high >> (8 * i)) & 1) << 4;
        return multiply_add(unsigned_float(q), step, least);
      });
    }
  }
}

// 256 values of 6 bits, in sixteen groups with int8 scales.
template <class T>
inline void expand_q6_k(BlockView block, long k, uint32_t* out) {
  const vf d = halves((const char*)block.at + 52 * 64);
  for (int half = 0; half < 2; half++)
    for (int run = 0; run < 4; run++)
      for (int w = 0; w < 8; w++) {
        const int group = 8 * half + 2 * run + w / 4;
        const vf step = d * signed_byte(block.word(48 + group / 4), group % 4), least = step * -32.0f;
        const vu low = block.word(16 * half + 8 * (run & 1) + w) >> (4 * (run >> 1));
        const vu high = block.word(32 + 8 * half + w) >> (2 * run);
        put4<T>(out, k + 128 * half + 32 * run + 4 * w, [&](int i) {
          const vu q = ((low >> (8 * i)) & 15) | (((high >> (8 * i)) & 3) << 4);
          return multiply_add(unsigned_float(q), step, least);
        });
      }
}

// 256 values of 2 bits, in sixteen groups with scales and minima of 4 bits.
template <class T>
inline void expand_q2_k(BlockView block, long k, uint32_t* out) {
  const vf d = halves(block.at + 20 * 64), low = halves(block.at + 20 * 64 + 32);
  for (int run = 0; run < 8; run++)
    for (int w = 0; w < 8; w++) {
      const int group = 2 * run + w / 4;
      const vu both = block.word(group / 4) >> (8 * (group % 4));
      const vf step = d * unsigned_float(both & 15), least = -(low * unsigned_float((both >> 4) & 15));
      const vu v = block.word(4 + run / 4 * 8 + w) >> (2 * (run % 4));
      put4<T>(out, k + 32 * run + 4 * w,
              [&](int i) { return multiply_add(unsigned_float((v >> (8 * i)) & 3), step, least); });
    }
}

// 256 values of 3 bits, the third of which is elsewhere, in sixteen groups with scales of 6 bits.
template <class T>
inline void expand_q3_k(BlockView block, long k, uint32_t* out) {
  const vf d = halves(block.at + 27 * 64);
  for (int run = 0; run < 8; run++)
    for (int w = 0; w < 8; w++) {
      const int group = 2 * run + w / 4;
      const vu low = (block.word(24 + group % 8 / 4) >> (8 * (group % 4) + 4 * (group / 8))) & 15;
      const vu high = (block.word(26) >> (8 * (group % 4) + 2 * (group / 4))) & 3;
      const vf step = d * (unsigned_float(low | high << 4) - 32.0f), least = step * -4.0f;
      const vu v = block.word(8 + run / 4 * 8 + w) >> (2 * (run % 4)), third = block.word(w) >> run;
      put4<T>(out, k + 32 * run + 4 * w, [&](int i) {
        const vu q = ((v >> (8 * i)) & 3) | (((third >> (8 * i)) & 1) << 2);
        return multiply_add(unsigned_float(q), step, least);
      });
    }
}

template <class T, Format F>
inline void expand_block(const char* at, long k, uint32_t* out) {
  if constexpr (F == Q4_0) expand_32<T, false, false>({at, 1}, k, out);
  if constexpr (F == Q4_1) expand_32<T, false, true>({at, 2}, k, out);
  if constexpr (F == Q5_0) expand_32<T, true, false>({at, 1}, k, out);
  if constexpr (F == Q5_1) expand_32<T, true, true>({at, 2}, k, out);
  if constexpr (F == Q8_0) expand_q8_0<T>({at, 1}, k, out);
  if constexpr (F == Q2_K) expand_q2_k<T>({at, 0}, k, out);
  if constexpr (F == Q3_K) expand_q3_k<T>({at, 0}, k, out);
  if constexpr (F == Q4_K) expand_k45<T, false>({at, 2}, k, out);
  if constexpr (F == Q5_K) expand_k45<T, true>({at, 2}, k, out);
  if constexpr (F == Q6_K) expand_q6_k<T>({at, 0}, k, out);
}

template <class T, Format F>
void expand_blocks(const Part& part, long panel, long k, uint32_t* out) {
  constexpr long SIZE = F >= Q2_K ? 256 : 32;
  constexpr long BYTES[] = {0, 18, 20, 22, 24, 34, 84, 110, 144, 176, 210};
  const long bytes = BYTES[F] * LANES;
  const char* at = (const char*)part.data + panel * (k / SIZE) * bytes;
  for (long done = 0; done < k; done += SIZE, at += bytes) expand_block<T, F>(at, done, out);
}

// Float8 (e4m3fn) in byte i of each lane. Exact: its exponents are 120 less than a float32's.
static inline vf float8(vu v, int i) {
  const vu u = v >> (8 * i), low = u & 0x7f;
  const vf normal = (vf)((low << 20) + (120u << 23)), subnormal = unsigned_float(low) * 0x1p-9f;
  const vu is_small = (vu)(low < 8);
  return (vf)(((vu)subnormal & is_small) | ((vu)normal & ~is_small) | (u & 0x80) << 24);
}

// The number of four bits (e2m1), the lowest of each lane.
static inline vf float4(vu v) {
#if defined(__AVX512F__)
  const __m512 values = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
  return (vf)_mm512_permutexvar_ps((__m512i)v, values);
#else
  const vu low = v & 7, is_small = (vu)(low < 2);
  const vf normal = (vf)((low << 22) + (126u << 23)), subnormal = unsigned_float(low) * 0.5f;
  return (vf)(((vu)subnormal & is_small) | ((vu)normal & ~is_small) | (v & 8) << 28);
#endif
}

// 16 powers of two, stored as their exponents and 127. The least is a subnormal number.
static inline vf powers(const uint8_t* p) {
  typedef uint8_t vb __attribute__((vector_size(16)));
  vb exponents;
  std::memcpy(&exponents, p, sizeof exponents);
  const vu bits = __builtin_convertvector(exponents, vu) << 23;
  return (vf)(bits | ((vu)(bits == 0) & (1u << 22)));
}

template <class T, Format F>
void expand_codes(const Part& part, long panel, long k, uint32_t* out) {
  constexpr long EACH = F == INT4 || F == MXFP4 ? 8 : 4;  // codes in a word
  const long groups = (k + part.group - 1) / part.group;
  const uint32_t* words = (const uint32_t*)part.data + panel * (k / EACH) * LANES;
  const long first = panel * groups * LANES;
  const int16_t* zeros = part.zero == nullptr ? nullptr : part.zero + first;
  typedef int16_t vs __attribute__((vector_size(32)));
  vf scale = {}, zero = {};
  const auto use = [&](long group) {
    if constexpr (F == MXFP4)
      scale = powers((const uint8_t*)part.scale + first + group * LANES);
    else
      scale = loadf((const float*)part.scale + first + group * LANES);
    if (zeros == nullptr) {
      zero = splatf(float(part.middle));
    } else {
      vs z;
      std::memcpy(&z, zeros + group * LANES, sizeof z);
      zero = __builtin_convertvector(z, vf);
    }
  };
  const auto value = [&](vu v, int i) {
    if constexpr (F == FP8) return float8(v, i) * scale;
    if constexpr (F == MXFP4) return float4(v >> (4 * i)) * scale;
    if constexpr (F == INT4) return (unsigned_float((v >> (4 * i)) & 15) - zero) * scale;
    return (signed_byte(v, i) - zero) * scale;
  };
  long before = -1;
  for (long at = 0; at < k; at += EACH, words += LANES) {
    const vu v = load(words);
    if (part.group_of == nullptr && at / part.group != before) use(before = at / part.group);
    for (int i = 0; i < EACH; i += 2) {
      if (part.group_of != nullptr) use(part.group_of[at + i]);
      const vf even = value(v, i);
      if (part.group_of != nullptr) use(part.group_of[at + i + 1]);
      put<T>(out, at + i, even, value(v, i + 1));
    }
  }
}

// One panel of a part as lanes [k / PER_LANE][16].
template <class T>
void expand(const Part& part, long panel, long k, uint32_t* out) {
  switch (part.format) {
    case Q4_0: return expand_blocks<T, Q4_0>(part, panel, k, out);
    case Q4_1: return expand_blocks<T, Q4_1>(part, panel, k, out);
    case Q5_0: return expand_blocks<T, Q5_0>(part, panel, k, out);
    case Q5_1: return expand_blocks<T, Q5_1>(part, panel, k, out);
    case Q8_0: return expand_blocks<T, Q8_0>(part, panel, k, out);
    case Q2_K: return expand_blocks<T, Q2_K>(part, panel, k, out);
    case Q3_K: return expand_blocks<T, Q3_K>(part, panel, k, out);
    case Q4_K: return expand_blocks<T, Q4_K>(part, panel, k, out);
    case Q5_K: return expand_blocks<T, Q5_K>(part, panel, k, out);
    case Q6_K: return expand_blocks<T, Q6_K>(part, panel, k, out);
    case INT4: return expand_codes<T, INT4>(part, panel, k, out);
    case INT8: return expand_codes<T, INT8>(part, panel, k, out);
    case FP8: return expand_codes<T, FP8>(part, panel, k, out);
    case MXFP4: return expand_codes<T, MXFP4>(part, panel, k, out);
    default: {
      const long lanes = k / T::PER_LANE * LANES;
      std::memcpy(out, (const uint32_t*)part.data + panel * lanes, lanes * sizeof(uint32_t));
    }
  }
}

}  // namespace aio
