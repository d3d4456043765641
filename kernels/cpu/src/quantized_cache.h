// Keys and values in int8, with a scale for each token and head.
//
// The scale is that of the largest element, rounded up to bfloat16, so that no element is cut off.
#pragma once

#include <cfloat>
#include <cmath>

#include "registers.h"

namespace aio {

// Bytes of a block of keys, or of values.
inline long block_bytes(bool bf16, bool int8, long kv_heads, long head_dim, long block_size) {
  return block_size * kv_heads * (int8 ? head_dim + 2 : head_dim * (bf16 ? 2 : 4));
}

// The elements of one head in one block, and the scales behind them. A lane is two neighbouring dimensions of a key, or
// one dimension of two neighbouring values.
struct Int8Head {
  static constexpr long PER_LANE = 2;

  Int8Head(const void* cache, long head, long block_size, long head_dim)
      : elements((int8_t*)cache + head * block_size * (head_dim + 2)),
        scales((uint16_t*)(elements + block_size * head_dim)) {}
  int8_t* elements;
  uint16_t* scales;

  // A register of lanes, as pairs of int16.
  static inline ru load(const int8_t* p) {
#if defined(__AVX512BW__)
    return (ru)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));  // convertvector takes six instructions
#else
    typedef int8_t bytes __attribute__((vector_size(2 * WIDTH)));
    typedef int16_t words __attribute__((vector_size(4 * WIDTH)));
    return (ru)__builtin_convertvector(load_register<bytes>(p), words);
#endif
  }
};

// Lanes of two int16, whose products are whole numbers, so that nothing is rounded.
struct Int16 {};

#if defined(__AVX2__)
template <>
struct Steps<Int16> : OneStep {
  using Sums = ri;
  static inline ri add(ri sums, ru a, ru b) {
#if defined(__AVX512VNNI__)
    return (ri)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sums + (ri)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
    return sums + (ri)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
  }
};
#else
template <>
struct Steps<Int16> {
  using Sums = ri;
  static constexpr int COUNT = 2;
  static inline uint32_t left(uint32_t lane, int step) { return uint32_t(int32_t(step == 0 ? lane << 16 : lane) >> 16); }
  static inline ru right(ru lanes, int step) { return (ru)((ri)(step == 0 ? lanes << 16 : lanes) >> 16); }
  static inline ri add(ri sums, ru a, ru b) { return sums + (ri)a * (ri)b; }
};
#endif

// The largest of what is not negative, NaN being more than all: by their bits, which are in the same order.
static inline float largest_of(vi bits) {
#if defined(__AVX512F__)
  return bits_to_float(uint32_t(_mm512_reduce_max_epi32((__m512i)bits)));
#else
  int32_t most = 0;
  for (int i = 0; i < LANES; i++) most = bits[i] > most ? bits[i] : most;
  return bits_to_float(uint32_t(most));
#endif
}

static inline vi larger(vi a, vi b) { return a > b ? a : b; }
static inline vi magnitude(vf v) { return (vi)v & 0x7fffffff; }

// The nearest whole numbers, of at most 22 bits, as int16.
static inline void store_whole(int16_t* to, vf v) {
  typedef int16_t words __attribute__((vector_size(32)));
  const vf magic = splatf(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vi whole = (vi)(v + magic) - (vi)magic;
#if defined(__AVX512F__)
  const words narrow = (words)_mm512_cvtepi32_epi16((__m512i)whole);
#else
  const words narrow = __builtin_convertvector(whole, words);
#endif
  std::memcpy(to, &narrow, sizeof narrow);
}

// A query as int16, and what each of them stands for. With heads of up to 512 the products' sums fit into 31 bits.
template <class T>
inline float quantize_query(const typename T::elem* x, long size, int16_t* to) {
  vi bits = {};
  for (long i = 0; i < size; i += LANES) bits = larger(magnitude(T::load16(x + i)), bits);
  const float most = largest_of(bits);
  const bool finite = most <= FLT_MAX;
  const float inverse = finite && most > 1e-30f ? 32767.0f / most : 0.0f;
  for (long i = 0; i < size; i += LANES) store_whole(to + i, finite ? T::load16(x + i) * inverse : vf{});
  return finite ? most * (1.0f / 32767.0f) : NAN;
}

// A row's weights of a chunk of keys, times the scales of the values, as int16, and what each of them stands for. Where
// nothing is written yet a scale may be anything, and the weight is zero.
template <int PANELS>
inline float quantize_weights(const vf (&weights)[PANELS], const uint16_t* const (&scales)[PANELS], int16_t* to) {
  vf scaled[PANELS];
  vi bits = {};
  for (int p = 0; p < PANELS; p++) {
    scaled[p] = weights[p] > 0.0f ? weights[p] * Bf16::load16(scales[p]) : weights[p];
    bits = larger(magnitude(scaled[p]), bits);
  }
  const float most = largest_of(bits);
  const bool finite = most <= FLT_MAX;
  const float inverse = finite && most > 1e-30f ? 32767.0f / most : 0.0f;
  for (int p = 0; p < PANELS; p++) store_whole(to + p * LANES, finite ? scaled[p] * inverse : vf{});
  return finite ? most * (1.0f / 32767.0f) : NAN;
}

// Quantizes a token's head: its scale, and `put(i, q)` for each element. What is not finite makes the scale NaN, so that
// it goes on to whoever attends to it.
template <class T, class Put>
inline uint16_t quantize_head(const typename T::elem* x, long size, const Put& put) {
  vi bits = {};
  for (long i = 0; i < size; i += LANES) bits = larger(magnitude(T::load16(x + i)), bits);
  const float most = largest_of(bits);
  const bool finite = most <= FLT_MAX;
  const uint16_t scale = finite ? uint16_t((float_to_bits(most / 127.0f) + 0xffffu) >> 16) : uint16_t(0x7fc0);
  const float inverse = finite && most > 1e-30f ? 1.0f / Bf16::widen(scale) : 0.0f;
  for (long i = 0; i < size; i += LANES) {
    int16_t whole[LANES];
    store_whole(whole, finite ? T::load16(x + i) * inverse : vf{});
    for (int j = 0; j < LANES; j++) put(i + j, int8_t(whole[j]));
  }
  return scale;
}

}  // namespace aio
