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

// How the elements of a row become whole numbers, and the scale that they have then; NaN if anything is not finite.
struct FixedScale {
  __m512 up;
  float scale;

  FixedScale(const uint16_t* x, long k) {
    constexpr float LARGEST = 127 * 256;
    __m512i top = _mm512_setzero_si512();  // of magnitudes as whole numbers, of which what is not finite is the largest
    const auto look_at = [&](__m512i v) { top = _mm512_max_epu16(top, _mm512_and_si512(v, _mm512_set1_epi16(0x7fff))); };
    long i = 0;
    for (; i + 2 * LANES <= k; i += 2 * LANES) look_at(_mm512_loadu_si512(x + i));
    if (i < k) look_at(_mm512_maskz_loadu_epi16((1u << (k - i)) - 1, x + i));
    top = _mm512_max_epu32(_mm512_slli_epi32(top, 16), _mm512_and_si512(top, _mm512_set1_epi32(0x7fff0000)));
    const float largest = bits_to_float(_mm512_reduce_max_epu32(top));
    up = _mm512_set1_ps(largest > 0.0f ? LARGEST / largest : 0.0f);
    scale = largest / LARGEST;
  }

  // Of 16 elements, each in the upper half of a lane; the lower one is zero.
  __m512i rounded(__m512i lanes) const { return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(lanes), up)); }
};

// A row of a linear's input, of which as many lie one behind the other: whole numbers, and the scale after them.
struct FixedInput {
  static constexpr long STEP = 2 * LANES;  // elements of a vector

  static long vectors(long k) { return (k + STEP - 1) / STEP; }
  static long words(long k) { return (vectors(k) + 1) * LANES; }

  static void make(const uint16_t* x, long k, uint32_t* out) {
    const FixedScale by(x, k);
    const auto put = [&](long i, __m512i v) {
      const __m512i even = by.rounded(_mm512_slli_epi32(v, 16));
      const __m512i odd = by.rounded(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)));
      _mm512_store_si512(out + i / 2, _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16)));
    };
    long i = 0;
    for (; i + STEP <= k; i += STEP) put(i, _mm512_loadu_si512(x + i));
    if (i < k) put(i, _mm512_maskz_loadu_epi16((1u << (k - i)) - 1, x + i));
    std::memcpy(out + vectors(k) * LANES, &by.scale, sizeof by.scale);
  }

  static float scale(const uint32_t* row, long k) { return bits_to_float(row[vectors(k) * LANES]); }

  // A row of A as it is multiplied by these, with zeros up to whole vectors.
  static void widen(const int8_t* row, long k, int16_t* out) {
    for (long i = 0; i < k; i += STEP) {
      const __mmask32 some = k - i < STEP ? (1u << (k - i)) - 1 : ~0u;
      _mm512_storeu_si512(out + i, _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(some, row + i)));
    }
  }
};

// Sums are of type vi: of __m512i, whose elements are of 64 bits, GCC copies each at every step of a loop.
//
// Adds the products of a vector of TOKENS rows, `stride` words apart, and of 4 rows of A.
template <int TOKENS>
inline __attribute__((always_inline)) void add_fixed_vector(const uint32_t* x, long stride, const __m512i (&row)[4],
                                                            vi (&sums)[TOKENS][4]) {
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; t++) {
    const __m512i token = _mm512_load_si512(x + t * stride);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) sums[t][r] = (vi)_mm512_dpwssd_epi32((__m512i)sums[t][r], token, row[r]);
  }
}

// The products of TOKENS rows with 4 rows of A, widened if E is int16_t, by lane and without the rows' scales: acc[t * 4 + r],
// which are zero. Meanwhile the 4 rows at `later` are fetched, unless they are widened.
template <int TOKENS, class E>
inline void add_fixed(const uint32_t* x, long stride, const E* const (&a)[4], long k, const int8_t* later, vf* acc) {
  constexpr long MOST = 8192, STEP = FixedInput::STEP;  // elements whose sums fit into 32 bits, by lane
  for (long begin = 0; begin < k; begin += MOST) {
    const long end = k - begin < MOST ? k : begin + MOST;
    vi sums[TOKENS][4];
    __m512i row[4];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) sums[t][r] = vi{};
    long i = begin;
    if constexpr (sizeof(E) > 1) {
      for (; i < end; i += STEP) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) row[r] = _mm512_loadu_si512(a[r] + i);
        add_fixed_vector<TOKENS>(x + i / 2, stride, row, sums);
      }
    } else {
      for (; i + STEP <= end; i += STEP) {
        if (i % (2 * STEP) == 0)
#pragma GCC unroll 4
          for (int r = 0; r < 4; r++) __builtin_prefetch(later + r * k + i, 0, 2);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) row[r] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(a[r] + i)));
        add_fixed_vector<TOKENS>(x + i / 2, stride, row, sums);
      }
      if (i < end) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) row[r] = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1u << (end - i)) - 1, a[r] + i));
        add_fixed_vector<TOKENS>(x + i / 2, stride, row, sums);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) acc[t * 4 + r] += __builtin_convertvector(sums[t][r], vf);
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
    const FixedScale by(h, width);
    __m512i total = _mm512_setzero_si512();
    for (long i = 0; i < width; i += LANES) {
      const __mmask16 there = width - i >= LANES ? 0xffff : (1 << (width - i)) - 1;
      const __mmask16 some = width - i >= LANES ? 0xffff : (1 << (4 * low(width - i))) - 1;
      const __m512i v = by.rounded(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, h + i)), 16));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
      _mm_mask_storeu_epi8(out + HEAD + i / 4, some, _mm512_cvtepi32_epi8(high));
      _mm_mask_storeu_epi8(out + HEAD + apart + i / 4, some, _mm512_cvtepi32_epi8(v));
      total = _mm512_add_epi32(total, v);
    }
    out[0] = float_to_bits(by.scale);
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
  vi sums[P][R];
#pragma GCC unroll 4
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[p][r] = vi{};
  const auto add = [&](const uint32_t* at) {
    for (long k = 0; k < lanes; k++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) {
        const vu bytes = load(b + (p * lanes + k) * LANES) ^ 0x80808080u;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
          sums[p][r] = Int8::dot(sums[p][r], bytes, splat(at[r * h_stride + k]));
      }
  };
  add(h + FixedGiven::HEAD);
#pragma GCC unroll 4
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      sums[p][r] = (sums[p][r] << 8) + int32_t(h[r * h_stride + 1]);
  add(h + FixedGiven::HEAD + h[3]);
#pragma GCC unroll 4
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      y[p][r] = multiply_add(__builtin_convertvector(sums[p][r], vf), splatf(bits_to_float(h[r * h_stride])), y[p][r]);
}
#else
template <class T>
constexpr bool FIXED = false;
#endif

}  // namespace aio
