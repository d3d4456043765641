// Rows of bfloat16 as whole numbers of 16 bits, which are multiplied by int8 as it lies.
//
// x = scale * (256 high + low), with a byte for each. So 64 int8 of an adapter are multiplied by two instructions, where it
// takes a dozen to widen them to bfloat16. An element's error is at most 2^-16 of the row's largest: less than int8 weights
// have, and less than bfloat16 has, except for elements below a 128th of the largest. The instruction multiplies unsigned by
// signed bytes. So 128 is added to an adapter's, and what that adds to a sum is what the sum starts with, negated. Sums are of
// whole numbers: in any order they give the same bits.
#pragma once

#include "ops.h"
#include "registers.h"

namespace aio {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define AIO_FIXED 1
// Whether rows of T are multiplied by int8 in this way.
template <class T>
constexpr bool FIXED = T::PER_LANE == 2;

static inline __m512 float16_at(const uint16_t* p, long count) {
  const __mmask16 some = count >= LANES ? 0xffff : (1 << count) - 1;
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)), 16));
}

// The bytes of a row of k elements: put(i, high, low) gets those from element i on, 16 at a time and zero after the last.
// Returns the scale; NaN if anything is not finite.
template <class Put>
inline float to_fixed(const uint16_t* x, long k, const Put& put) {
  constexpr float LARGEST = 127 * 256;
  __m512i top = _mm512_setzero_si512();  // of magnitudes as whole numbers, of which what is not finite is the largest
  for (long i = 0; i < k; i += LANES) {
    const __m512i v = _mm512_castps_si512(float16_at(x + i, k - i));
    top = _mm512_max_epu32(top, _mm512_and_si512(v, _mm512_set1_epi32(0x7fffffff)));
  }
  const float largest = bits_to_float(_mm512_reduce_max_epu32(top));
  const __m512 up = _mm512_set1_ps(largest > 0.0f ? LARGEST / largest : 0.0f);
  for (long i = 0; i < k; i += LANES) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(float16_at(x + i, k - i), up));
    put(i, _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8)), _mm512_cvtepi32_epi8(q));
  }
  return largest / LARGEST;
}

// What sums start with for bytes that 128 is multiplied by.
static inline __m512i without_128(__m512i sum, __m512i bytes) {
  return _mm512_sub_epi32(sum, _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), bytes));
}

static inline vf to_float(__m512i high, __m512i low) {
  return (vf)_mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
}

// A row of a linear's input, of which as many lie one behind the other: what sums start with and the scale, and the bytes by
// blocks of 64, the high ones first.
struct FixedInput {
  static constexpr long BLOCK = 64, HEAD = 3 * LANES, STEP = 2 * LANES;

  static long words(long k) { return HEAD + (k + BLOCK - 1) / BLOCK * STEP; }

  static void make(const uint16_t* x, long k, uint32_t* out) {
    char* const bytes = (char*)(out + HEAD);
    if (k % BLOCK != 0) std::memset(bytes + k / BLOCK * STEP * 4, 0, STEP * 4);
    const float scale = to_fixed(x, k, [&](long i, __m128i high, __m128i low) {
      char* const at = bytes + i / BLOCK * STEP * 4 + i % BLOCK;
      _mm_store_si128((__m128i*)at, high);
      _mm_store_si128((__m128i*)(at + BLOCK), low);
    });
    __m512i high = _mm512_setzero_si512(), low = high;
    for (const uint32_t* at = out + HEAD; at < out + words(k); at += STEP)
      high = without_128(high, _mm512_load_si512(at)), low = without_128(low, _mm512_load_si512(at + LANES));
    _mm512_store_si512(out, high), _mm512_store_si512(out + LANES, low);
    std::memcpy(out + 2 * LANES, &scale, sizeof scale);
  }

  static float scale(const uint32_t* row) { return bits_to_float(row[2 * LANES]); }
};

// The products of TOKENS rows with 4 rows of A, by lane and without the rows' scales: acc[t * 4 + r]. Meanwhile the 4 rows at
// `later` are fetched.
template <int TOKENS>
inline void add_fixed(const uint32_t* x, long stride, const int8_t* const (&a)[4], long k, const int8_t* later, vf* acc) {
  __m512i high[TOKENS][4], low[TOKENS][4];
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
      high[t][r] = _mm512_load_si512(x + t * stride), low[t][r] = _mm512_load_si512(x + t * stride + LANES);
  const uint32_t* at = x + FixedInput::HEAD;
  const auto add = [&](const auto& bytes) {
    __m512i row[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) row[r] = _mm512_xor_si512(bytes(a[r]), _mm512_set1_epi8(-128));
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) {
      const __m512i h = _mm512_load_si512(at + t * stride), l = _mm512_load_si512(at + t * stride + LANES);
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        high[t][r] = _mm512_dpbusd_epi32(high[t][r], row[r], h);
        low[t][r] = _mm512_dpbusd_epi32(low[t][r], row[r], l);
      }
    }
  };
  long i = 0;
  for (; i + FixedInput::BLOCK <= k; i += FixedInput::BLOCK, at += FixedInput::STEP) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) __builtin_prefetch(later + r * k + i, 0, 2);
    add([&](const int8_t* p) { return _mm512_loadu_si512(p + i); });
  }
  if (i < k) add([&](const int8_t* p) { return _mm512_maskz_loadu_epi8((1ull << (k - i)) - 1, p + i); });
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) acc[t * 4 + r] = to_float(high[t][r], low[t][r]);
}

// What A gave for a row and slice, as B is multiplied by it: the scale, what sums start with, after how many words the low
// bytes follow, and the bytes in order.
struct FixedGiven {
  static constexpr long HEAD = 4;

  static long low(long width) { return (width + 3) / 4; }
  static long words(long width) { return HEAD + 2 * low(width); }

  static void make(const uint16_t* h, long width, uint32_t* out) {
    const long apart = low(width);
    __m512i start_high = _mm512_setzero_si512(), start_low = start_high;
    const float scale = to_fixed(h, width, [&, out](long i, __m128i high, __m128i bytes) {
      const __mmask16 some = width - i >= LANES ? 0xffff : (1 << (4 * low(width - i))) - 1;
      _mm_mask_storeu_epi8(out + HEAD + i / 4, some, high);
      _mm_mask_storeu_epi8(out + HEAD + apart + i / 4, some, bytes);
      start_high = without_128(start_high, _mm512_zextsi128_si512(high));
      start_low = without_128(start_low, _mm512_zextsi128_si512(bytes));
    });
    out[0] = float_to_bits(scale);
    out[1] = _mm512_reduce_add_epi32(start_high), out[2] = _mm512_reduce_add_epi32(start_low);
    out[3] = apart;
  }
};

// y += B h for R rows, h_stride words apart, and P panels of B, which adjoin: [bytes / 4][16 outputs] words, of so many lanes.
template <int R, int P>
inline __attribute__((always_inline)) void add_fixed_lanes(const uint32_t* h, long h_stride, const uint32_t* b, long lanes,
                                                           vf (&y)[P][R]) {
  __m512i high[P][R], low[P][R];
#pragma GCC unroll 4
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      high[p][r] = _mm512_set1_epi32(h[r * h_stride + 1]);
      low[p][r] = _mm512_set1_epi32(h[r * h_stride + 2]);
    }
  const uint32_t* at = h + FixedGiven::HEAD;
  const long apart = h[3];
  for (long k = 0; k < lanes; k++, at++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      const __m512i bytes = _mm512_xor_si512(_mm512_loadu_si512(b + (p * lanes + k) * LANES), _mm512_set1_epi8(-128));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        high[p][r] = _mm512_dpbusd_epi32(high[p][r], bytes, _mm512_set1_epi32(at[r * h_stride]));
        low[p][r] = _mm512_dpbusd_epi32(low[p][r], bytes, _mm512_set1_epi32(at[r * h_stride + apart]));
      }
    }
#pragma GCC unroll 4
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      y[p][r] = multiply_add(to_float(high[p][r], low[p][r]), splatf(bits_to_float(h[r * h_stride])), y[p][r]);
}
#else
template <class T>
constexpr bool FIXED = false;
#endif

}  // namespace aio
