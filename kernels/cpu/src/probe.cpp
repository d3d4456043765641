// What the machine can do at most: floors for benchmarks.
#include <omp.h>

#include "ops.h"
#include "team.h"
#include "tile_registers.h"

namespace aio {
namespace {

template <class T>
void dots(long count, int threads, float* out) {
#pragma omp parallel num_threads(threads)
  {
    constexpr int CHAINS = 16;  // more than the latency of a product
    typename T::acc acc[CHAINS] = {};
    asm volatile("" : "+m"(acc));  // or all chains would be known to be one
    vu a = splat(0x3f803f80u), b = splat(0x3f803f80u);
    for (long i = 0; i < count; i += CHAINS) {
      a ^= 1;  // or the products would be taken out of the loop
#pragma GCC unroll 16
      for (int c = 0; c < CHAINS; c++) acc[c] = T::dot(acc[c], a, b);
    }
    float total = 0.0f;
    for (int c = 0; c < CHAINS; c++)
      for (int i = 0; i < LANES; i++) total += float(acc[c][i]);
#pragma omp atomic
    *out += total;
  }
}

#if defined(AIO_TILES)
// The same in tile registers, each of whose products is one for each of 16 rows and lanes.
template <class T>
void dots_of_tiles(long count, int threads, float* out) {
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles;
    tiles.use(TILE_ROWS);
    for (long i = 0; i < count; i += SUMS * TILE_ROWS * LANES)
      unrolled<SUMS>([](auto sum) { multiply_tiles<T, sum, LEFT, RIGHT>(); });
  }
  *out = 0.0f;  // registers are zero at first
}
#endif

}  // namespace
}  // namespace aio

// `count` dot products of 16 lanes on every thread. kind: 0 float32, 1 bfloat16, 2 int8. out [1] takes their sum.
AIO_EXPORT void aio_probe_dot(int kind, long count, int threads, float* out) {
  if (kind == 0) aio::dots<aio::F32>(count, threads, out);
#if defined(AIO_TILES)
  if (kind == 1) return aio::dots_of_tiles<aio::Bf16>(count, threads, out);
  if (kind == 2) return aio::dots_of_tiles<aio::Int8>(count, threads, out);
#endif
  if (kind == 1) aio::dots<aio::Bf16>(count, threads, out);
  if (kind == 2) aio::dots<aio::Int8>(count, threads, out);
}

// Reads `bytes`, a multiple of 64, once. out [1] takes their sum.
AIO_EXPORT void aio_probe_read(const void* from, long bytes, int threads, float* out) {
  const auto* p = (const uint32_t*)from;
#pragma omp parallel num_threads(threads)
  {
    const aio::Range mine = aio::share(bytes / 64, omp_get_thread_num(), omp_get_num_threads());
    aio::vu total[4] = {};
    long i = mine.begin;
    for (; i + 4 <= mine.end; i += 4)
      for (int j = 0; j < 4; j++) total[j] += aio::load(p + (i + j) * aio::LANES);
    for (; i < mine.end; i++) total[0] += aio::load(p + i * aio::LANES);
    const aio::vu all = total[0] + total[1] + total[2] + total[3];
    uint32_t sum = 0;
    for (int j = 0; j < aio::LANES; j++) sum += all[j];
#pragma omp atomic
    *out += float(sum);
  }
}
