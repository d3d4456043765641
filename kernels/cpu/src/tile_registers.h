// Tile registers: the dozen instructions of AMX, and what they do in plain C++ on any machine.
//
// A register has up to 16 rows of 64 bytes. The left operand of a product has rows of lanes, the right one has lanes of 16
// columns, which is how weights are packed (tiles.h), and sums are [row][column] of 32 bits. The stand-in, for tests, rounds
// as the instructions do (Intel 64 and IA-32 Architectures Software Developer's Manual, TDPBF16PS): bit for bit.
//
// Registers 0 to 5 are sums, SUMS of them; LEFT and RIGHT are operands.
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
constexpr int SUMS = 6, LEFT = 6, RIGHT = 7;

// What LDTILECFG reads.
struct TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Sums and their left operands have so many rows.
  explicit TileShapes(int count) {
    for (int i = 0; i <= RIGHT; i++) row_bytes[i] = TILE_BYTES, rows[i] = uint8_t(i == RIGHT ? TILE_ROWS : count);
  }
};

#if defined(AIO_TILES_STAND_IN)
// The registers of a thread.
struct TileState {
  int rows = 0;
  uint32_t word[8][TILE_ROWS][LANES] = {};
};
inline thread_local TileState tile_state;

static inline void configure_tiles(const TileShapes& shapes) { tile_state = {}, tile_state.rows = shapes.rows[0]; }
static inline void release_tiles() { tile_state.rows = 0; }

static inline int tile_rows(int tile) { return tile == RIGHT ? TILE_ROWS : tile_state.rows; }

template <int TILE>
static inline void load_tile(const void* from, long stride) {
  for (int r = 0; r < tile_rows(TILE); r++) std::memcpy(tile_state.word[TILE][r], (const char*)from + r * stride, TILE_BYTES);
}

template <int TILE>
static inline void store_tile(void* to, long stride) {
  for (int r = 0; r < tile_rows(TILE); r++) std::memcpy((char*)to + r * stride, tile_state.word[TILE][r], TILE_BYTES);
}

template <int TILE>
static inline void zero_tile() {
  std::memset(tile_state.word[TILE], 0, sizeof tile_state.word[TILE]);
}

static inline float without_denormals(float f) { return std::fpclassify(f) == FP_SUBNORMAL ? std::copysign(0.0f, f) : f; }

// Sums of even and of odd elements by themselves, from zero on, each product added without being rounded.
static inline void multiply_lanes(Bf16, float& sum, const uint32_t (&left)[LANES], const uint32_t (&right)[TILE_ROWS][LANES], int column) {
  float parts[2] = {};
  for (int k = 0; k < LANES; k++)
    for (int i = 0; i < 2; i++) {
      const float a = without_denormals(Bf16::widen(uint16_t(left[k] >> (16 * i))));
      const float b = without_denormals(Bf16::widen(uint16_t(right[k][column] >> (16 * i))));
      parts[i] = without_denormals(std::fma(a, b, parts[i]));
    }
  sum = without_denormals(without_denormals(sum) + without_denormals(parts[0] + parts[1]));
}

static inline void multiply_lanes(Int8, int32_t& sum, const uint32_t (&left)[LANES], const uint32_t (&right)[TILE_ROWS][LANES], int column) {
  for (int k = 0; k < LANES; k++)
    for (int shift = 0; shift < 32; shift += 8)
      sum += int32_t(left[k] >> shift & 0xff) * int8_t(right[k][column] >> shift);
}

template <class T, int SUM>
static inline void multiply_tiles() {
  using Sum = std::decay_t<decltype(typename T::acc{}[0])>;
  for (int r = 0; r < tile_state.rows; r++)
    for (int c = 0; c < LANES; c++) {
      Sum sum;
      std::memcpy(&sum, &tile_state.word[SUM][r][c], sizeof sum);
      multiply_lanes(T{}, sum, tile_state.word[LEFT][r], tile_state.word[RIGHT], c);
      std::memcpy(&tile_state.word[SUM][r][c], &sum, sizeof sum);
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

// A register of sums += LEFT times RIGHT: bfloat16, or unsigned bytes times signed ones.
template <class T, int SUM>
static inline void multiply_tiles() {
  if constexpr (T::PER_LANE == 2)
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(LEFT), "i"(RIGHT));
  else
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(LEFT), "i"(RIGHT));
}
#endif

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
  void use(int rows) {
    if (rows != rows_) configure_tiles(TileShapes(rows));
    rows_ = rows;
  }

 private:
  int rows_ = 0;
};
#else
struct Tiles {};
#endif

}  // namespace aio
