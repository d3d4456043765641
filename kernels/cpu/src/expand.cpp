// Adapters added to rows of a linear; expand.h says how.
#include "expand.h"

#include <type_traits>
#include <vector>

#include "transpose.h"

namespace aio {

template <class T>
const uint32_t* panel(const B<T>& b, long rows, uint32_t* room) {
  const bool lies = b.turned && rows == LANES;
  if (!b.int8) {
    if (lies) return (const uint32_t*)b.at;
    transpose<T>((const typename T::elem*)b.at, b.rank, b.rank, rows, room);
    return room;
  }
  constexpr long TIMES = Int8::PER_LANE / T::PER_LANE;
  const long words = (b.rank + Int8::PER_LANE - 1) / Int8::PER_LANE;
  // At the end of the room, so that they are read before they are written over.
  uint32_t* const turned = room + words * (TIMES - 1) * LANES;
  if (FIXED<T> && lies) return (const uint32_t*)b.at;
  if (!lies) transpose<Int8>((const int8_t*)b.at, b.rank, b.rank, rows, FIXED<T> ? room : turned);
  if (FIXED<T>) return room;
  const uint32_t* const bytes = lies ? (const uint32_t*)b.at : turned;
  for (long i = 0; i < words; i++) {
    vu wide[TIMES];
    widen<T>(load(bytes + i * LANES), wide);
    for (long j = 0; j < TIMES; j++) store(room + (i * TIMES + j) * LANES, wide[j]);
  }
  return room;
}

template <class T>
Given given(const void* h, long slices, long width, const Slots& slots, const Segment* segments, long count) {
#if defined(AIO_FIXED)
  if constexpr (FIXED<T>)
    if (slots.int8 && count > 0) {
      const long words = FixedGiven::words(width);
      uint32_t* const out = room<FIXED_GIVEN>(segments[count - 1].end * slices * words * long(sizeof(uint32_t)));
      for (const Segment* g = segments; g < segments + count; g++)
        for (long i = g->begin * slices; i < g->end * slices; i++)
          FixedGiven::make((const uint16_t*)h + i * width, width, out + i * words);
      return {out, slices, words};
    }
#endif
  return {(const uint32_t*)h, slices, width / T::PER_LANE};
}

namespace {

#if defined(__AVX512F__)
// Adds the products of a lane of E's elements, which is `TIMES` lanes of R rows of h.
template <class T, class E, int R>
inline __attribute__((always_inline)) void add_lane(const uint32_t* h, long h_stride, vu lane, vf (&acc)[R]) {
  constexpr int TIMES = E::PER_LANE / T::PER_LANE;
  vu wide[TIMES];
  if constexpr (TIMES == 1)
    wide[0] = lane;
  else
    widen<T>(lane, wide);
#pragma GCC unroll 4
  for (int i = 0; i < TIMES; i++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[r] = T::dot(acc[r], splat(h[r * h_stride + i]), wide[i]);
}

// y += B h for R rows and P panels of B, turned, of whole lanes of E's elements.
template <class T, class E, int R, int P>
inline void expand_tile(const uint32_t* h, long h_stride, const uint32_t* b, long lanes, typename T::elem* y, long y_stride) {
  vf acc[P][R];
#pragma GCC unroll 4
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[p][r] = T::load16(y + r * y_stride + p * LANES);
#if defined(AIO_FIXED)
  if constexpr (FIXED<T> && std::is_same_v<E, Int8>)
    add_fixed_lanes<R, P>(h, h_stride, b, lanes, acc);
  else
#endif
  for (long k = 0; k < lanes; k++, h += E::PER_LANE / T::PER_LANE)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) add_lane<T, E, R>(h, h_stride, load(b + (p * lanes + k) * LANES), acc[p]);
#pragma GCC unroll 4
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) T::store16(y + r * y_stride + p * LANES, acc[p][r]);
}

// The same for so many panels: with few rows of several at a time, or each product would wait for the one before.
template <class T, class E, int R>
void expand_tiles(const uint32_t* h, long h_stride, const B<T>& b, long panels, typename T::elem* y, long y_stride) {
  constexpr int SOME = R <= (FIXED<T> && std::is_same_v<E, Int8> ? 2 : 4) ? 4 : 2;
  const long lanes = b.rank / E::PER_LANE;
  const uint32_t* at = (const uint32_t*)b.at;
  long p = 0;
  for (; p + SOME <= panels; p += SOME)
    expand_tile<T, E, R, SOME>(h, h_stride, at + p * lanes * LANES, lanes, y + p * LANES, y_stride);
  for (; p < panels; p++)
    expand_tile<T, E, R, 1>(h, h_stride, at + p * lanes * LANES, lanes, y + p * LANES, y_stride);
}
#endif

// For any rank, and for shorter registers.
template <class T, int R>
void expand_turned(const uint32_t* h, long h_stride, const B<T>& b, long panels, typename T::elem* y, long y_stride,
                   uint32_t* room) {
  for (long p = 0; p < panels; p++, y += LANES) {
    const uint32_t* const turned = panel(b.from(p * LANES), LANES, room);
    vf acc[R];
    for (int r = 0; r < R; r++) acc[r] = T::load16(y + r * y_stride);
    add_lanes<T, R>(h, h_stride, turned, b.lanes, b.int8, acc);
    for (int r = 0; r < R; r++) T::store16(y + r * y_stride, acc[r]);
  }
}

#if defined(AIO_TILES)
// The same in tile registers, for up to 16 rows and P panels of B, turned, of so many lanes: a whole number of halves.
template <int P>
void expand_registers(const uint32_t* h, long h_stride, const uint32_t* b, long lanes, long rows, uint16_t* y, long y_stride) {
  static_assert(P <= SUMS);
  alignas(64) vf sums[P][TILE_ROWS];
  for (int p = 0; p < P; p++)
    for (long r = 0; r < rows; r++) sums[p][r] = Bf16::load16(y + r * y_stride + p * LANES);
  unrolled<P>([&](auto p) { load_tile<p>(sums[p], TILE_BYTES); });
  for (long k = 0; k < lanes; k += LANES / 2)
    add_tile_products<Bf16, 1, P, HALF_LEFT, HALF_RIGHT>(
        [&](auto) { load_tile<HALF_LEFT>(h + k, h_stride * long(sizeof(uint32_t))); },
        [&](auto p) { load_tile<HALF_RIGHT>(b + (p * lanes + k) * LANES, TILE_BYTES); });
  unrolled<P>([&](auto p) { store_tile<p>(sums[p], TILE_BYTES); });
  for (int p = 0; p < P; p++)
    for (long r = 0; r < rows; r++) Bf16::store16(y + r * y_stride + p * LANES, sums[p][r]);
}

void expand_in_tiles(const uint32_t* h, long h_stride, const B<Bf16>& b, long rows, long panels, uint16_t* y, long y_stride,
                     Tiles& tiles) {
  constexpr int SOME = SUMS;
  const auto* const lanes = (const uint32_t*)b.at;
  for (long r = 0; r < rows; r += TILE_ROWS, h += TILE_ROWS * h_stride, y += TILE_ROWS * y_stride) {
    const long count = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
    tiles.use(int(count), true);
    long p = 0;
    for (; p + SOME <= panels; p += SOME)
      expand_registers<SOME>(h, h_stride, lanes + p * b.lanes * LANES, b.lanes, count, y + p * LANES, y_stride);
    for (; p < panels; p++)
      expand_registers<1>(h, h_stride, lanes + p * b.lanes * LANES, b.lanes, count, y + p * LANES, y_stride);
  }
}
#endif

// y += B h for `rows` rows, h_stride lanes apart, and so many panels. `room` has room for one of B. E is the type of
// B's elements.
template <class T, class E>
void expand_panels_of(const uint32_t* h, long h_stride, const B<T>& b, long rows, long panels, typename T::elem* y,
                   long y_stride, uint32_t* room) {
  // Rows, as many as have room; for more of float32 and int8 it is too much code.
  constexpr long MOST = E::PER_LANE / T::PER_LANE == 4 && most_rows() > 4 ? 4 : most_rows();
  for (long r = 0; r < rows; r += MOST, h += MOST * h_stride, y += MOST * y_stride) {
    const long count = rows - r < MOST ? rows - r : MOST;
#if defined(__AVX512F__)
    if (b.turned) {
#define CALL(R) expand_tiles<T, E, R <= MOST ? R : 1>(h, h_stride, b, panels, y, y_stride)
      AIO_SWITCH_ROWS(count, CALL)
#undef CALL
      continue;
    }
#endif
#define CALL(R) expand_turned<T, R <= MOST ? R : 1>(h, h_stride, b, panels, y, y_stride, room)
    AIO_SWITCH_ROWS(count, CALL)
#undef CALL
  }
}

}  // namespace

template <class T>
void expand_panels(const uint32_t* h, long h_stride, const B<T>& b, long rows, long panels, typename T::elem* y,
                   long y_stride, uint32_t* room, [[maybe_unused]] Tiles& tiles) {
#if defined(AIO_TILES)
  if constexpr (T::PER_LANE == 2)
    if (!b.int8 && b.turned && b.lanes % (LANES / 2) == 0)
      return expand_in_tiles(h, h_stride, b, rows, panels, y, y_stride, tiles);
#endif
  if (b.int8)
    expand_panels_of<T, Int8>(h, h_stride, b, rows, panels, y, y_stride, room);
  else
    expand_panels_of<T, T>(h, h_stride, b, rows, panels, y, y_stride, room);
}

template const uint32_t* panel(const B<Bf16>&, long, uint32_t*);
template const uint32_t* panel(const B<F32>&, long, uint32_t*);
template Given given<Bf16>(const void*, long, long, const Slots&, const Segment*, long);
template Given given<F32>(const void*, long, long, const Slots&, const Segment*, long);
template void expand_panels(const uint32_t*, long, const B<Bf16>&, long, long, Bf16::elem*, long, uint32_t*, Tiles&);
template void expand_panels(const uint32_t*, long, const B<F32>&, long, long, F32::elem*, long, uint32_t*, Tiles&);

namespace {

template <class E>
void turn_in_place(char* b, long outputs, long rank) {
  if (rank == 0 || rank % E::PER_LANE != 0) return;
  const long bytes = LANES * rank * long(sizeof(typename E::elem));
  std::vector<uint32_t> turned(bytes / long(sizeof(uint32_t)));
  for (long row = 0; row + LANES <= outputs; row += LANES, b += bytes) {
    transpose<E>((const typename E::elem*)b, rank, rank, LANES, turned.data());
    std::memcpy(b, turned.data(), bytes);
  }
}

}  // namespace
}  // namespace aio

// Turns matrices B of a slot, in the calling thread: `count` of them, [begin, outputs, rank] in elements of `size` bytes.
// What is left of 16 outputs, or has a rank of no whole lanes, stays as it is.
AIO_EXPORT void aio_turn(void* memory, long size, const int64_t* matrices, long count) {
  for (const int64_t* m = matrices; m < matrices + 3 * count; m += 3) {
    char* const b = (char*)memory + m[0] * size;
    if (size == 1) aio::turn_in_place<aio::Int8>(b, m[1], m[2]);
    if (size == 2) aio::turn_in_place<aio::Bf16>(b, m[1], m[2]);
    if (size == 4) aio::turn_in_place<aio::F32>(b, m[1], m[2]);
  }
}
