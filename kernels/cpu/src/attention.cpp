// Attention over the paged KV cache: decode rows and prompt chunks in one call.
//
// Online softmax over blocks of keys, after FlashAttention (Dao et al., 2022, arXiv:2205.14135); paging
// after PagedAttention (Kwon et al., 2023, arXiv:2309.06180). A task is a few query tokens of one
// sequence with all query heads of one key head, so that a key is loaded once for all of them.
//
// Cache layout, for each block and key head, block_size a multiple of 16 (L lanes of head_dim):
//   keys    [block_size / 16][L][16 keys]           a vector holds one lane of 16 keys
//   values  [block_size / PER_LANE][head_dim]       a lane holds one dimension of 1 or 2 neighbouring keys
// Where there are tile registers, keys are their right operands as they lie, 16 lanes of 16 keys each, and values too, with the
// 8 lanes of 16 keys. So it is for prompts and for single tokens, whose bits may not depend on which it is.
//
// In int8 a lane is two bytes whatever the element type, and the block's scales follow (quantized_cache.h). Queries and
// weights are then quantized to int16, each row of them by itself, and products are whole numbers.
#include <cmath>
#include <vector>

#include "ops.h"
#include "quantized_cache.h"
#include "team.h"
#include "tile_registers.h"

namespace aio {
namespace {

constexpr int PANELS = 4;             // panels of 16 keys between two updates of the softmax
constexpr int KEYS = PANELS * LANES;   // keys in a chunk
constexpr int REGISTERS_OF_KEYS = PANELS * PER_VECTOR;
constexpr int MAX_ROWS = 64;           // query rows (token, head) of a task
constexpr float NONE = -INFINITY;
constexpr float LOG2_E = 1.44269504f;  // scores are multiplied by it, and e^x is then 2^x
constexpr vi COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct Attention {
  const void* q;
  long q_stride;  // elements from one token's queries to the next's
  const void* keys;
  const void* values;
  const int32_t* tables;  // [sequences, table_width]
  long table_width;
  const int32_t* spans;  // [sequences][row, length, start]
  long sequences;
  void* out;  // [tokens, heads * head_dim]
  long heads, kv_heads, head_dim, block_size, block_bytes, window;  // window 0: all keys
  float scale;
  float soft_cap;  // of the scores: cap * tanh(score / cap); 0: none
  const void* sinks;  // [heads] scores of keys without values; may be null
  bool int8;
};

// The second where one of them is not a number.
inline rf larger(rf a, rf b) {
#if defined(__AVX512F__)
  return (rf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// Where the keys and values of up to 64 positions of a sequence lie, for one key head.
struct Chunk {
  const uint32_t *keys[PANELS], *values[PANELS];
  const uint16_t *key_scales[PANELS], *value_scales[PANELS];  // of int8
};

// Scores of R query rows, laid out, against the keys. Blocks lie anywhere in memory, which hardware cannot foresee: so the
// keys of the chunk that comes next are fetched meanwhile, into the L2 cache, because both chunks together are too large
// for L1.
template <class T, int R>
void scores(const uint32_t* q, const Chunk& at, long lanes, const Chunk* next, float* out) {
  constexpr int COLUMNS = PANELS * PER_VECTOR, SOME = at_once(R, COLUMNS);
  for (int first = 0; first < COLUMNS; first += SOME) {
    rf acc[R][SOME];
    for (int r = 0; r < R; r++)
      for (int c = 0; c < SOME; c++) acc[r][c] = rf{};
    for (long k = 0; k < lanes; k++) {
      if (next != nullptr && first % PER_VECTOR == 0)
        for (int c = 0; c < SOME; c += PER_VECTOR) __builtin_prefetch(next->keys[(first + c) / PER_VECTOR] + k * LANES, 0, 2);
      const auto row = [&](int r) { return q + (r * lanes + k) * Steps<T>::COUNT; };
      const auto column = [&](int c) {
        return load_register<ru>(at.keys[(first + c) / PER_VECTOR] + k * LANES + (first + c) % PER_VECTOR * WIDTH);
      };
      add_products<T, R, SOME>(row, column, acc);
    }
    for (int r = 0; r < R; r++)
      for (int c = 0; c < SOME; c++) store_register(out + r * KEYS + (first + c) * WIDTH, acc[r][c]);
  }
}

// out[R][head_dim] = out * decay + weights x values, over the first `count` keys of the chunk. The weights are laid out.
// Meanwhile the values of the chunk that comes next are fetched.
template <class T, int R>
void accumulate(const uint32_t* weights, const Chunk& at, long count, long head_dim, const Chunk* next,
                const float* decay, float* out) {
  constexpr int W = at_once(R, 4 * PER_VECTOR);  // registers of the output at a time
  constexpr int EACH = Steps<T>::COUNT;
  for (long d = 0; d < head_dim; d += W * WIDTH) {
    const int width = head_dim - d < W * WIDTH ? int((head_dim - d) / WIDTH) : W;
    rf acc[R][W];
    for (int r = 0; r < R; r++)
      for (int w = 0; w < W; w++)
        acc[r][w] = w < width ? load_register<rf>(out + r * head_dim + d + w * WIDTH) * decay[r] : rf{};
    for (int p = 0; p < PANELS && p * LANES < count; p++) {
      const long keys = count - p * LANES < LANES ? count - p * LANES : LANES;
      const long lanes = (keys + T::PER_LANE - 1) / T::PER_LANE;
      for (long k = 0; k < lanes; k++) {
        const uint32_t* const values = at.values[p] + k * head_dim + d;
        if (next != nullptr && d % LANES == 0)
          for (int w = 0; w < width; w += PER_VECTOR) __builtin_prefetch(next->values[p] + k * head_dim + d + w * WIDTH, 0, 2);
        const auto row = [&](int r) {
          return weights + (r * (KEYS / T::PER_LANE) + p * (LANES / T::PER_LANE) + k) * EACH;
        };
        const auto column = [&](int w) { return load_register<ru>(values + (w < width ? w : 0) * WIDTH); };
        add_products<T, R, W>(row, column, acc);
      }
    }
    for (int r = 0; r < R; r++)
      for (int w = 0; w < width; w++) store_register(out + r * head_dim + d + w * WIDTH, acc[r][w]);
  }
}

// The same for keys in int8 and queries in int16.
template <int R>
void scores_int8(const uint32_t* q, const Chunk& at, long lanes, const Chunk* next, float* out) {
  constexpr int COLUMNS = PANELS * PER_VECTOR, SOME = at_once(R, COLUMNS);
  for (int p = 0; next != nullptr && p < PANELS; p++) __builtin_prefetch(next->key_scales[p], 0, 2);
  for (int first = 0; first < COLUMNS; first += SOME) {
    ri acc[R][SOME];
    for (int r = 0; r < R; r++)
      for (int c = 0; c < SOME; c++) acc[r][c] = ri{};
    const auto keys = [&](const Chunk& of, int c, long k) {
      return (const int8_t*)of.keys[(first + c) / PER_VECTOR] + k * 2 * LANES + (first + c) % PER_VECTOR * 2 * WIDTH;
    };
    for (long k = 0; k < lanes; k++) {
      if (next != nullptr && k % 2 == 0 && first % PER_VECTOR == 0)
        for (int c = 0; c < SOME; c += PER_VECTOR) __builtin_prefetch(keys(*next, c, k), 0, 2);
      const auto row = [&](int r) { return q + (r * lanes + k) * Steps<Int16>::COUNT; };
      const auto column = [&](int c) { return Int8Head::load(keys(at, c, k)); };
      add_products<Int16, R, SOME>(row, column, acc);
    }
    for (int r = 0; r < R; r++)
      for (int c = 0; c < SOME; c++)
        store_register(out + r * KEYS + (first + c) * WIDTH, __builtin_convertvector(acc[r][c], rf));
  }
}

// The same for values in int8 and weights in int16, each of which stands for `factor`.
template <int R>
void accumulate_int8(const uint32_t* weights, const Chunk& at, long count, long head_dim, const Chunk* next,
                     const float* decay, const float* factor, float* out) {
  constexpr int W = at_once(R, 4 * PER_VECTOR), EACH = Steps<Int16>::COUNT;
  for (int p = 0; next != nullptr && p < PANELS; p++) __builtin_prefetch(next->value_scales[p], 0, 2);
  for (long d = 0; d < head_dim; d += W * WIDTH) {
    const int width = head_dim - d < W * WIDTH ? int((head_dim - d) / WIDTH) : W;
    ri acc[R][W];
    for (int r = 0; r < R; r++)
      for (int w = 0; w < W; w++) acc[r][w] = ri{};
    for (int p = 0; p < PANELS && p * LANES < count; p++) {
      const long keys = count - p * LANES < LANES ? count - p * LANES : LANES;
      for (long k = 0; k < (keys + 1) / 2; k++) {
        const long begin = (k * head_dim + d) * 2;
        if (next != nullptr && d % (2 * LANES) == 0)
          for (int w = 0; w < width; w += 2 * PER_VECTOR)
            __builtin_prefetch((const int8_t*)next->values[p] + begin + w * 2 * WIDTH, 0, 2);
        const auto row = [&](int r) { return weights + (r * (KEYS / 2) + p * (LANES / 2) + k) * EACH; };
        const auto column = [&](int w) {
          return Int8Head::load((const int8_t*)at.values[p] + begin + (w < width ? w : 0) * 2 * WIDTH);
        };
        add_products<Int16, R, W>(row, column, acc);
      }
    }
    for (int r = 0; r < R; r++)
      for (int w = 0; w < width; w++) {
        float* to = out + r * head_dim + d + w * WIDTH;
        const rf before = load_register<rf>(to) * decay[r];
        store_register(to, multiply_add(__builtin_convertvector(acc[r][w], rf), rf{} + factor[r], before));
      }
  }
}

#if defined(AIO_TILES)
constexpr int ROWS_OF_TILES = 2 * TILE_ROWS;  // rows in tile registers at a time

// Scores of up to 16 * H query rows against the keys, in tile registers.
template <int H>
void scores_of_tiles(const uint32_t* q, const Chunk& at, long lanes, const Chunk* next, float* out) {
  for (int first = 0; first < PANELS; first += 2) {
    unrolled<2 * H>([](auto i) { zero_tile<i>(); });
    for (long k = 0; k < lanes; k += LANES) {
      for (int p = first; next != nullptr && p < first + 2; p++)
        for (long i = k; i < k + LANES; i++) __builtin_prefetch(next->keys[p] + i * LANES, 0, H == 1 ? 3 : 2);
      add_tile_products<Bf16, H, 2, LEFT, RIGHT>(
          [&](auto h) { load_tile<LEFT>(q + h * TILE_ROWS * lanes + k, lanes * long(sizeof(uint32_t))); },
          [&](auto p) { load_tile<RIGHT>(at.keys[first + p] + k * LANES, TILE_BYTES); });
    }
    unrolled<2 * H>([&](auto i) {
      store_tile<i>(out + i / 2 * TILE_ROWS * KEYS + (first + i % 2) * LANES, KEYS * long(sizeof(float)));
    });
  }
}

// out[rows][head_dim] += weights x values, over the panels that have keys. Zeros follow the last key.
template <int H>
void accumulate_of_tiles(const uint32_t* weights, const Chunk& at, int panels, long head_dim, const Chunk* next, float* out) {
  const long row_bytes = head_dim * long(sizeof(float));
  for (long d = 0; d < head_dim; d += 2 * LANES) {
    const auto sums = [&](auto i) { return out + i / 2 * TILE_ROWS * head_dim + d + i % 2 * LANES; };
    unrolled<2 * H>([&](auto i) { load_tile<i>(sums(i), row_bytes); });
    for (int p = 0; p < panels; p++) {
      for (long k = 0; next != nullptr && k < LANES / 2; k++)
        for (int i = 0; i < 2; i++) __builtin_prefetch(next->values[p] + k * head_dim + d + i * LANES, 0, H == 1 ? 3 : 2);
      add_tile_products<Bf16, H, 2, HALF_LEFT, HALF_RIGHT>(
          [&](auto h) {
            load_tile<HALF_LEFT>(weights + h * TILE_ROWS * (KEYS / 2) + p * (LANES / 2), KEYS * long(sizeof(uint16_t)));
          },
          [&](auto i) { load_tile<HALF_RIGHT>(at.values[p] + d + i * LANES, row_bytes); });
    }
    unrolled<2 * H>([&](auto i) { store_tile<i>(sums(i), row_bytes); });
  }
}

// Whether this cache and type are multiplied in tile registers.
template <class T>
bool in_tiles(const Attention& a) {
  return T::PER_LANE == 2 && !a.int8 && a.head_dim % (2 * LANES) == 0;
}
#else
template <class T>
bool in_tiles(const Attention&) {
  return false;
}
#endif

struct Task {
  long sequence, token, tokens, kv_head;
};

// A thread's working memory.
struct Scratch {
  uint32_t *q, *weights, *values;
  float* out;
  Tiles tiles;
  alignas(64) float scores[MAX_ROWS * KEYS];
};

// Positions `at`.. of a task's sequence.
template <class T>
Chunk locate(const Attention& a, const Task& task, long at, long count) {
  const int32_t* table = a.tables + task.sequence * a.table_width;
  const long lanes = a.head_dim / T::PER_LANE, per_head = a.block_size * lanes;
  Chunk found;
  for (int p = 0; p < PANELS; p++) {
    // Panels past the last key repeat the first: what they give is masked.
    const long position = at + (p * LANES < count ? p * LANES : 0);
    const long block = table[position / a.block_size], offset = position % a.block_size;
    const long begin = block * a.block_bytes, head = task.kv_head;
    const char *block_keys = (const char*)a.keys + begin, *block_values = (const char*)a.values + begin;
    if (a.int8) {
      const Int8Head keys(block_keys, head, a.block_size, a.head_dim);
      const Int8Head values(block_values, head, a.block_size, a.head_dim);
      found.keys[p] = (const uint32_t*)(keys.elements + offset * a.head_dim);
      found.values[p] = (const uint32_t*)(values.elements + offset * a.head_dim);
      found.key_scales[p] = keys.scales + offset;
      found.value_scales[p] = values.scales + offset;
      continue;
    }
    const long base = head * per_head + offset * lanes;
    found.keys[p] = (const uint32_t*)block_keys + base;
    found.values[p] = (const uint32_t*)block_values + base;
  }
  return found;
}

// The first position that a task looks at.
inline long first_key(const Attention& a, const Task& task) {
  const long position = a.spans[task.sequence * 3 + 2] + task.token;
  const long begin = a.window > 0 && position + 1 > a.window ? position + 1 - a.window : 0;
  return begin - begin % KEYS;
}

inline long keys_from(const Attention& a, const Task& task, long at) {
  const long end = a.spans[task.sequence * 3 + 2] + task.token + task.tokens;
  return end - at < KEYS ? end - at : KEYS;
}

// `next` is what this thread does afterwards, or null. Not inlined: that costs a quarter of its speed.
template <class T, bool CAPPED>
__attribute__((noinline)) void attend(const Attention& a, const Task& task, const Task* next, long head_begin,
                                      long head_end, Scratch& scratch) {
  using elem = typename T::elem;
  const long lanes = a.head_dim / (a.int8 ? 2 : T::PER_LANE), group = head_end - head_begin, rows = task.tokens * group;
  const int32_t* span = a.spans + task.sequence * 3;
  const long first_position = span[2] + task.token, last_position = first_position + task.tokens - 1;

  uint32_t* q = scratch.q;
  const bool tiled = in_tiles<T>(a);
  const int each = tiled ? 1 : a.int8 ? Steps<Int16>::COUNT : Steps<T>::COUNT;  // words of a lane
  float scale[MAX_ROWS], factor[MAX_ROWS];
  long position_of[MAX_ROWS];
  for (long r = 0; r < rows; r++) {
    position_of[r] = first_position + r / group;
    const long token = span[0] + task.token + r / group, head = head_begin + r % group;
    const elem* from = (const elem*)a.q + token * a.q_stride + head * a.head_dim;
    scale[r] = CAPPED ? a.scale : a.scale * LOG2_E;
    uint32_t* const to = q + r * lanes * each;
    if (tiled)
      std::memcpy(to, from, a.head_dim * sizeof(elem));
    else if (a.int8)
      write_laid_out<Int16>(to, lanes, [&](uint32_t* p) { scale[r] *= quantize_query<T>(from, a.head_dim, (int16_t*)p); });
    else
      lay_out<T>((const uint32_t*)from, lanes, to);
  }
  const auto weights_of = [&](long r) { return scratch.weights + r * (KEYS / (a.int8 ? 2 : T::PER_LANE)) * each; };
  float* out = scratch.out;
  std::memset(out, 0, rows * a.head_dim * sizeof(float));
  float highest[MAX_ROWS], decay[MAX_ROWS];
  rf total[MAX_ROWS][PER_VECTOR];
  std::memset(total, 0, sizeof total);
  for (long r = 0; r < rows; r++) {
    highest[r] = NONE;
    if (a.sinks == nullptr) continue;
    highest[r] = T::widen(((const elem*)a.sinks)[head_begin + r % group]) * LOG2_E;
    total[r][0][0] = 1.0f;
  }

  const long begin = first_key(a, task);
  Chunk now_at = locate<T>(a, task, begin, keys_from(a, task, begin));
  for (long at = begin; at <= last_position; at += KEYS) {
    const long count = keys_from(a, task, at);
    const Chunk here = now_at;
    const bool more = at + KEYS <= last_position;
    if (more)
      now_at = locate<T>(a, task, at + KEYS, keys_from(a, task, at + KEYS));
    else if (next != nullptr)
      now_at = locate<T>(a, *next, first_key(a, *next), keys_from(a, *next, first_key(a, *next)));
    const Chunk* fetch = more || next != nullptr ? &now_at : nullptr;
#if defined(AIO_TILES)
    if (tiled) {
      scratch.tiles.use(int(rows < LANES ? rows : LANES), true);
      for (long r = 0; r < rows; r += ROWS_OF_TILES)
        (rows - r > TILE_ROWS ? scores_of_tiles<2> : scores_of_tiles<1>)(q + r * lanes, here, lanes, r == 0 ? fetch : nullptr,
                                                                         scratch.scores + r * KEYS);
    }
#endif
    for (long r = 0; !tiled && r < rows; r += 4) {
      const Chunk* meanwhile = r == 0 ? fetch : nullptr;
      if (a.int8) {
#define CALL(R) scores_int8<R>(q + r * lanes * each, here, lanes, meanwhile, scratch.scores + r * KEYS)
        AIO_SWITCH_FEW(rows - r, CALL)
#undef CALL
      } else {
#define CALL(R) scores<T, R>(q + r * lanes * each, here, lanes, meanwhile, scratch.scores + r * KEYS)
        AIO_SWITCH_FEW(rows - r, CALL)
#undef CALL
      }
    }
    for (long r = 0; r < rows; r++) {
      float* s = scratch.scores + r * KEYS;
      const long position = position_of[r];
      const long from = a.window > 0 ? position - a.window + 1 : 0;
      rf score[REGISTERS_OF_KEYS], top = rf{} + NONE;
      const bool masked = at + KEYS - 1 > position || at < from;
      for (int i = 0; i < REGISTERS_OF_KEYS; i++) {
        score[i] = load_register<rf>(s + i * WIDTH) * scale[r];
        if (a.int8) score[i] *= Bf16::load_register(here.key_scales[i / PER_VECTOR] + i % PER_VECTOR * WIDTH);
        if (CAPPED) score[i] = tanh_as<ri>(score[i] / a.soft_cap) * (a.soft_cap * LOG2_E);
        if (masked) {
          const ri key = load_register<ri>(&COUNT) + int32_t(at + i * WIDTH);
          score[i] = (key > int32_t(position)) | (key < int32_t(from)) ? rf{} + NONE : score[i];
        }
        top = larger(score[i], top);
      }
      const float before = highest[r], most = max(top), now = most > before ? most : before;
      highest[r] = now;
      // Mostly no key of a chunk is above all before it; then a call is saved.
      decay[r] = before == now ? 1.0f : before == NONE ? 0.0f : std::exp2(before - now);
      for (int i = 0; i < PER_VECTOR; i++) total[r][i] *= decay[r];
      // A row that may see no key of this chunk, as the first ones under a window, adds nothing.
      const float reference = now == NONE ? 0.0f : now;
      vf weight[PANELS];
#pragma GCC unroll 4
      for (int i = 0; i < REGISTERS_OF_KEYS; i++) {
        const rf one = exp2_negative_as<ri>(score[i] - reference);
        total[r][i % PER_VECTOR] += one;
        store_register((float*)weight + i * WIDTH, one);
      }
      if (a.int8)
        write_laid_out<Int16>(weights_of(r), KEYS / 2, [&](uint32_t* p) {
          factor[r] = quantize_weights<PANELS>(weight, here.value_scales, (int16_t*)p);
        });
      else if (tiled)
        for (int i = 0; i < PANELS; i += 2) Bf16::store32((uint16_t*)weights_of(r) + i * LANES, weight[i], weight[i + 1]);
      else
        write_laid_out<T>(weights_of(r), KEYS / T::PER_LANE, [&](uint32_t* p) {
          for (int i = 0; i < PANELS; i++) T::store16((elem*)p + i * LANES, weight[i]);
        });
    }
#if defined(AIO_TILES)
    if (tiled) {
      for (long r = 0; r < rows; r++)
        for (long d = 0; decay[r] != 1.0f && d < a.head_dim; d += LANES)
          storef(out + r * a.head_dim + d, loadf(out + r * a.head_dim + d) * decay[r]);
      Chunk whole = here;
      const int panels = int((count + LANES - 1) / LANES);
      if (const long keys = count % LANES; keys > 0) {  // what follows the last key may be anything
        const long words = (keys + 1) / 2 * a.head_dim;
        std::memcpy(scratch.values, here.values[panels - 1], words * sizeof(uint32_t));
        std::memset(scratch.values + words, 0, (LANES / 2 * a.head_dim - words) * sizeof(uint32_t));
        whole.values[panels - 1] = scratch.values;
      }
      for (long r = 0; r < rows; r += ROWS_OF_TILES)
        (rows - r > TILE_ROWS ? accumulate_of_tiles<2> : accumulate_of_tiles<1>)(
            weights_of(r), whole, panels, a.head_dim, r == 0 ? fetch : nullptr, out + r * a.head_dim);
    }
#endif
    for (long r = 0; !tiled && r < rows; r += 4) {
      const Chunk* meanwhile = r == 0 ? fetch : nullptr;
      float* to = out + r * a.head_dim;
      if (a.int8) {
#define CALL(R) accumulate_int8<R>(weights_of(r), here, count, a.head_dim, meanwhile, decay + r, factor + r, to)
        AIO_SWITCH_FEW(rows - r, CALL)
#undef CALL
      } else {
#define CALL(R) accumulate<T, R>(weights_of(r), here, count, a.head_dim, meanwhile, decay + r, to)
        AIO_SWITCH_FEW(rows - r, CALL)
#undef CALL
      }
    }
  }
  for (long r = 0; r < rows; r++) {
    const long token = span[0] + task.token + r / group, head = head_begin + r % group;
    elem* to = (elem*)a.out + (token * a.heads + head) * a.head_dim;
    const float inverse = 1.0f / sum(loadf((const float*)total[r]));
    for (long d = 0; d < a.head_dim; d += LANES) T::store16(to + d, loadf(out + r * a.head_dim + d) * inverse);
  }
}

template <class T, bool CAPPED>
void attention(const Attention& a, int threads) {
  const long group = a.heads / a.kv_heads;
  const long heads_at_once = group < MAX_ROWS ? group : MAX_ROWS;
  long tokens = 0;
  for (long s = 0; s < a.sequences; s++) tokens += a.spans[s * 3 + 1];
  // Of a task: many, because keys are read for all of them together, but not so many that threads have nothing to do.
  const long many = in_tiles<T>(a) ? MAX_ROWS : 8, fitting = MAX_ROWS / heads_at_once;
  const long most = tokens * a.kv_heads < 64 * threads ? 4 : many;
  const long tokens_at_once = fitting < most ? fitting : most;
  std::vector<Task> tasks;
  for (long s = 0; s < a.sequences; s++)
    for (long t = 0; t < a.spans[s * 3 + 1]; t += tokens_at_once)
      for (long h = 0; h < a.kv_heads; h++) {
        const long left = a.spans[s * 3 + 1] - t;
        tasks.push_back({s, t, left < tokens_at_once ? left : tokens_at_once, h});
      }
  together(threads, [&](const Member& me) {
    constexpr int EACH = Steps<T>::COUNT > Steps<Int16>::COUNT ? Steps<T>::COUNT : Steps<Int16>::COUNT;
    constexpr long WORDS = MAX_ROWS / T::PER_LANE * EACH * long(sizeof(uint32_t));
    Scratch scratch;
    scratch.values = room<VALUES>(LANES / 2 * a.head_dim * long(sizeof(uint32_t)));
    scratch.q = room<QUERIES>(WORDS * a.head_dim), scratch.weights = room<WEIGHTS>(WORDS * KEYS);
    scratch.out = (float*)room<OUTPUTS>(MAX_ROWS * a.head_dim * long(sizeof(float)));
    // Tasks that a thread takes together: many, because what comes next is known only among them.
    const long at_once = 1 + long(tasks.size()) / (8 * me.count);
    for (long first; (first = me.team.take() * at_once) < long(tasks.size());) {
      const long end = first + at_once < long(tasks.size()) ? first + at_once : long(tasks.size());
      for (long i = first; i < end; i++)
        for (long h = 0; h < group; h += heads_at_once) {
          const long head = tasks[i].kv_head * group + h, left = group - h;
          const Task* next = i + 1 < end ? &tasks[i + 1] : nullptr;
          attend<T, CAPPED>(a, tasks[i], next, head, head + (left < heads_at_once ? left : heads_at_once), scratch);
        }
    }
  });
}

}  // namespace
}  // namespace aio

// out [tokens, heads * head_dim]: each token attends to its sequence's keys up to its own position (and,
// with a window, the last `window` of them); soft_cap 0: none. head_dim must be a multiple of 16; sinks [heads]: may be null;
// int8: of the cache.
AIO_EXPORT void aio_attention(int bf16, const void* q, long q_stride, const void* keys, const void* values,
                              const int32_t* tables, long table_width, const int32_t* spans, long sequences,
                              void* out, long heads, long kv_heads, long head_dim, long block_size,
                              long window, float scale, float soft_cap, const void* sinks, int int8, int threads) {
  const long block_bytes = aio::block_bytes(bf16, int8, kv_heads, head_dim, block_size);
  const aio::Attention a{q,        q_stride, keys,       values,      tables, table_width, spans,    sequences, out, heads,
                         kv_heads, head_dim, block_size, block_bytes, window, scale,       soft_cap, sinks,       int8 != 0};
  if (soft_cap > 0)
    bf16 ? aio::attention<aio::Bf16, true>(a, threads) : aio::attention<aio::F32, true>(a, threads);
  else
    bf16 ? aio::attention<aio::Bf16, false>(a, threads) : aio::attention<aio::F32, false>(a, threads);
}
