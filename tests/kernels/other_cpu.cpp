// A few of the CPU library's functions against plain loops, as a program that an emulator of another CPU can run.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "blocks.h"
#include "matrix.h"
#include "ops.h"

using aio::Gate;
using aio::Part;
using aio::Slots;
using aio::Where;

extern "C" {
void aio_turn_blocks(void* data, long n, long count, long first, long words, long last, int threads);
void aio_expand_rows(int bf16, const Part* part, const int64_t* rows, void* out, long count, long k, int threads);
void aio_pack(int bf16, const void* weight, void* packed, long n, long k, int threads);
void aio_product(int bf16, const Matrix* w, const void* x, void* y, long rows, const int32_t* begin, long experts,
                 int threads);
void aio_quantize(int bf16, const void* weight, void* packed, float* scale, int32_t* start, long n, long k, long rotation,
                  int threads);
void aio_dequantize(int bf16, const void* packed, const float* scale, const int64_t* rows, void* out, long count, long k,
                    long rotation, int threads);
void aio_quantize_int4(int bf16, const void* weight, void* packed, float* scale, int32_t* start, long n, long k, long group,
                       long rotation, int threads);
void aio_dequantize_int4(int bf16, const void* packed, const float* scale, const int64_t* rows, void* out, long count, long k,
                         long group, long rotation, int threads);
}

static uint32_t state = 1;
static float uniform() {
  state = state * 1664525u + 1013904223u;
  return float(state >> 8) / float(1 << 23) - 1.0f;
}

static float widen(uint16_t h) {
  const uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

static uint16_t narrow(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

// Values in either type, seen as floats.
struct Values {
  bool bf16;
  std::vector<uint16_t> half;
  std::vector<float> full;
  Values(bool bf16, long n) : bf16(bf16), half(bf16 ? n : 0), full(bf16 ? 0 : n) {
    for (long i = 0; i < n; i++) set(i, uniform());
  }
  void set(long i, float v) { bf16 ? void(half[i] = narrow(v)) : void(full[i] = v); }
  float operator[](long i) const { return bf16 ? widen(half[i]) : full[i]; }
  void* data() { return bf16 ? (void*)half.data() : (void*)full.data(); }
};

static int wrong = 0;
static void expect(const char* what, bool bf16, float found, float expected, float scale) {
  const float bound = scale * (bf16 ? 2e-2f : 1e-4f);
  if (!(std::fabs(found - expected) <= bound) && wrong++ < 10)
    std::printf("%s, %s: %g, not %g\n", what, bf16 ? "bfloat16" : "float32", found, expected);
}

// A row's bits do not depend on how many rows are computed with it.
static void expect_same_rows(const char* what, bool bf16, const Matrix& matrix, Values& x, Values& y, long rows) {
  const long row = matrix.n * (bf16 ? 2 : 4);
  for (long some = 1; some < rows; some++) {
    Values part(bf16, some * matrix.n);
    aio_product(bf16, &matrix, x.data(), part.data(), some, nullptr, 0, 2);
    if (std::memcmp(part.data(), y.data(), some * row) != 0 && wrong++ < 10)
      std::printf("%s, %s: other bits in a batch of %ld\n", what, bf16 ? "bfloat16" : "float32", some);
  }
}

// An odd number of lanes, in bfloat16, too.
static void linear(bool bf16) {
  const long rows = 9, n = 48, k = 70;
  Values x(bf16, rows * k), w(bf16, n * k), packed(bf16, n * k), bias(bf16, n), y(bf16, rows * n);
  aio_pack(bf16, w.data(), packed.data(), n, k, 2);
  const Matrix matrix{packed.data(), bias.data(), n, k, 0, 16 * k * (bf16 ? 2 : 4)};
  aio_product(bf16, &matrix, x.data(), y.data(), rows, nullptr, 0, 2);
  for (long r = 0; r < rows; r++)
    for (long i = 0; i < n; i++) {
      float sum = bias[i];
      for (long j = 0; j < k; j++) sum += x[r * k + j] * w[i * k + j];
      expect("linear", bf16, y[r * n + i], sum, 4);
    }
  expect_same_rows("linear", bf16, matrix, x, y, rows);
}

static void linear_int8(bool bf16) {
  const long rows = 9, n = 48, k = 64;
  Values x(bf16, rows * k), w(bf16, n * k), effective(bf16, n * k), bias(bf16, n), y(bf16, rows * n);
  std::vector<int8_t> packed(n * k);
  std::vector<float> scale(n);
  std::vector<int32_t> start(n);
  std::vector<int64_t> all(n);
  for (long i = 0; i < n; i++) all[i] = i;
  aio_quantize(bf16, w.data(), packed.data(), scale.data(), start.data(), n, k, 64, 2);
  aio_dequantize(bf16, packed.data(), scale.data(), all.data(), effective.data(), n, k, 64, 2);
  const Matrix matrix{packed.data(), bias.data(), n, k, 1, 16 * k, scale.data(), start.data(), 64};
  aio_product(bf16, &matrix, x.data(), y.data(), rows, nullptr, 0, 2);
  for (long r = 0; r < rows; r++)
    for (long i = 0; i < n; i++) {
      float sum = bias[i];
      for (long j = 0; j < k; j++) sum += x[r * k + j] * effective[i * k + j];
      expect("linear of int8", true, y[r * n + i], sum, 4);
    }
  expect_same_rows("linear of int8", bf16, matrix, x, y, rows);
}

// With activations as they are, and as int8.
static void linear_int4(bool bf16, bool int8) {
  const long rows = 9, n = 48, k = 64, group = 32, rotation = int8 ? 64 : 0;
  Values x(bf16, rows * k), w(bf16, n * k), effective(bf16, n * k), bias(bf16, n), y(bf16, rows * n);
  std::vector<uint8_t> packed(n * (k / 2 + 2 * k / group));
  std::vector<float> scale(n);
  std::vector<int32_t> start(n);
  std::vector<int64_t> all(n);
  for (long i = 0; i < n; i++) all[i] = i;
  int32_t* const begin = int8 ? start.data() : nullptr;
  aio_quantize_int4(bf16, w.data(), packed.data(), scale.data(), begin, n, k, group, rotation, 2);
  aio_dequantize_int4(bf16, packed.data(), scale.data(), all.data(), effective.data(), n, k, group, rotation, 2);
  const long panel_bytes = long(packed.size()) / (n / 16);
  const Matrix matrix{packed.data(), bias.data(), n, k, 2, panel_bytes, scale.data(), begin, rotation, group};
  aio_product(bf16, &matrix, x.data(), y.data(), rows, nullptr, 0, 2);
  // A step is about 0.17 here; rotated back, errors add up to three of their standard deviations and more.
  for (long i = 0; i < n * k; i++) expect("int4 weights", true, effective[i], w[i], 12);
  for (long r = 0; r < rows; r++)
    for (long i = 0; i < n; i++) {
      float sum = bias[i];
      for (long j = 0; j < k; j++) sum += x[r * k + j] * effective[i * k + j];
      expect("linear of int4", bf16 || int8, y[r * n + i], sum, 4);
    }
}

static void norm_and_activation(bool bf16) {
  const long rows = 3, size = 33;
  Values hidden(bf16, rows * size), delta(bf16, rows * size), weight(bf16, size), out(bf16, rows * size);
  Values sum(bf16, rows * size), gate_up(bf16, rows * 2 * size);
  for (long i = 0; i < rows * size; i++) sum.set(i, hidden[i] + delta[i]);
  aio_add_rms_norm(bf16, hidden.data(), delta.data(), nullptr, weight.data(), out.data(), rows, size, 1.0f, 1e-5f, 1, 0.0f, 2);
  for (long r = 0; r < rows; r++) {
    float squares = 0;
    for (long i = 0; i < size; i++) squares += sum[r * size + i] * sum[r * size + i];
    for (long i = 0; i < size; i++)
      expect("norm", bf16, out[r * size + i], sum[r * size + i] / std::sqrt(squares / size + 1e-5f) * weight[i], 1);
  }
  const Gate silu{bf16, 0, 0.0, 0.0, out.data()};
  aio_activate(&silu, gate_up.data(), rows, size, 2);
  for (long r = 0; r < rows; r++)
    for (long i = 0; i < size; i++) {
      const float gate = gate_up[r * 2 * size + i];
      expect("activation", bf16, out[r * size + i], gate / (1 + std::exp(-gate)) * gate_up[(r * 2 + 1) * size + i], 1);
    }
}

// One sequence of 21 tokens, not rotated, in two blocks that lie in the wrong order.
static void attention(bool bf16, bool int8) {
  const long tokens = 21, heads = 4, kv_heads = 2, d = 32, block = 16, width = (heads + 2 * kv_heads) * d;
  Values qkv(bf16, tokens * width), keys(bf16, 2 * block * kv_heads * (d + 2)), values(bf16, 2 * block * kv_heads * (d + 2));
  for (long i = 0; i < 2 * block * kv_heads * (d + 2); i++) keys.set(i, NAN), values.set(i, NAN);
  Values out(bf16, tokens * heads * d);
  std::vector<float> cos(tokens * d / 2, 1.0f), sin(tokens * d / 2, 0.0f);
  std::vector<int64_t> cells(tokens);
  std::vector<uint8_t> last(tokens, 0);
  last[tokens - 1] = 1;
  const int32_t tables[] = {1, 0}, span[] = {0, int32_t(tokens), 0};
  for (long t = 0; t < tokens; t++) cells[t] = tables[t / block] * block + t % block;
  aio_rope_store(bf16, qkv.data(), cos.data(), sin.data(), cells.data(), last.data(), keys.data(), values.data(), tokens,
                 heads, kv_heads, d, block, d / 2, 0, int8, nullptr, 2);
  aio_attention(bf16, qkv.data(), width, keys.data(), values.data(), tables, 2, span, 1, out.data(), heads, kv_heads, d,
                block, 0, 1.0f, 0.0f, nullptr, int8, 2);
  for (long t = 0; t < tokens; t++)
    for (long h = 0; h < heads; h++) {
      const long kv = h / (heads / kv_heads);
      std::vector<float> weights(t + 1);
      float total = 0;
      for (long s = 0; s <= t; s++) {
        float score = 0;
        for (long i = 0; i < d; i++) score += qkv[t * width + h * d + i] * qkv[s * width + (heads + kv) * d + i];
        total += weights[s] = std::exp(score);
      }
      for (long i = 0; i < d; i++) {
        float sum = 0;
        for (long s = 0; s <= t; s++) sum += weights[s] / total * qkv[s * width + (heads + kv_heads + kv) * d + i];
        expect(int8 ? "attention in int8" : "attention", bf16 || int8, out[(t * heads + h) * d + i], sum, 2);
      }
    }
}

// Tokens 1 to 3 use slot 1, with rank 3 of 4 and a weight of a half.
static void shrink(bool bf16) {
  const long tokens = 4, n_in = 32, max_rank = 4, stride = max_rank * n_in;
  Values x(bf16, tokens * n_in), a(bf16, 2 * stride), h(bf16, tokens * max_rank);
  for (long i = 0; i < n_in; i++) a.set(stride + 3 * n_in + i, 0.0f);
  for (long i = 0; i < tokens * max_rank; i++) h.set(i, 0.0f);
  const float weight = 0.5f;
  int32_t segment[] = {1, 1, 4, 3, 0};
  std::memcpy(segment + 4, &weight, sizeof(weight));
  const Where table[] = {{0, 0, 0, 0, -1, -1}, {stride, 3, 0, 0, -1, -1}};
  const Slots slots{a.data(), table, 1, 0, 0};
  aio_lora_shrink(bf16, x.data(), n_in, &slots, 0, h.data(), n_in, 1, max_rank, segment, 1, 2);
  for (long t = 0; t < tokens; t++)
    for (long r = 0; r < max_rank; r++) {
      float sum = 0;
      for (long j = 0; j < n_in && t > 0; j++) sum += x[t * n_in + j] * a[stride + r * n_in + j];
      expect("shrink", bf16, h[t * max_rank + r], weight * sum, 4);
    }
}

// Blocks of 32 codes of 4 bits after a float16 scale, which is a power of two; that of row 3 is the smallest there is.
static void blocks(bool bf16) {
  constexpr long n = 16, k = 64, bytes = 18;
  std::vector<uint8_t> data(n * k / 32 * bytes);
  std::vector<float> expected(n * k);
  for (long row = 0; row < n; row++)
    for (long b = 0; b < k / 32; b++) {
      uint8_t* block = &data[(row * k / 32 + b) * bytes];
      const uint16_t scale = row == 3 ? 0x0001 : row % 2 == 0 ? 0x2c00 : 0xb800;
      const float d = row == 3 ? 0x1p-24f : row % 2 == 0 ? 0x1p-4f : -0.5f;
      std::memcpy(block, &scale, 2);
      for (long i = 0; i < 16; i++) {
        const int low = int(row + 3 * i + b) % 16, high = int(5 * row + i) % 16;
        block[2 + i] = uint8_t(low | high << 4);
        expected[row * k + b * 32 + i] = d * (low - 8);
        expected[row * k + b * 32 + 16 + i] = d * (high - 8);
      }
    }
  aio_turn_blocks(data.data(), n, k / 32, 1, 4, 0, 2);
  const Part part{1, data.data(), n / 16, nullptr, nullptr, nullptr, 0, 0};
  std::vector<int64_t> rows(n);
  for (long i = 0; i < n; i++) rows[i] = n - 1 - i;
  Values out(bf16, n * k);
  aio_expand_rows(bf16, &part, rows.data(), out.data(), n, k, 2);
  for (long i = 0; i < n; i++)
    for (long j = 0; j < k; j++) expect("blocks", bf16, out[i * k + j], expected[rows[i] * k + j], 0);
}

int main() {
  for (const bool bf16 : {false, true}) linear(bf16), norm_and_activation(bf16), shrink(bf16), blocks(bf16);
  for (const bool bf16 : {false, true}) linear_int8(bf16), linear_int4(bf16, false), linear_int4(bf16, true);
  for (const bool bf16 : {false, true}) attention(bf16, false), attention(bf16, true);
  std::printf(wrong == 0 ? "all as expected\n" : "%d are wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
