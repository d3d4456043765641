// Sums of products that stay in registers, whatever their width.
//
// A vector of 16 lanes is one register of AVX-512, two of AVX2 and four of NEON. Where it is more than one, compilers
// keep it in memory, which is four times slower in an inner loop. So inner loops are written over registers: a tile of
// so many rows and columns, the latter each a register of lanes, as many as there is room for.
#pragma once

#include <vector>

#include "common.h"

namespace aio {

// How many of `columns` registers to compute at once with so many rows, such that all of it has room: the sums, one of the
// operands for each of the shorter side, and some to spare. Whole vectors, or parts of one.
constexpr int at_once(int rows, int columns) {
  for (int some = columns; some > 1; some--) {
    const bool whole = columns % some == 0 && (some % PER_VECTOR == 0 || PER_VECTOR % some == 0);
    if (whole && rows * some + (rows < some ? rows : some) + 3 <= REGISTERS) return some;
  }
  return 1;
}

// The largest number of rows, at most 8, with which a vector of columns is computed at once.
constexpr int most_rows() {
  int rows = 8;
  while (rows > 1 && at_once(rows, PER_VECTOR) < PER_VECTOR) rows--;
  return rows;
}

// A thread's memory, kept from call to call: a step has some hundred of them. It begins with a cache line, because a vector
// that is in two of them takes twice as long to store.
enum Room { ROWS_OF_INT8, EXPANDED, WIDENED, LAID_OUT, LAID_OUT_H, BEFORE, QUERIES, WEIGHTS, VALUES, OUTPUTS, FIXED_INPUT, FIXED_GIVEN, WIDE_A, TURNED_TOKENS, LAST_TOKENS };
template <Room>
inline uint32_t* room(long bytes) {
  constexpr uintptr_t LINE = 64;
  static thread_local std::vector<uint32_t> kept;
  const size_t words = (bytes + LINE) / sizeof(uint32_t);
  if (kept.size() < words) kept.resize(words);
  return (uint32_t*)(((uintptr_t)kept.data() + LINE - 1) / LINE * LINE);
}

// How lanes of a type are multiplied, in the order in which dot() does it: in so many steps, each of which takes something
// of a lane of either side. What it takes of the left side, whose lanes are few, is laid out beforehand.
template <class T>
struct Steps;

// Lanes that one step takes as they are.
struct OneStep {
  static constexpr int COUNT = 1;
  static inline uint32_t left(uint32_t lane, int) { return lane; }
  static inline ru right(ru lanes, int) { return lanes; }
};

template <>
struct Steps<F32> : OneStep {
  using Sums = rf;
  static inline rf add(rf sums, ru a, ru b) { return multiply_add((rf)a, (rf)b, sums); }
};

#if defined(__AVX512BF16__)
template <>
struct Steps<Bf16> : OneStep {
  using Sums = rf;
  static inline rf add(rf sums, ru a, ru b) { return Bf16::dot(sums, a, b); }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
struct Steps<Bf16> : OneStep {
  using Sums = rf;
  static inline rf add(rf sums, ru a, ru b) { return (rf)dot4((float32x4_t)sums, (uint32x4_t)a, (uint32x4_t)b); }
};
#else
template <>
struct Steps<Bf16> {
  using Sums = rf;
  static constexpr int COUNT = 2;
  static inline uint32_t left(uint32_t lane, int step) { return step == 0 ? lane << 16 : lane & 0xffff0000u; }
  static inline ru right(ru lanes, int step) { return step == 0 ? lanes << 16 : lanes & 0xffff0000u; }
  static inline rf add(rf sums, ru a, ru b) { return multiply_add((rf)a, (rf)b, sums); }
};
#endif

#if defined(__AVX512VNNI__)
template <>
struct Steps<Int8> : OneStep {
  using Sums = ri;
  static inline ri add(ri sums, ru a, ru b) { return Int8::dot(sums, a, b); }
};
#elif defined(__ARM_FEATURE_DOTPROD)
template <>
struct Steps<Int8> : OneStep {
  using Sums = ri;
  static inline ri add(ri sums, ru a, ru b) { return (ri)dot4((int32x4_t)sums, (uint32x4_t)a, (uint32x4_t)b); }
};
#else
template <>
struct Steps<Int8> {
  using Sums = ri;
#if defined(__AVX2__)
  // Pairs of bytes as pairs of 16 bits. Their products, added in pairs, take as many instructions as bytes would, whose sums
  // of two products may not fit into 16 bits.
  static constexpr int COUNT = 2;
  static inline uint32_t left(uint32_t lane, int step) { return (lane >> (8 * step)) & 0x00ff00ffu; }
#if defined(__AVX512BW__)
  static inline ru right(ru lanes, int step) {
    return (ru)_mm512_srai_epi16(step == 0 ? _mm512_slli_epi16((__m512i)lanes, 8) : (__m512i)lanes, 8);
  }
  static inline ri add(ri sums, ru a, ru b) { return sums + (ri)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#else
  static inline ru right(ru lanes, int step) {
    return (ru)_mm256_srai_epi16(step == 0 ? _mm256_slli_epi16((__m256i)lanes, 8) : (__m256i)lanes, 8);
  }
  static inline ri add(ri sums, ru a, ru b) { return sums + (ri)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#endif
#else
  static constexpr int COUNT = 4;
  static inline uint32_t left(uint32_t lane, int step) { return (lane >> (8 * step)) & 0xff; }
  static inline ru right(ru lanes, int step) { return (ru)((ri)(lanes << (24 - 8 * step)) >> 24); }
  static inline ri add(ri sums, ru a, ru b) { return sums + (ri)a * (ri)b; }
#endif
};
#endif

// Lays out what the steps take of `count` lanes, COUNT words for each.
template <class T>
inline void lay_out(const uint32_t* __restrict lanes, long count, uint32_t* __restrict out) {
  for (long i = 0; i < count; i++)
    for (int step = 0; step < Steps<T>::COUNT; step++) out[i * Steps<T>::COUNT + step] = Steps<T>::left(lanes[i], step);
}

// Has `write` write so many lanes, and lays them out.
template <class T, class Write>
inline void write_laid_out(uint32_t* out, long lanes, const Write& write) {
  if constexpr (Steps<T>::COUNT == 1) {
    write(out);
  } else {
    uint32_t* const plain = room<BEFORE>(lanes * long(sizeof(uint32_t)));
    write(plain);
    lay_out<T>(plain, lanes, out);
  }
}

// sums[row][column] += products of a lane of each row, laid out at left(row), and right(column): a register of each
// column's lanes.
template <class T, int R, int C, class Left, class Right>
inline __attribute__((always_inline)) void add_products(const Left& left, const Right& right,
                                                        typename Steps<T>::Sums (&sums)[R][C]) {
#pragma GCC unroll 4
  for (int step = 0; step < Steps<T>::COUNT; step++) {
    ru b[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) b[c] = Steps<T>::right(right(c), step);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const ru a = ru{} + left(r)[step];
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) sums[r][c] = Steps<T>::add(sums[r][c], a, b[c]);
    }
  }
}

}  // namespace aio
