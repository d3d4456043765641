// Linears whose weights are int8 with a scale for each output, packed in the panels of tiles.h, four to a lane.
//
// There are two ways to multiply. With the activations as they are, a thread's panels are widened as it comes to them
// and multiplied as any others: that saves memory, and time where memory is what is waited for. Or the activations
// become int8 too, each token with a scale of its own, and the products are of whole numbers, which is twice as fast
// as bfloat16 (LLM.int8(), Dettmers et al., 2022, arXiv:2208.07339).
#include <cmath>
#include <vector>

#include "int8_rows.h"

namespace aio {

AIO_INT8_ROWS(, Bf16)
AIO_INT8_ROWS(, F32)

namespace {

template <class T>
void quantize(const void* weight, void* packed, float* scale, int32_t* start, long n, long k, long rotation,
              int threads) {
  const long lanes = k / Int8::PER_LANE;
  together(threads, [&](const Member& me) {
    std::vector<float> floats(k);
    const Range mine = me.share(n);
    for (long row = mine.begin; row < mine.end; row++) {
      const float largest = rotated<T>((const typename T::elem*)weight + row * k, k, rotation, floats.data());
      const float up = inverse(largest);
      uint32_t* out = (uint32_t*)packed + row / LANES * lanes * LANES + row % LANES;
      int32_t total = 0;
      for (long i = 0; i < lanes; i++) {
        uint32_t lane = 0;
        for (int j = 0; j < 4; j++) {
          const float scaled = floats[i * 4 + j] * up;
          const int32_t q = scaled == scaled ? int32_t(std::nearbyint(scaled)) : 0;
          total += q;
          lane |= uint32_t(uint8_t(q)) << (8 * j);
        }
        out[i * LANES] = lane;
      }
      scale[row] = largest / LARGEST;
      if (start != nullptr) start[row] = -ZERO * total;
    }
  });
}

template <class T>
void dequantize(const void* packed, const float* scale, const int64_t* rows, void* out_, long count, long k,
                long rotation, int threads) {
  using elem = typename T::elem;
  const long lanes = k / Int8::PER_LANE;
  together(count < 16 ? 1 : threads, [&](const Member& me) {
    std::vector<float> floats(k);
    const Range mine = me.share(count);
    for (long r = mine.begin; r < mine.end; r++) {
      const long row = rows[r];
      const uint32_t* in = (const uint32_t*)packed + row / LANES * lanes * LANES + row % LANES;
      for (long i = 0; i < lanes; i++)
        for (int j = 0; j < 4; j++) floats[i * 4 + j] = float(int8_t(in[i * LANES] >> (8 * j)));
      elem* out = (elem*)out_ + r * k;
      rotate_back<T>(floats.data(), k, rotation, scale[row], out);
    }
  });
}

struct Work {
  Linear l;
  const uint32_t* packed;
  long rotation;
  Beside beside;
  int threads;
};

template <class T>
void with_activations_as_they_are(const Work& w) {
  const long panel = w.l.k / Int8::PER_LANE * LANES;
  together(w.threads, [&](const Member& me) {
    uint32_t* const wide = room<WIDENED>(PANELS * w.l.k / T::PER_LANE * long(sizeof(vu)));
    const Share mine(me, w.l.rows, w.l.n);
    Blocks<T, T> compute(me, w.l, w.beside, mine.count());
    for (long i = 0; i < mine.count(); i++) {
      const Block block = mine[i];
      widen<T>(w.packed + block.first * panel, block.panels * panel / LANES, wide);
      compute(wide, block, block.following(w.packed, panel * sizeof(uint32_t)));
    }
  });
}

template <class T>
void with_int8_activations(const Work& w) {
  const long panel = w.l.k / Int8::PER_LANE * LANES;
  together(w.threads, [&](const Member& me) {
    const Linear l = with_int8_rows<T>(me, w.l, w.rotation);
    const Share mine(me, l.rows, l.n);
    Blocks<Int8, T> compute(me, l, w.beside, mine.count());
    for (long i = 0; i < mine.count(); i++) {
      const Block block = mine[i];
      compute(w.packed + block.first * panel, block, block.following(w.packed, panel * sizeof(uint32_t)));
    }
  });
}

}  // namespace
}  // namespace aio

// weight [n, k] -> packed (n * k bytes), scale [n], and, for int8 activations, start [n] (else null). n must be a
// multiple of 16, k of 16 and of `rotation`: the size of the rotated blocks, 0 (none), 16, 32, 64 or 128.
AIO_EXPORT void aio_quantize(int bf16, const void* weight, void* packed, float* scale, int32_t* start, long n, long k,
                             long rotation, int threads) {
  bf16 ? aio::quantize<aio::Bf16>(weight, packed, scale, start, n, k, rotation, threads)
       : aio::quantize<aio::F32>(weight, packed, scale, start, n, k, rotation, threads);
}

// out [count, k]: the given rows of the weight that is in effect.
AIO_EXPORT void aio_dequantize(int bf16, const void* packed, const float* scale, const int64_t* rows, void* out,
                               long count, long k, long rotation, int threads) {
  bf16 ? aio::dequantize<aio::Bf16>(packed, scale, rows, out, count, k, rotation, threads)
       : aio::dequantize<aio::F32>(packed, scale, rows, out, count, k, rotation, threads);
}

// y [rows, n] = x [rows, k] W^T + bias (may be null). With `start` the activations become int8, without they stay.
// `beside`: see aio_linear_beside; may be null.
AIO_EXPORT void aio_linear_int8(int bf16, const void* x, long x_stride, const void* packed, const float* scale,
                                const int32_t* start, long rotation, const void* bias, void* y, long y_stride,
                                long rows, long n, long k, const aio::Beside* beside, int threads) {
  const aio::Work w{{x, x_stride, bias, y, y_stride, rows, n, k, nullptr, scale, start},
                    (const uint32_t*)packed, rotation, beside == nullptr ? aio::Beside{} : *beside, threads};
  if (start == nullptr)
    bf16 ? aio::with_activations_as_they_are<aio::Bf16>(w) : aio::with_activations_as_they_are<aio::F32>(w);
  else
    bf16 ? aio::with_int8_activations<aio::Bf16>(w) : aio::with_int8_activations<aio::F32>(w);
}
