// Rows of bfloat16 as whole numbers of 16 bits with a scale, which are multiplied by int8 without rounding.
//
// An element's error is at most 2^-16 of the row's largest: less than int8 weights have, and less than bfloat16 has, except for
// elements below a 128th of the largest. Sums are of whole numbers: in any order they give the same bits. A is widened to 16
// bits as it is read, by one instruction for 32 elements. B is multiplied as it lies, by the numbers' high and low bytes. That
// instruction multiplies unsigned by signed bytes: so 128 is added to B's, and what this adds to a sum is taken off again.
#pragma once

#include "ops.h"
#include "registers.h"

namespace aio {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define AIO_FIXED 1
// Whether rows of T are multiplied by int8 in this way.
template <class T>
constexpr bool FIXED = T::PER_LANE == 2;

// Calls put(i, v) with the whole numbers of a row of k elements, 16 from element i on, zero after the last. Returns the scale;
// NaN if anything is not finite.
template <class Put>
inline float to_fixed(const uint16_t* x, long k, const Put& put) {
  constexpr float LARGEST = 127 * 256;
  __m512i top = _mm512_setzero_si512();  // of magnitudes as whole numbers, of which what is not finite is the largest
  const auto look_at = [&](__m512i v) { top = _mm512_max_epu16(top, _mm512_and_si512(v, _mm512_set1_epi16(0x7fff))); };
  long i = 0;
  for (; i + 2 * LANES <= k; i += 2 * LANES) look_at(_mm512_loadu_si512(x + i));
  if (i < k) look_at(_mm512_maskz_loadu_epi16((1u << (k - i)) - 1, x + i));
  top = _mm512_max_epu32(_mm512_slli_epi32(top, 16), _mm512_and_si512(top, _mm512_set1_epi32(0x7fff0000)));
  const float largest = bits_to_float(_mm512_reduce_max_epu32(top));
  const __m512 up = _mm512_set1_ps(largest > 0.0f ? LARGEST / largest : 0.0f);
  const auto rounded = [&](__m256i v) {
    const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
    return _mm512_cvtps_epi32(_mm512_mul_ps(wide, up));
  };
  for (i = 0; i + LANES <= k; i += LANES) put(i, rounded(_mm256_loadu_si256((const __m256i*)(x + i))));
  if (i < k) put(i, rounded(_mm256_maskz_loadu_epi16((1u << (k - i)) - 1, x + i)));
  return largest / LARGEST;
}

// A row of a linear's input, of which as many lie one behind the other: whole numbers, and the scale after them.
struct FixedInput {
  static constexpr long STEP = 2 * LANES;  // elements of a vector

  static long vectors(long k) { return (k + STEP - 1) / STEP; }
  static long words(long k) { return (vectors(k) + 1) * LANES; }

  static void make(const uint16_t* x, long k, uint32_t* out) {
    _mm512_store_si512(out + (vectors(k) - 1) * LANES, _mm512_setzero_si512());
    const float scale = to_fixed(x, k, [&](long i, __m512i v) {
      _mm256_store_si256((__m256i*)(out + i / 2), _mm512_cvtepi32_epi16(v));
    });
    std::memcpy(out + vectors(k) * LANES, &scale, sizeof scale);
  }

  static float scale(const uint32_t* row, long k) { return bits_to_float(row[vectors(k) * LANES]); }
};

// The products of TOKENS rows with 4 rows of A, by lane and without the rows' scales: acc[t * 4 + r], which are zero. Meanwhile
// the 4 rows at `later` are fetched.
template <int TOKENS>
inline void add_fixed(const uint32_t* x, long stride, const int8_t* const (&a)[4], long k, const int8_t* later, vf* acc) {
  constexpr long MOST = 8192;  // elements whose sums fit into 32 bits, by lane
  for (long begin = 0; begin < k; begin += MOST) {
    const long end = k - begin < MOST ? k : begin + MOST;
    __m512i sums[TOKENS][4];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) sums[t][r] = _mm512_setzero_si512();
    const auto add = [&](long i, const auto& bytes) {
      __m512i row[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) row[r] = _mm512_cvtepi8_epi16(bytes(a[r] + i));
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; t++) {
        const __m512i token = _mm512_load_si512(x + t * stride + i / 2);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) sums[t][r] = _mm512_dpwssd_epi32(sums[t][r], token, row[r]);
      }
    };
    long i = begin;
    for (; i + FixedInput::STEP <= end; i += FixedInput::STEP) {
      if (i % (2 * FixedInput::STEP) == 0)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) __builtin_prefetch(later + r * k + i, 0, 2);
      add(i, [](const int8_t* p) { return _mm256_loadu_si256((const __m256i*)p); });
    }
    if (i < end) add(i, [&](const int8_t* p) { return _mm256_maskz_loadu_epi8((1u << (end - i)) - 1, p); });
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) acc[t * 4 + r] += (vf)_mm512_cvtepi32_ps(sums[t][r]);
  }
}

// What A gave for a row and slice, as B is multiplied by it: the scale, what sums start with, after how many words the low
// bytes follow, and the bytes in order.
struct FixedGiven {
  static constexpr long HEAD = 4;

  static long low(long width) { return (width + 3) / 4; }
  static long words(long width) { return HEAD + 2 * low(width); }

  static void make(const uint16_t* h, long width, uint32_t* out) {
    const long apart = low(width);
    __m512i total = _mm512_setzero_si512();
    const float scale = to_fixed(h, width, [&](long i, __m512i v) {
      const __mmask16 some = width - i >= LANES ? 0xffff : (1 << (4 * low(width - i))) - 1;
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
      _mm_mask_storeu_epi8(out + HEAD + i / 4, some, _mm512_cvtepi32_epi8(high));
      _mm_mask_storeu_epi8(out + HEAD + apart + i / 4, some, _mm512_cvtepi32_epi8(v));
      total = _mm512_add_epi32(total, v);
    });
    out[0] = float_to_bits(scale);
    // 256 sums of the high bytes and those of the low ones start with this together.
    out[1] = uint32_t(_mm512_reduce_add_epi32(total)) * -128u;
    out[2] = 0, out[3] = apart;
  }
};

// y += B h for R rows, h_stride words apart, and P panels of B, which adjoin: [bytes / 4][16 outputs] words, of so many lanes.
// Sums fit into 32 bits up to a rank of 512.
template <int R, int P>
inline __attribute__((always_inline)) void add_fixed_lanes(const uint32_t* h, long h_stride, const uint32_t* b, long lanes,
                                                           vf (&y)[P][R]) {
  __m512i sums[P][R];
#pragma GCC unroll 4
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[p][r] = _mm512_setzero_si512();
  const auto add = [&](const uint32_t* at) {
    for (long k = 0; k < lanes; k++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) {
        const __m512i bytes = _mm512_xor_si512(_mm512_loadu_si512(b + (p * lanes + k) * LANES), _mm512_set1_epi8(-128));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
          sums[p][r] = _mm512_dpbusd_epi32(sums[p][r], bytes, _mm512_set1_epi32(at[r * h_stride + k]));
      }
  };
  add(h + FixedGiven::HEAD);
#pragma GCC unroll 4
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      sums[p][r] = _mm512_add_epi32(_mm512_slli_epi32(sums[p][r], 8), _mm512_set1_epi32(h[r * h_stride + 1]));
  add(h + FixedGiven::HEAD + h[3]);
#pragma GCC unroll 4
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      y[p][r] = multiply_add((vf)_mm512_cvtepi32_ps(sums[p][r]), splatf(bits_to_float(h[r * h_stride])), y[p][r]);
}
#else
template <class T>
constexpr bool FIXED = false;
#endif

}  // namespace aio
