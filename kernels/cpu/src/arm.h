// Products of Arm's levels: four lanes at a time (dotprod, bf16), and two rows by two columns of two lanes each (i8mm, bf16).
//
// Bytes are signed on both sides. Each product of bfloat16 is rounded as Arm says for BFDOT; BFMMLA is two of these, one after
// the other (Arm Architecture Reference Manual, BFMatMulAdd), so a row's bits do not depend on which of them computes it.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstdint>
#include <type_traits>

namespace aio {

#if defined(__ARM_FEATURE_DOTPROD)
static inline int32x4_t dot4(int32x4_t sums, uint32x4_t a, uint32x4_t b) { return vdotq_s32(sums, (int8x16_t)a, (int8x16_t)b); }
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
static inline float32x4_t dot4(float32x4_t sums, uint32x4_t a, uint32x4_t b) {
  return vbfdotq_f32(sums, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
static inline float32x4_t multiply_pairs(float32x4_t sums, uint32x4_t a, uint32x4_t b) {
  return vbfmmlaq_f32(sums, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
static inline int32x4_t multiply_pairs(int32x4_t sums, uint32x4_t a, uint32x4_t b) {
  return vmmlaq_s32(sums, (int8x16_t)a, (int8x16_t)b);
}
#endif

// Brings the first halves of two registers together, and the second ones. Doing it again undoes it.
template <class R>
static inline void turn_halves(R& a, R& b) {
  const uint64x2_t x = (uint64x2_t)a, y = (uint64x2_t)b;
  a = (R)vtrn1q_u64(x, y), b = (R)vtrn2q_u64(x, y);
}

// sums[row][column] += products of lanes from `begin` on, in pairs; returns the first that is left. Rows are `x_stride` apart;
// right(c, k) gives lane k of a register of columns; each() is called for every lane. The last of an odd number of rows makes a
// pair with itself.
template <int R, int C, class Sums, class Right, class Each>
inline __attribute__((always_inline)) long add_pairs(const uint32_t* x, long x_stride, long begin, long end, const Right& right,
                                                     const Each& each, Sums (&sums)[R][C]) {
  using Native = std::conditional_t<std::is_same_v<std::decay_t<decltype(sums[0][0][0])>, float>, float32x4_t, int32x4_t>;
  constexpr int PAIRS = (R + 1) / 2;
  Sums low[PAIRS][C], high[PAIRS][C];
  const auto other = [](int pair) { return 2 * pair + 1 < R ? 2 * pair + 1 : R - 1; };
#pragma GCC unroll 4
  for (int p = 0; p < PAIRS; p++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) {
      low[p][c] = sums[2 * p][c], high[p][c] = sums[other(p)][c];
      turn_halves(low[p][c], high[p][c]);
    }
  long k = begin;
  for (; k + 1 < end; k += 2) {
    each(), each();
    uint32x4_t b[C][2];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) {
      const uint32x4_t first = (uint32x4_t)right(c, k), second = (uint32x4_t)right(c, k + 1);
      b[c][0] = vzip1q_u32(first, second), b[c][1] = vzip2q_u32(first, second);
    }
#pragma GCC unroll 4
    for (int p = 0; p < PAIRS; p++) {
      const uint32x4_t a = vcombine_u32(vld1_u32(x + 2 * p * x_stride + k), vld1_u32(x + other(p) * x_stride + k));
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) {
        low[p][c] = (Sums)multiply_pairs((Native)low[p][c], a, b[c][0]);
        high[p][c] = (Sums)multiply_pairs((Native)high[p][c], a, b[c][1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < PAIRS; p++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) {
      turn_halves(low[p][c], high[p][c]);
      sums[2 * p][c] = low[p][c];
      if (2 * p + 1 < R) sums[2 * p + 1][c] = high[p][c];
    }
  return k;
}

}  // namespace aio
#endif
