// Tile registers: the dozen instructions of AMX, and what they do in plain C++ on any machine.
//
// A register has up to 16 rows of 64 bytes. The left operand of a product has rows of lanes, the right one has lanes of 16
// columns, which is how weights are packed (tiles.h), and sums are [row][column] of 32 bits. The stand-in, for tests, rounds
// as the instructions do (Intel 64 and IA-32 Architectures Software Developer's Manual, TDPBF16PS): bit for bit.
//
// The first registers are sums, then come two left operands and two right ones. Where there are operands of half as many lanes,
// HALF_LEFT and HALF_RIGHT are these.
#pragma once

#include <type_traits>
#include <utility>

#include "common.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define AIO_TILES 1
#elif defined(AIO_TILES_STAND_IN)
#define AIO_TILES 1
#include <cmath>
#endif

namespace aio {
#if defined(AIO_TILES)

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;
constexpr int SUMS = 4, LEFT = 4, HALF_LEFT = 5, RIGHT = 6, HALF_RIGHT = 7;

// What LDTILECFG reads.
struct TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Sums and their left operands have so many rows.
  TileShapes(int count, bool halves) {
    for (int i = 0; i <= HALF_RIGHT; i++) row_bytes[i] = TILE_BYTES, rows[i] = uint8_t(i >= RIGHT ? TILE_ROWS : count);
    if (halves) row_bytes[HALF_LEFT] = TILE_BYTES / 2, rows[HALF_RIGHT] = TILE_ROWS / 2;
  }
};

#if defined(AIO_TILES_STAND_IN)
// The registers of a thread.
struct TileState {
  TileShapes shapes{0, false};
  uint32_t word[8][TILE_ROWS][LANES] = {};
};
inline thread_local TileState tile_state;

static inline void configure_tiles(const TileShapes& shapes) { tile_state = {}, tile_state.shapes = shapes; }
static inline void release_tiles() { tile_state = {}; }

template <int TILE>
static inline void load_tile(const void* from, long stride) {
  TileState& s = tile_state;
  for (int r = 0; r < s.shapes.rows[TILE]; r++)
    std::memcpy(s.word[TILE][r], (const char*)from + r * stride, s.shapes.row_bytes[TILE]);
}

template <int TILE>
static inline void store_tile(void* to, long stride) {
  const TileState& s = tile_state;
  for (int r = 0; r < s.shapes.rows[TILE]; r++)
    std::memcpy((char*)to + r * stride, s.word[TILE][r], s.shapes.row_bytes[TILE]);
}

template <int TILE>
static inline void zero_tile() {
  std::memset(tile_state.word[TILE], 0, sizeof tile_state.word[TILE]);
}

static inline float without_denormals(float f) { return std::fpclassify(f) == FP_SUBNORMAL ? std::copysign(0.0f, f) : f; }

// Sums of even and of odd elements by themselves, from zero on, each product added without being rounded.
static inline void multiply_lanes(Bf16, float& sum, const uint32_t (&left)[LANES], const uint32_t (&right)[TILE_ROWS][LANES],
                                  int lanes, int column) {
  float parts[2] = {};
  for (int k = 0; k < lanes; k++)
    for (int i = 0; i < 2; i++) {
      const float a = without_denormals(Bf16::widen(uint16_t(left[k] >> (16 * i))));
      const float b = without_denormals(Bf16::widen(uint16_t(right[k][column] >> (16 * i))));
      parts[i] = without_denormals(std::fma(a, b, parts[i]));
    }
  sum = without_denormals(without_denormals(sum) + without_denormals(parts[0] + parts[1]));
}

static inline void multiply_lanes(Int8, int32_t& sum, const uint32_t (&left)[LANES], const uint32_t (&right)[TILE_ROWS][LANES],
                                  int lanes, int column) {
  for (int k = 0; k < lanes; k++)
    for (int shift = 0; shift < 32; shift += 8)
      sum += int32_t(left[k] >> shift & 0xff) * int8_t(right[k][column] >> shift);
}

template <class T, int SUM, int A, int B>
static inline void multiply_tiles() {
  using Sum = std::decay_t<decltype(typename T::acc{}[0])>;
  TileState& s = tile_state;
  for (int r = 0; r < s.shapes.rows[SUM]; r++)
    for (int c = 0; c < LANES; c++) {
      Sum sum;
      std::memcpy(&sum, &s.word[SUM][r][c], sizeof sum);
      multiply_lanes(T{}, sum, s.word[A][r], s.word[B], s.shapes.rows[B], c);
      std::memcpy(&s.word[SUM][r][c], &sum, sizeof sum);
    }
}
#else
// Compilers' own intrinsics take no template arguments, and do not say that they read memory.
static inline void configure_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
static inline void release_tiles() { asm volatile("tilerelease"); }

template <int TILE>
static inline void load_tile(const void* from, long stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
static inline void store_tile(void* to, long stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
static inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

// SUM += A times B: bfloat16, or unsigned bytes times signed ones.
template <class T, int SUM, int A, int B>
static inline void multiply_tiles() {
  if constexpr (T::PER_LANE == 2)
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
  else
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
}
#endif

// Does something with each of 0 .. COUNT - 1 as a constant.
template <int... I, class Work>
inline __attribute__((always_inline)) void unrolled(std::integer_sequence<int, I...>, const Work& work) {
  (work(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, class Work>
inline __attribute__((always_inline)) void unrolled(const Work& work) {
  unrolled(std::make_integer_sequence<int, COUNT>{}, work);
}

// Adds products of H registers of rows and P of columns to the sums h * P + p: left(h) loads A, right(p) loads B.
template <class T, int H, int P, int A, int B, class Left, class Right>
inline __attribute__((always_inline)) void add_tile_products(const Left& left, const Right& right) {
  unrolled<H>([&](auto h) {
    left(h);
    unrolled<P>([&](auto i) {
      constexpr int p = h % 2 == 0 ? i : P - 1 - i;  // there and back: the last one is not loaded again
      if (h == 0 || i > 0) right(std::integral_constant<int, p>{});
      multiply_tiles<T, h * P + p, A, B>();
    });
  });
}

// The calling thread's registers for as long as this lives. Other libraries of the process use them too, in ways of their own:
// nothing is known of them before, and nothing may be left in them.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (rows_ > 0) release_tiles();
  }

  // Sums and left operands have so many rows from now on. What is in the registers is lost.
  void use(int rows, bool halves = false) {
    if (rows != rows_ || halves != halves_) configure_tiles(TileShapes(rows, halves));
    rows_ = rows, halves_ = halves;
  }

 private:
  int rows_ = 0;
  bool halves_ = false;
};
#else
struct Tiles {};
#endif

}  // namespace aio
