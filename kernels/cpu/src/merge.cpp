// A weight with an adapter added to it, W + B A, in the packed order (tiles.h). It is made beside the steps, by one thread.
#include "common.h"

namespace aio {
namespace {

constexpr int INPUTS = 4;  // whose sums are kept in registers

// The bits of a bfloat16 in the upper half: rounded to nearest even; NaN stays NaN.
static inline vu upper_half(vf f) {
  const vu u = (vu)f;
  const vu is_nan = (vu)((vi)(u & 0x7fffffffu) > 0x7f800000);
  return ((is_nan & (u | 0x400000u)) | (~is_nan & (u + 0x7fffu + ((u >> 16) & 1)))) & 0xffff0000u;
}

// A lane of 16 outputs, with the sums of its inputs added.
template <class T>
vu add(vu w, const vf* sums);
template <>
inline vu add<F32>(vu w, const vf* sums) {
  return (vu)((vf)w + sums[0]);
}
template <>
inline vu add<Bf16>(vu w, const vf* sums) {
  return (upper_half((vf)(w << 16) + sums[0]) >> 16) | upper_half((vf)(w & 0xffff0000u) + sums[1]);
}

template <class T>
void merge(const uint32_t* packed, uint32_t* out, const float* a, const float* b, long n, long k, long rank) {
  const long panel_lanes = k / T::PER_LANE * LANES;
  for (long column = 0; column < n; column += LANES, packed += panel_lanes, out += panel_lanes) {
    for (long input = 0; input < k; input += INPUTS) {
      rf kept[INPUTS][PER_VECTOR] = {};
      for (long r = 0; r < rank; r++) {
        rf outputs[PER_VECTOR];
        for (int j = 0; j < PER_VECTOR; j++) outputs[j] = load_register<rf>(b + r * n + column + j * WIDTH);
#pragma GCC unroll 4
        for (int i = 0; i < INPUTS; i++) {
          const rf x = rf{} + a[(input + i) * rank + r];
#pragma GCC unroll 4
          for (int j = 0; j < PER_VECTOR; j++) kept[i][j] = multiply_add(x, outputs[j], kept[i][j]);
        }
      }
      vf sums[INPUTS];
      std::memcpy(sums, kept, sizeof sums);
      const long lane = input / T::PER_LANE * LANES;
      for (int i = 0; i < INPUTS / T::PER_LANE; i++)
        store(out + lane + i * LANES, add<T>(load(packed + lane + i * LANES), sums + i * T::PER_LANE));
    }
  }
}

}  // namespace
}  // namespace aio

// out = packed + b^T a^T for weights [n, k] in the packed order, in the calling thread: a [k, rank] and b [rank, n] are those of
// an adapter, transposed. n is a multiple of 16, k of 4; rank may be 0.
AIO_EXPORT void aio_merge(int bf16, const void* packed, void* out, const float* a, const float* b, long n, long k, long rank) {
  bf16 ? aio::merge<aio::Bf16>((const uint32_t*)packed, (uint32_t*)out, a, b, n, k, rank)
       : aio::merge<aio::F32>((const uint32_t*)packed, (uint32_t*)out, a, b, n, k, rank);
}
