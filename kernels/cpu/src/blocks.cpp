// Linears whose weights stay as a quantized checkpoint has them: a thread expands its panels as it comes to them, and
// multiplies them as any others, so the outputs are the same bits as those of the expanded weight.
#include "blocks.h"

#include "tiles.h"

namespace aio {
namespace {

struct Work {
  Linear l;
  const Part* part;
  long parts;  // of an expert
  Beside beside;
  Experts experts;
  int threads;
};

// Panel `panel` of all parts.
template <class T>
void expand_any(const Part* part, long panel, long k, uint32_t* out) {
  while (panel >= part->panels) panel -= part++->panels;
  expand<T>(*part, panel, k, out);
}

template <class T>
void linear(const Work& w) {
  const long panel = w.l.k / T::PER_LANE * LANES, each = w.l.n / LANES;
  together(w.threads, [&](const Member& me) {
    std::vector<uint32_t> wide(PANELS * panel);
    const auto weights = [&](long first, long panels) {
      const bool experts = w.experts.begin != nullptr;  // panels that are asked for together are of one
      const Part* part = w.part + (experts ? first / each * w.parts : 0);
      if (experts) first %= each;
      for (long p = 0; p < panels; p++) expand_any<T>(part, first + p, w.l.k, wide.data() + p * panel);
      return (const uint32_t*)wide.data();
    };
    // What follows may be stored in another way.
    compute_experts<T>(me, w.l, w.beside, w.experts, multiply<T>(w.l), {}, weights);
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

// y [rows, n] = x [rows, k] W^T + bias (may be null), for a weight in parts, which are all of its outputs one after the
// other. `beside`: see aio_linear_beside; may be null.
AIO_EXPORT void aio_linear_blocks(int bf16, const void* x, long x_stride, const aio::Part* part, const void* bias, void* y,
                                  long y_stride, long rows, long n, long k, const aio::Beside* beside, int threads) {
  const aio::Work w{{bf16 != 0, x, x_stride, bias, y, y_stride, rows, n, k, nullptr, nullptr, nullptr},
                    part, 0, beside == nullptr ? aio::Beside{} : *beside, {}, threads};
  bf16 ? aio::linear<aio::Bf16>(w) : aio::linear<aio::F32>(w);
}

// The same for rows that are sorted by expert: see aio_linear_experts. Each expert has so many `parts`.
AIO_EXPORT void aio_linear_experts_blocks(int bf16, const void* x, const aio::Part* part, long parts, const void* bias, void* y,
                                          const int32_t* begin, long experts, long n, long k, int threads) {
  const aio::Work w{{bf16 != 0, x, k, bias, y, n, begin[experts], n, k, nullptr, nullptr, nullptr},
                    part, parts, {}, {begin, experts}, threads};
  bf16 ? aio::linear<aio::Bf16>(w) : aio::linear<aio::F32>(w);
}
