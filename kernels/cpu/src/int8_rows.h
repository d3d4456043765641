// Activations and weights as int8 with a scale for each row, rotated first.
//
// A few large values would cost all others of their row their precision, so both are multiplied by a Hadamard matrix in
// blocks, which spreads what is large and cancels in the product (QuaRot, Ashkboos et al., 2024, arXiv:2404.00456).
#pragma once

#include <vector>

#include "hadamard.h"
#include "tiles.h"

namespace aio {

constexpr float LARGEST = 127.0f;
constexpr int ZERO = 128;  // activations are stored as unsigned bytes, with this added

// Elements as floats, in rotated blocks if VECTORS > 0. Returns the largest magnitude; NaN if anything is not finite.
template <class T, int VECTORS>
float rotated(const typename T::elem* x, long k, float* out) {
  constexpr int N = VECTORS > 0 ? VECTORS : 1;
  vf top = {}, poison = {};
  for (long i = 0; i < k; i += N * LANES) {
    vf v[N];
    for (int j = 0; j < N; j++) v[j] = T::load16(x + i + j * LANES);
    if (VECTORS > 0) hadamard<N>(v);
    for (int j = 0; j < N; j++) {
      const vf magnitude = v[j] < 0.0f ? -v[j] : v[j];
      top = magnitude > top ? magnitude : top;
      poison += v[j] * 0.0f;
      storef(out + i + j * LANES, v[j]);
    }
  }
  return max(top) + sum(poison);
}

template <class T>
float rotated(const typename T::elem* x, long k, long rotation, float* out) {
  switch (rotation / LANES) {
    case 0: return rotated<T, 0>(x, k, out);
    case 1: return rotated<T, 1>(x, k, out);
    case 2: return rotated<T, 2>(x, k, out);
    case 4: return rotated<T, 4>(x, k, out);
    default: return rotated<T, 8>(x, k, out);
  }
}

template <class T, int VECTORS>
void rotate_back(const float* in, long k, float scale, typename T::elem* out) {
  constexpr int N = VECTORS > 0 ? VECTORS : 1;
  const float factor = VECTORS > 0 ? scale / (N * LANES) : scale;
  for (long i = 0; i < k; i += N * LANES) {
    vf v[N];
    for (int j = 0; j < N; j++) v[j] = loadf(in + i + j * LANES);
    if (VECTORS > 0) hadamard<N>(v);
    for (int j = 0; j < N; j++) T::store16(out + i + j * LANES, v[j] * factor);
  }
}

// The row that rotated() gave `in` of, times `scale`.
template <class T>
void rotate_back(const float* in, long k, long rotation, float scale, typename T::elem* out) {
  switch (rotation / LANES) {
    case 0: return rotate_back<T, 0>(in, k, scale, out);
    case 1: return rotate_back<T, 1>(in, k, scale, out);
    case 2: return rotate_back<T, 2>(in, k, scale, out);
    case 4: return rotate_back<T, 4>(in, k, scale, out);
    default: return rotate_back<T, 8>(in, k, scale, out);
  }
}

// What to multiply by to bring the largest magnitude to 127.
inline float inverse(float largest) { return largest > 0.0f ? LARGEST / largest : 0.0f; }

// The nearest whole numbers, for magnitudes below 2^22.
inline vi nearest(vf v) {
  const vf magic = splatf(12582912.0f);  // 1.5 * 2^23
  return (vi)(v + magic) - (vi)magic;
}

// A thread's memory, kept from call to call: a step has some hundred of them.
enum Room { ROWS_OF_INT8, EXPANDED, WIDENED };
template <Room>
inline uint32_t* room(long bytes) {
  static thread_local std::vector<uint32_t> kept;
  const size_t lanes = (bytes + sizeof(uint32_t) - 1) / sizeof(uint32_t);
  if (kept.size() < lanes) kept.resize(lanes);
  return kept.data();
}

// `given` with activations as int8, rotated, which the team makes together; they stay until the next call.
template <class T>
Linear with_int8_rows(const Member& me, const Linear& given, long rotation) {
  auto* const row_scale = (float*)me.from_first([&] { return room<ROWS_OF_INT8>(given.rows * (given.k + long(sizeof(float)))); });
  auto* const bytes = (uint8_t*)(row_scale + given.rows);
  Linear l = given;
  l.x = bytes, l.x_stride = given.k, l.row_scale = row_scale;
  std::vector<float> floats(given.k);
  const Range rows = me.share(given.rows);
  for (long r = rows.begin; r < rows.end; r++) {
    const auto* x = (const typename T::elem*)given.x + r * given.x_stride;
    const float largest = rotated<T>(x, given.k, rotation, floats.data()), up = inverse(largest);
    typedef uint8_t vb __attribute__((vector_size(16)));
    for (long i = 0; i < given.k; i += LANES) {
      const vb b = __builtin_convertvector(nearest(loadf(floats.data() + i) * up) + ZERO, vb);
      std::memcpy(bytes + r * given.k + i, &b, sizeof b);
    }
    row_scale[r] = largest / LARGEST / (rotation > 0 ? rotation : 1);
  }
  me.wait();
  return l;
}

// Int8 lanes as lanes of the activations' type; every int8 is exact in both.
template <class T>
void widen(const uint32_t* in, long lanes, uint32_t* out) {
  constexpr int TIMES = Int8::PER_LANE / T::PER_LANE;
  for (long i = 0; i < lanes; i++) {
    const vu v = load(in + i * LANES);
    vf f[4];
    for (int j = 0; j < 4; j++) f[j] = to_float((vi)(v << (24 - 8 * j)) >> 24);
    for (int j = 0; j < TIMES; j++) {
      const vu lane = T::PER_LANE == 1 ? (vu)f[j] : ((vu)f[2 * j] >> 16) | ((vu)f[2 * j + 1] & 0xffff0000u);
      store(out + (i * TIMES + j) * LANES, lane);
    }
  }
}

// Compiled once, in quantized.cpp.
#define AIO_INT8_ROWS(EXTERN, T)                                                                     \
  EXTERN template class Blocks<Int8, T>;                                                             \
  EXTERN template float rotated<T>(const typename T::elem*, long, long, float*);                     \
  EXTERN template void rotate_back<T>(const float*, long, long, float, typename T::elem*);           \
  EXTERN template Linear with_int8_rows<T>(const Member&, const Linear&, long);
AIO_INT8_ROWS(extern, Bf16)
AIO_INT8_ROWS(extern, F32)

}  // namespace aio
