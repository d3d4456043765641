// Mixtures of experts: which token goes where. All of a step's threads call these, but for what `sort` and `segments` do.
#pragma once

#include "ops.h"

namespace aio {

// The rows of a step's tokens: one for each of a token's experts, sorted by expert and then by token.
struct Routes {
  long tokens, experts, per_token;
  float* weight;    // [tokens, per_token]
  int32_t* chosen;  // [tokens, per_token] experts
  int32_t* row;     // [tokens, per_token] their rows
  int32_t* token;   // [rows]
  int32_t* begin;   // [experts + 1] the first row of each expert

  // The experts with the highest scores [tokens, experts], and their weights.
  void choose(const float* scores, bool normalized, int threads) const;
  // For one thread: fills in row, token and begin.
  void sort() const;
  // For one thread: segments of rows, at most one for each row; returns how many. A segment's slot is a number of places in
  // the table: `per_slot` for each slot, and `per_expert` for each expert.
  long segments(const Segment* of, long count, long per_slot, long per_expert, Segment* out) const;
  // x [tokens, bytes] -> out [rows, bytes].
  void spread(const void* x, void* out, long bytes, int threads) const;
  // out [tokens, size] = the sum of each token's rows of y times their weights, and of `shared` [tokens, size] (may be
  // null) times the sigmoid of `gate` [tokens].
  void total(bool bf16, const void* y, const void* shared, const float* gate, void* out, long size, int threads) const;
};

// y [rows, n] float32 = x [rows, k] W^T + bias (may be null). k is a multiple of 16.
void small_linear(bool bf16, const void* x, long k, const void* weight, const void* bias, long n, float* y, long rows,
                  int threads);
// Adds to that what adapters add; `place` is the linear's in a slot.
void adapt_small_linear(bool bf16, const void* x, long k, long n, const Slots& slots, long place, const Segment* segments,
                        long count, float* y, int threads);

}  // namespace aio
