// Linears whose weights stay as a quantized checkpoint has them: a thread expands its panels as it comes to them, and
// multiplies them as any others, so the outputs are the same bits as those of the expanded weight.
#include "blocks.h"

#include "matrix.h"

namespace aio {
namespace {

// Panel `panel` of all parts.
template <class T>
void expand_any(const Part* part, long panel, long k, uint32_t* out) {
  while (panel >= part->panels) panel -= part++->panels;
  expand<T>(*part, panel, k, out);
}

template <class T>
void linear(const Matrix& w, const Product& p) {
  const long panel = w.k / T::PER_LANE * LANES, each = p.l.n / LANES;
  together(p.threads, [&](const Member& me) {
    std::vector<uint32_t> wide(PANELS * panel);
    const auto weights = [&](long first, long panels) {
      // Panels that are asked for together are of one expert; each has as many parts.
      const Part* part = p.experts.count > 0 ? w.part + first / each * (w.parts / p.experts.count) : w.part;
      for (long i = 0; i < panels; i++) expand_any<T>(part, first % each + i, w.k, wide.data() + i * panel);
      return (const uint32_t*)wide.data();
    };
    // What follows may be stored in another way.
    compute_experts<T>(me, p.l, p.beside, p.experts, multiply<T>(p.l), {}, weights);
  });
}

template <class T>
void rows(const Part* part, const int64_t* rows, void* out, long count, long k, int threads) {
  using elem = typename T::elem;
  const long lanes = k / T::PER_LANE;
  together(count < 16 ? 1 : threads, [&](const Member& me) {
    std::vector<uint32_t> wide(lanes * LANES);
    long panel = -1;
    const Range mine = me.share(count);
    for (long r = mine.begin; r < mine.end; r++) {
      if (rows[r] / LANES != panel) expand_any<T>(part, panel = rows[r] / LANES, k, wide.data());
      auto* to = (uint32_t*)((elem*)out + r * k);
      for (long i = 0; i < lanes; i++) to[i] = wide[i * LANES + rows[r] % LANES];
    }
  });
}

}  // namespace

void multiply_parts(const Matrix& w, const Product& p) { (p.l.bf16 ? linear<Bf16> : linear<F32>)(w, p); }

}  // namespace aio

// data [n, count blocks], each of so many float16 values, words of four bytes, and float16 values again -> panels, in
// place. n must be a multiple of 16.
AIO_EXPORT void aio_turn_blocks(void* data, long n, long count, long first, long words, long last, int threads) {
  const long bytes = 2 * first + 4 * words + 2 * last, row = count * bytes;
  aio::together(threads, [&](const aio::Member& me) {
    std::vector<char> copy(row * aio::LANES);
    const aio::Range mine = me.share(n / aio::LANES);
    for (long panel = mine.begin; panel < mine.end; panel++) {
      char* to = (char*)data + panel * row * aio::LANES;
      std::memcpy(copy.data(), to, row * aio::LANES);
      for (long b = 0; b < count; b++) {
        const auto turn = [&](long at, long units, long size) {
          for (long u = 0; u < units; u++, at += size)
            for (long r = 0; r < aio::LANES; r++, to += size)
              std::memcpy(to, copy.data() + r * row + b * bytes + at, size);
        };
        turn(0, first, 2);
        turn(2 * first, words, 4);
        turn(2 * first + 4 * words, last, 2);
      }
    }
  });
}

// out [count, k]: the given rows of the weight that is in effect. `bf16` is the type of `out`.
AIO_EXPORT void aio_expand_rows(int bf16, const aio::Part* part, const int64_t* rows, void* out, long count, long k,
                                int threads) {
  bf16 ? aio::rows<aio::Bf16>(part, rows, out, count, k, threads) : aio::rows<aio::F32>(part, rows, out, count, k, threads);
}
