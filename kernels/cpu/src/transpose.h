// Matrices B of adapters, turned on the way from how slots hold them to the panels of a product, and sums of lanes.
#pragma once

#include "ops.h"

namespace aio {

#if defined(__GNUC__) && (__GNUC__ >= 12 || defined(__clang__))
#define AIO_SHUFFLE 1
// Lanes 0..7 of 16 rows (`stride` lanes apart) as 8 vectors of 16 rows: two 8 x 8 transpositions side by side.
inline __attribute__((always_inline)) void transpose8(const uint32_t* b, long stride, vu (&out)[8]) {
  typedef uint32_t half __attribute__((vector_size(32)));
  vu v[8], t[8], u[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    half low, high;
    std::memcpy(&low, b + i * stride, sizeof low);
    std::memcpy(&high, b + (i + 8) * stride, sizeof high);
    v[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    t[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
#pragma GCC unroll 4
  for (int n = 0; n < 4; n++) {
    const int i = n / 2 * 4 + n % 2;
    u[i] = __builtin_shufflevector(t[i], t[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    u[i + 2] = __builtin_shufflevector(t[i], t[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    out[i] = __builtin_shufflevector(u[i], u[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    out[i + 4] = __builtin_shufflevector(u[i], u[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// Lanes 0..7 of 8 rows (`stride` lanes apart) as rows of a panel: an 8 x 8 transposition.
inline void transpose_eighth(const uint32_t* b, long stride, uint32_t* out) {
  __m256i v[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) v[i] = _mm256_loadu_si256((const __m256i*)(b + i * stride));
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]), v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]), v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_si256((__m256i*)(out + i * LANES), _mm256_permute2x128_si256(v[i], v[i + 4], 0x20));
    _mm256_storeu_si256((__m256i*)(out + (i + 4) * LANES), _mm256_permute2x128_si256(v[i], v[i + 4], 0x31));
  }
}
#endif

// Lane i of the result is the sum of v[i]'s lanes: a transposition in which halves are added on the way.
inline vf sums(const vf (&v)[16]) {
#if defined(AIO_SHUFFLE)
  vf a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    a[i] = __builtin_shufflevector(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#pragma GCC unroll 8
  for (int i = 0; i < 4; i++)
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 8
  for (int i = 0; i < 2; i++)
    c[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#else
  vf out;
  for (int i = 0; i < 16; i++) out[i] = sum(v[i]);
  return out;
#endif
}

// `rows` <= 16 rows of B, `stride` elements apart and `rank` long, as lanes [rank lanes][16 rows].
template <class T>
void transpose(const typename T::elem* b, long stride, long rank, long rows, uint32_t* out) {
  const long lanes = (rank + T::PER_LANE - 1) / T::PER_LANE;
  long i = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (rows == LANES && stride % T::PER_LANE == 0)
    for (; (i + 8) * T::PER_LANE <= rank; i += 8)
      for (int half = 0; half < 2; half++) {
        const long apart = stride / T::PER_LANE;
        transpose_eighth((const uint32_t*)b + i + half * 8 * apart, apart, out + i * LANES + half * 8);
      }
#endif
#if defined(AIO_SHUFFLE)
  if (rows == LANES && stride % T::PER_LANE == 0)
    for (; (i + 8) * T::PER_LANE <= rank; i += 8) {
      vu turned[8];
      transpose8((const uint32_t*)b + i, stride / T::PER_LANE, turned);
      for (int j = 0; j < 8; j++) store(out + (i + j) * LANES, turned[j]);
    }
#endif
  for (; i < lanes; i++)
    for (long r = 0; r < LANES; r++) {
      const long left = rank - i * T::PER_LANE;
      uint32_t lane = 0;
      if (r < rows) std::memcpy(&lane, b + r * stride + i * T::PER_LANE, left < T::PER_LANE ? left * sizeof *b : 4);
      out[i * LANES + r] = lane;
    }
}

}  // namespace aio
