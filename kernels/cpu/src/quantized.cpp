// Linears whose weights are int8 with a scale for each output, packed in the panels of tiles.h, four to a lane.
//
// There are two ways to multiply. With the activations as they are, a thread's panels are widened as it comes to them
// and multiplied as any others: that saves memory, and time where memory is what is waited for. Or the activations
// become int8 too, each token with a scale of its own, and the products are of whole numbers, which is twice as fast
// as bfloat16 (LLM.int8(), Dettmers et al., 2022, arXiv:2208.07339).
#include <cmath>
#include <vector>

#include "hadamard.h"
#include "int8_rows.h"
#include "matrix.h"
#include "products.h"

namespace aio {

template <>
const Multiply& multiply<Int8>([[maybe_unused]] const Linear& l) {
#if defined(AIO_TILES)
  constexpr long FEWEST = 5;  // rows for which tile registers take less time
  if (fills_tiles<Int8>(l.k) && l.rows >= FEWEST) return MULTIPLY_TILES<Int8>;
#endif
  return MULTIPLY<Int8>;
}

// VECTORS is the size of a block, 0: none.
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
      const vb b = __builtin_convertvector(nearest(loadf(floats.data() + i) * up) + Int8::ZERO, vb);
      std::memcpy(bytes + r * given.k + i, &b, sizeof b);
    }
    row_scale[r] = largest / LARGEST / (rotation > 0 ? rotation : 1);
  }
  me.wait();
  return l;
}

#define FOR(T)                                                                          \
  template float rotated<T>(const typename T::elem*, long, long, float*);               \
  template void rotate_back<T>(const float*, long, long, float, typename T::elem*);     \
  template Linear with_int8_rows<T>(const Member&, const Linear&, long);
FOR(Bf16)
FOR(F32)
#undef FOR

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
      if (start != nullptr) start[row] = -Int8::ZERO * total;
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

// A thread's share, of panels as they are or widened.
template <class T, class Out>
void multiply_as(const Member& me, const Matrix& w, const Product& p, const Linear& l) {
  const long panel = w.k / Int8::PER_LANE * LANES;
  const auto weights = [&](long first, long panels) {
    const uint32_t* const packed = (const uint32_t*)w.packed + first * panel;
    if constexpr (T::PER_LANE == Int8::PER_LANE) {
      return packed;
    } else {
      uint32_t* const wide = room<WIDENED>(PANELS * w.k / T::PER_LANE * long(sizeof(vu)));
      widen<T>(packed, panels * panel / LANES, wide);
      return (const uint32_t*)wide;
    }
  };
  compute_experts<Out>(me, l, p.beside, p.experts, multiply<T>(l), {w.packed, panel * long(sizeof(uint32_t))}, weights);
}

template <class T>
void linear(const Matrix& w, const Product& p) {
  together(p.threads, [&](const Member& me) {
    if (w.start == nullptr) return multiply_as<T, T>(me, w, p, p.l);
    multiply_as<Int8, T>(me, w, p, with_int8_rows<T>(me, p.l, w.rotation));
  });
}

}  // namespace

void multiply_int8(const Matrix& w, const Product& p) { (p.l.bf16 ? linear<Bf16> : linear<F32>)(w, p); }

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
