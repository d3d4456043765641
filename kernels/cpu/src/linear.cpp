// The packed linear: y = x W^T (+ bias), for weights rearranged once; tiles.h describes how.
#include <vector>

#include "matrix.h"
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
void linear(const Matrix& w, const Product& p) {
  const long panel = w.k / T::PER_LANE * LANES;
  together(p.threads, [&](const Member& me) {
    const auto weights = [&](long first, long) { return (const uint32_t*)w.packed + first * panel; };
    compute_experts<T>(me, p.l, p.beside, p.experts, multiply<T>(p.l), {w.packed, panel * long(sizeof(uint32_t))}, weights);
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
void gather(const void* packed, const int64_t* rows, void* out, long count, long k, int threads) {
  const long lanes = k / T::PER_LANE;
  together(count < 16 ? 1 : threads, [&](const Member& me) {
    const Range mine = me.share(count);
    for (long i = mine.begin; i < mine.end; i++) {
      const uint32_t* const in = (const uint32_t*)packed + rows[i] / LANES * lanes * LANES + rows[i] % LANES;
      for (long lane = 0; lane < lanes; lane++) ((uint32_t*)out)[i * lanes + lane] = in[lane * LANES];
    }
  });
}

}  // namespace

void multiply_packed(const Matrix& w, const Product& p) { (p.l.bf16 ? linear<Bf16> : linear<F32>)(w, p); }

void product(int bf16, const Matrix& w, const void* x, void* y, long rows, const Beside& beside, const Experts& experts,
             int threads) {
  const long n = experts.count > 0 ? w.n / experts.count : w.n;
  const Product p{{bf16 != 0, x, w.k, w.bias, y, n, rows, n, w.k, nullptr, w.scale, w.start}, beside, experts, threads};
  switch (w.kind) {
    case PACKED: return multiply_packed(w, p);
    case INT8: return multiply_int8(w, p);
    case INT4: return multiply_int4(w, p);
    default: return multiply_parts(w, p);
  }
}

}  // namespace aio

// weight [n, k] -> packed, which may be the same memory if n is a multiple of 16; k must be a whole number of lanes. `bf16` chooses the element type here and below.
AIO_EXPORT void aio_pack(int bf16, const void* weight, void* packed, long n, long k, int threads) {
  bf16 ? aio::pack<aio::Bf16>(weight, packed, n, k, threads) : aio::pack<aio::F32>(weight, packed, n, k, threads);
}

// out [count, k]: the given rows of a packed weight (an embedding that shares its weight with the head).
AIO_EXPORT void aio_gather(int bf16, const void* packed, const int64_t* rows, void* out, long count, long k,
                           int threads) {
  bf16 ? aio::gather<aio::Bf16>(packed, rows, out, count, k, threads)
       : aio::gather<aio::F32>(packed, rows, out, count, k, threads);
}

// y [rows, n] = x [rows, k] W^T + bias. With `begin` [experts + 1], the first row of each, rows are sorted by expert, whose
// weights are one below the other; it may be null.
AIO_EXPORT void aio_product(int bf16, const Matrix* w, const void* x, void* y, long rows, const int32_t* begin, long experts,
                            int threads) {
  aio::product(bf16, *w, x, y, rows, {}, {begin, experts}, threads);
}
