// The most likely token of each row of logits.
#include <limits>

#include "ops.h"
#include "team.h"

namespace aio {
namespace {

constexpr long BLOCK = 512;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// The largest of x [size], and whether there is a NaN.
template <class T>
float largest(const typename T::elem* x, long size, bool& nan) {
  vf most = splatf(LOWEST);
  vi odd = vi{};
  long i = 0;
  for (; i + LANES <= size; i += LANES) {
    const vf v = T::load16(x + i);
    most = v > most ? v : most;
    odd |= v != v;
  }
  float found = max(most);
  for (int lane = 0; lane < LANES; lane++) nan |= odd[lane] != 0;
  for (; i < size; i++) {
    const float v = T::widen(x[i]);
    found = v > found ? v : found;
    nan |= v != v;
  }
  return found;
}

// By way of the first block that has the largest: only in that one is it looked for.
template <class T>
int64_t first_largest(const typename T::elem* x, long size) {
  float most = LOWEST;
  long block = 0;
  bool nan = false;
  for (long begin = 0; begin < size && !nan; begin += BLOCK) {
    const float found = largest<T>(x + begin, size - begin < BLOCK ? size - begin : BLOCK, nan);
    if (found > most) most = found, block = begin;
  }
  if (nan || most - most != 0.0f) return -1;
  while (T::widen(x[block]) != most) block++;
  return block;
}

template <class T>
void argmax(const void* x, long rows, long size, int64_t* best, int threads) {
  together(int(rows < threads ? rows : threads), [&](const Member& me) {
    const Range mine = me.share(rows);
    for (long i = mine.begin; i < mine.end; i++) best[i] = first_largest<T>((const typename T::elem*)x + i * size, size);
  });
}

}  // namespace
}  // namespace aio

// best [rows]: the first index of the largest of each row of x [rows, size]; -1 if that is not finite, or if one is NaN.
AIO_EXPORT void aio_argmax(int bf16, const void* x, long rows, long size, int64_t* best, int threads) {
  bf16 ? aio::argmax<aio::Bf16>(x, rows, size, best, threads) : aio::argmax<aio::F32>(x, rows, size, best, threads);
}
