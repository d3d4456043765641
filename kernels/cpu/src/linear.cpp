// The packed linear: y = x W^T (+ bias), for weights rearranged once; tiles.h describes how.
#include <vector>

#include "products.h"
#include "transpose.h"

namespace aio {

template <>
const Multiply& multiply<F32>(const Linear&) {
  return MULTIPLY<F32>;
}

template <>
const Multiply& multiply<Bf16>([[maybe_unused]] const Linear& l) {
#if defined(AIO_TILES)
  if (fills_tiles<Bf16>(l.k)) return MULTIPLY_TILES<Bf16>;
#endif
  return MULTIPLY<Bf16>;
}

namespace {

template <class T>
void linear(const Linear& l, const void* packed, const Beside& beside, const Experts& experts, int threads) {
  const long panel = l.k / T::PER_LANE * LANES;
  together(threads, [&](const Member& me) {
    const auto weights = [&](long first, long) { return (const uint32_t*)packed + first * panel; };
    compute_experts<T>(me, l, beside, experts, multiply<T>(l), {packed, panel * long(sizeof(uint32_t))}, weights);
  });
}

template <class T>
void pack(const void* weight, void* packed, long n, long k, int threads) {
  using elem = typename T::elem;
  const long lanes = k / T::PER_LANE, panels = (n + LANES - 1) / LANES;
  together(threads, [&](const Member& me) {
    std::vector<uint32_t> turned(lanes * LANES);
    const Range mine = me.share(panels);
    for (long panel = mine.begin; panel < mine.end; panel++) {
      const long row = panel * LANES, rows = n - row < LANES ? n - row : LANES;
      transpose<T>((const elem*)weight + row * k, k, k, rows, turned.data());
      std::memcpy((uint32_t*)packed + panel * lanes * LANES, turned.data(), lanes * LANES * sizeof(uint32_t));
    }
  });
}

template <class T>
void unpack(const void* packed, void* weight, long begin, long end, long k) {
  using elem = typename T::elem;
  const long lanes = k / T::PER_LANE;
  for (long row = begin; row < end; row++) {
    const uint32_t* in = (const uint32_t*)packed + row / LANES * lanes * LANES + row % LANES;
    uint32_t* out = (uint32_t*)((elem*)weight + (row - begin) * k);
    for (long i = 0; i < lanes; i++) out[i] = in[i * LANES];
  }
}

template <class T>
void gather(const void* packed, const int64_t* rows, void* out, long count, long k, int threads) {
  together(count < 16 ? 1 : threads, [&](const Member& me) {
    const Range mine = me.share(count);
    for (long i = mine.begin; i < mine.end; i++)
      unpack<T>(packed, (typename T::elem*)out + i * k, rows[i], rows[i] + 1, k);
  });
}

}  // namespace
}  // namespace aio

// weight [n, k] -> packed, which may be the same memory if n is a multiple of 16; k must be a whole number of lanes. `bf16` chooses the element type here and below.
AIO_EXPORT void aio_pack(int bf16, const void* weight, void* packed, long n, long k, int threads) {
  bf16 ? aio::pack<aio::Bf16>(weight, packed, n, k, threads) : aio::pack<aio::F32>(weight, packed, n, k, threads);
}

// Rows begin..end-1 of a packed weight, as [end - begin, k].
AIO_EXPORT void aio_unpack(int bf16, const void* packed, void* weight, long begin, long end, long k) {
  bf16 ? aio::unpack<aio::Bf16>(packed, weight, begin, end, k)
       : aio::unpack<aio::F32>(packed, weight, begin, end, k);
}

// out [count, k]: the given rows of a packed weight (an embedding that shares its weight with the head).
AIO_EXPORT void aio_gather(int bf16, const void* packed, const int64_t* rows, void* out, long count, long k,
                           int threads) {
  bf16 ? aio::gather<aio::Bf16>(packed, rows, out, count, k, threads)
       : aio::gather<aio::F32>(packed, rows, out, count, k, threads);
}

// y [rows, n] = x [rows, k] W[expert]^T + bias[expert] for rows that are sorted by expert, with begin [experts + 1] the first
// row of each, packed weights [experts * n, k] and bias [experts * n] (may be null); n is a multiple of 16.
AIO_EXPORT void aio_linear_experts(int bf16, const void* x, const void* packed, const void* bias, void* y, const int32_t* begin,
                                   long experts, long n, long k, int threads) {
  const aio::Linear l{bf16 != 0, x, k, bias, y, n, begin[experts], n, k, nullptr, nullptr, nullptr};
  bf16 ? aio::linear<aio::Bf16>(l, packed, {}, {begin, experts}, threads)
       : aio::linear<aio::F32>(l, packed, {}, {begin, experts}, threads);
}

// y [rows, n] = x [rows, k] W^T + bias (may be null). Strides in elements, whole numbers of lanes.
AIO_EXPORT void aio_linear(int bf16, const void* x, long x_stride, const void* packed, const void* bias, void* y,
                           long y_stride, long rows, long n, long k, int threads) {
  const aio::Beside nothing{};
  aio_linear_beside(bf16, x, x_stride, packed, bias, y, y_stride, rows, n, k, &nothing, threads);
}

// The same, with what is done beside it. Memory that is needed next is fetched because with few rows the arithmetic leaves
// the memory idle; and adapters are added while the results are in registers.
AIO_EXPORT void aio_linear_beside(int bf16, const void* x, long x_stride, const void* packed, const void* bias, void* y,
                                  long y_stride, long rows, long n, long k, const aio::Beside* beside, int threads) {
  const aio::Linear l{bf16 != 0, x, x_stride, bias, y, y_stride, rows, n, k, nullptr, nullptr, nullptr};
  bf16 ? aio::linear<aio::Bf16>(l, packed, *beside, {}, threads) : aio::linear<aio::F32>(l, packed, *beside, {}, threads);
}
