// The packed linear: y = x W^T (+ bias), for weights rearranged once.
//
// Packed weights are panels of 16 output columns: [ceil(N / 16)][K lanes][16 lanes], zero where N ends. A
// tile of up to 8 rows by 3 panels is kept in registers: 24 accumulators, and each weight that is
// loaded is used for every row. (Tiling as in Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", 2008.)
#include <omp.h>

#include <vector>

#include "ops.h"

namespace aio {
namespace {

constexpr int ROWS = 8, PANELS = 3;
constexpr long ROW_BLOCK = 64;  // rows of x that stay in the L2 cache while the panels pass by

// Goes through a thread's share of the cache lines of some ranges, to fetch one now and then.
class Fetcher {
 public:
  Fetcher(const Fetch* ranges, long count, long index, long threads) : range_(ranges), end_(ranges + count) {
    long total = 0;
    for (const Fetch* r = ranges; r < end_; r++) total += lines(*r);
    const Range mine = share(total, index, threads);
    left_ = mine.end - mine.begin;
    line_ = mine.begin;
    while (left_ > 0 && line_ >= lines(*range_)) line_ -= lines(*range_++);
  }

  // Up to `count` lines that adjoin: where they begin, and how many.
  const char* take(long count, long& taken) {
    taken = 0;
    if (left_ == 0) return nullptr;
    if (line_ == lines(*range_)) range_++, line_ = 0;
    const char* at = (const char*)range_->begin + line_ * 64;
    taken = lines(*range_) - line_;
    if (taken > left_) taken = left_;
    if (taken > count) taken = count;
    line_ += taken;
    left_ -= taken;
    return at;
  }

 private:
  static long lines(const Fetch& r) { return (r.bytes + 63) / 64; }

  const Fetch *range_, *end_;
  long line_, left_;
};

// acc += x W over lanes begin..end-1, fetching a cache line for each if there is something to fetch.
template <class T, int R, int P, bool FETCH>
inline void multiply(const uint32_t* x, long x_stride, const uint32_t* w, long panel, long begin, long end,
                     const char* fetch, vf (&acc)[R][P]) {
  for (long k = begin; k < end; k++) {
    vu b[P];
    for (int p = 0; p < P; p++) b[p] = load(w + p * panel + k * LANES);
    if (FETCH) __builtin_prefetch(fetch + k * 64, 0, 2);
    for (int r = 0; r < R; r++) {
      const vu a = splat(x[r * x_stride + k]);
      for (int p = 0; p < P; p++) acc[r][p] = T::dot(acc[r][p], a, b[p]);
    }
  }
}

template <class T, int R, int P>
inline void tile(const uint32_t* x, long x_stride, const uint32_t* w, long panel, long lanes, Fetcher& fetcher,
                 vf (&acc)[R][P]) {
  long fetches;
  const char* fetch = fetcher.take(lanes, fetches);
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) acc[r][p] = vf{};
  if (fetches > 0) multiply<T, R, P, true>(x, x_stride, w, panel, 0, fetches, fetch, acc);
  multiply<T, R, P, false>(x, x_stride, w, panel, fetches, lanes, nullptr, acc);
}

struct Linear {
  const void* x;
  long x_stride;  // in elements
  const uint32_t* weight;
  const void* bias;
  void* y;
  long y_stride;
  long rows, n, k;
  const Fetch* fetch;
  long fetch_count;
};

template <class T, int R, int P>
void tile_out(const Linear& l, Fetcher& fetcher, long row, long panel_index) {
  using elem = typename T::elem;
  const long lanes = l.k / T::PER_LANE, panel = lanes * LANES;
  const uint32_t* x = (const uint32_t*)((const elem*)l.x + row * l.x_stride);
  vf acc[R][P];
  tile<T, R, P>(x, l.x_stride / T::PER_LANE, l.weight + panel_index * panel, panel, lanes, fetcher,
                acc);
  for (int p = 0; p < P; p++) {
    const long column = (panel_index + p) * LANES;
    const long count = l.n - column < LANES ? l.n - column : LANES;
    if (l.bias != nullptr) {
      elem b[LANES] = {};
      std::memcpy(b, (const elem*)l.bias + column, count * sizeof(elem));
      const vf bias = T::load16(b);
      for (int r = 0; r < R; r++) acc[r][p] += bias;
    }
    for (int r = 0; r < R; r++) {
      elem* out = (elem*)l.y + (row + r) * l.y_stride + column;
      if (count == LANES) {
        T::store16(out, acc[r][p]);
      } else {
        elem last[LANES];
        T::store16(last, acc[r][p]);
        std::memcpy(out, last, count * sizeof(elem));
      }
    }
  }
}

template <class T, int P>
void rows_out(const Linear& l, Fetcher& fetcher, long begin, long end, long panel_index) {
  long row = begin;
  for (; row + ROWS <= end; row += ROWS) tile_out<T, ROWS, P>(l, fetcher, row, panel_index);
#define CALL(R) tile_out<T, R, P>(l, fetcher, row, panel_index)
  if (row < end) AIO_SWITCH_ROWS(end - row, CALL)
#undef CALL
}

template <class T>
void linear(const Linear& l, int threads) {
  const long panels = (l.n + LANES - 1) / LANES, groups = (panels + PANELS - 1) / PANELS;
  const long blocks = (l.rows + ROW_BLOCK - 1) / ROW_BLOCK;
#pragma omp parallel num_threads(threads)
  {
    // Blocks of rows outside, panels inside; a thread's share is contiguous in that order.
    Fetcher fetcher(l.fetch, l.fetch_count, omp_get_thread_num(), omp_get_num_threads());
    const Range mine = share(blocks * groups, omp_get_thread_num(), omp_get_num_threads());
    for (long i = mine.begin; i < mine.end; i++) {
      const long begin = i / groups * ROW_BLOCK, first = i % groups * PANELS;
      const long end = begin + ROW_BLOCK < l.rows ? begin + ROW_BLOCK : l.rows;
      switch (panels - first) {
        case 1: rows_out<T, 1>(l, fetcher, begin, end, first); break;
        case 2: rows_out<T, 2>(l, fetcher, begin, end, first); break;
        default: rows_out<T, 3>(l, fetcher, begin, end, first); break;
      }
    }
  }
}

template <class T>
void pack(const void* weight, void* packed, long n, long k) {
  using elem = typename T::elem;
  const long lanes = k / T::PER_LANE;
  for (long panel = 0; panel * LANES < n; panel++) {
    uint32_t* out = (uint32_t*)packed + panel * lanes * LANES;
    for (int c = 0; c < LANES; c++) {
      const long row = panel * LANES + c;
      const uint32_t* in = (const uint32_t*)((const elem*)weight + row * k);
      for (long i = 0; i < lanes; i++) out[i * LANES + c] = row < n ? in[i] : 0;
    }
  }
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
#pragma omp parallel for num_threads(count < 16 ? 1 : threads) schedule(static)
  for (long i = 0; i < count; i++)
    unpack<T>(packed, (typename T::elem*)out + i * k, rows[i], rows[i] + 1, k);
}

}  // namespace
}  // namespace aio

// weight [n, k] -> packed; k must be a whole number of lanes. `bf16` chooses the element type here and below.
AIO_EXPORT void aio_pack(int bf16, const void* weight, void* packed, long n, long k) {
  bf16 ? aio::pack<aio::Bf16>(weight, packed, n, k) : aio::pack<aio::F32>(weight, packed, n, k);
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

// y [rows, n] = x [rows, k] W^T + bias (may be null). Strides in elements, whole numbers of lanes.
AIO_EXPORT void aio_linear(int bf16, const void* x, long x_stride, const void* packed, const void* bias, void* y,
                           long y_stride, long rows, long n, long k, int threads) {
  aio_linear_fetching(bf16, x, x_stride, packed, bias, y, y_stride, rows, n, k, nullptr, 0, threads);
}

// The same. Meanwhile memory that is needed next is fetched into the cache: with few rows the arithmetic leaves the
// memory idle.
AIO_EXPORT void aio_linear_fetching(int bf16, const void* x, long x_stride, const void* packed, const void* bias,
                                    void* y, long y_stride, long rows, long n, long k, const aio::Fetch* fetch,
                                    long fetch_count, int threads) {
  const aio::Linear l{x, x_stride, (const uint32_t*)packed, bias, y, y_stride, rows, n, k, fetch, fetch_count};
  bf16 ? aio::linear<aio::Bf16>(l, threads) : aio::linear<aio::F32>(l, threads);
}
