// Activations and weights as int8 with a scale for each row, rotated first.
//
// A few large values would cost all others of their row their precision, so both are multiplied by a Hadamard matrix in
// blocks, which spreads what is large and cancels in the product (QuaRot, Ashkboos et al., 2024, arXiv:2404.00456). What
// is only declared here is defined in quantized.cpp.
#pragma once

#include <vector>

#include "expand.h"
#include "tiles.h"

namespace aio {

constexpr float LARGEST = 127.0f;

// What to multiply by to bring the largest magnitude to 127.
inline float inverse(float largest) { return largest > 0.0f ? LARGEST / largest : 0.0f; }

// The nearest whole numbers, for magnitudes below 2^22.
inline vi nearest(vf v) {
  const vf magic = splatf(12582912.0f);  // 1.5 * 2^23
  return (vi)(v + magic) - (vi)magic;
}

// Elements as floats, in rotated blocks of so many (0: as they are). Returns the largest magnitude; NaN if anything is not
// finite.
template <class T>
float rotated(const typename T::elem* x, long k, long rotation, float* out);

// The row that rotated() gave `in` of, times `scale`.
template <class T>
void rotate_back(const float* in, long k, long rotation, float scale, typename T::elem* out);

// `given` with activations as int8, rotated, which the team makes together; they stay until the next call.
template <class T>
Linear with_int8_rows(const Member& me, const Linear& given, long rotation);

// Int8 lanes as lanes of the activations' type; every int8 is exact in both.
template <class T>
void widen(const uint32_t* in, long lanes, uint32_t* out) {
  constexpr int TIMES = Int8::PER_LANE / T::PER_LANE;
  for (long i = 0; i < lanes; i++) {
    vu wide[TIMES];
    widen<T>(load(in + i * LANES), wide);
    for (int j = 0; j < TIMES; j++) store(out + (i * TIMES + j) * LANES, wide[j]);
  }
}

}  // namespace aio
