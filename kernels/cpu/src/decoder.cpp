// A whole step of a decoder in one call: the operations of ops.h in the order of the Llama family's layers.
//
// Called from Python, a step of 30 layers would be some 400 calls, each of which holds the GIL for a few
// microseconds; in one call it is free throughout.
//
// The file is long because it has the structs that Python fills in, and every operation of a layer in the order of a step.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "experts.h"
#include "fetcher.h"
#include "matrix.h"
#include "team.h"

extern "C" {

// A fused linear's places in the slots; slices = 0: none of it is targeted.
struct LoraPool {
  int64_t slices;
  int64_t first;
  int64_t exchange;  // what becomes of A x before B
  int64_t id;
  aio::Slice slice[3];
};

// What a layer has in the place of an MLP. The matrices of all experts are one below the other; the router and the gate of
// the shared expert are as they were loaded.
struct Mixture {
  int64_t experts, per_token, size, normalized, shared_size;
  // [experts, hidden], [experts], [1, hidden]; the bias may be null, and without a shared expert its parts are
  const void *router, *router_bias, *shared_gate;
  Matrix gate_up, down, shared_gate_up, shared_down;
  LoraPool lora_router, lora_gate_up, lora_down, lora_shared_gate_up, lora_shared_down, lora_shared_gate;
};

struct Layer {
  // Before attention and of its outputs, of queries and keys, before the MLP and of its outputs; those that a layer does
  // not have are null.
  const void *input_norm, *attention_norm, *q_norm, *k_norm, *mlp_input_norm, *mlp_norm;
  const void* sinks;  // [heads], of attention; may be null
  Matrix qkv, o, gate_up, down;
  LoraPool lora_qkv, lora_o, lora_gate_up, lora_down;
  void *keys, *values;
  int64_t window;  // 0: full attention
  int64_t rope;    // which of the step's rotations
  const Mixture* mixture;  // null: gate_up and down are the layer's
};

struct Model {
  int64_t bf16, layers, hidden, heads, kv_heads, head_dim, intermediate, block_size, int8_cache;
  int64_t rope_half, rope_neighbours;  // see Rope in elementwise.cpp
  int64_t q_norm_size, k_norm_size;    // a head's, or of all heads together
  int64_t activation, norm_rounded;  // an aio::Activation
  double eps, norm_offset, residual_scale, attention_scale, attention_cap, swiglu_alpha, swiglu_limit;
  const void* norm;
  int64_t rotations;         // different ones of the layers
  const void* embedding;     // [vocabulary, hidden]
  int64_t embedding_packed;  // as the linears are
  Matrix head;
  LoraPool lora_head;
  aio::Slots slots;
  const Layer* layer;
};

// Tokens by adapter slot: segments [count][slot, begin, end, rank, weight]; those in `affine` are scaled and shifted. `width`
// is what A's outputs have room for.
struct LoraBatch {
  const int32_t* segments;
  int64_t count, width;
  const int32_t* affine;
  int64_t affine_count;

  const aio::Segment* begin() const { return (const aio::Segment*)segments; }
};

struct Step {
  int64_t tokens, sequences, table_width, samples, threads;
  const int64_t* token_ids;  // all in the vocabulary: the engine refuses others where they come in
  const int32_t *tables, *spans;
  const float *angles_cos, *angles_sin;  // [rotations, positions, rope_half]; null: the tokens' are filled in
  int64_t positions;
  int64_t embedded;  // whether `hidden` is filled in
  // What the step makes of these: the tokens' embeddings, overwritten; [rotations, tokens, rope_half]; the places of their
  // keys; whether they are the last of their sequences.
  void* hidden;
  float *cos, *sin;
  int64_t* cells;
  uint8_t* last;
  const int64_t* sample_rows;
  LoraBatch lora, sample_lora;
  void* logits;   // [samples, head.n]
  int64_t* best;  // [samples] the most likely tokens, as aio_argmax finds them; null: they are not asked for
  void *x, *wide, *narrow, *h;  // scratch: tokens x hidden, x the widest linear, x intermediate or heads, x 3 widths
  // Scratch of mixtures, with R = tokens x per_token: R x hidden, R x 2 size, R x size, R x 2 widths; tokens x experts and
  // R and tokens floats; 8 R + experts + 1 integers.
  void *rows, *rows_wide, *rows_narrow, *rows_h;
  float *scores, *weights, *gates;
  int32_t* routes;
  double* seconds;  // [PHASES] to which the time of each is added; may be null
  // Of a model that several processes hold: does what the first argument says (an Exchange) for the pool with this id
  // (below 0: none), or returns other than 0 to have the step end. Null: there are no others.
  int (*exchange)(int64_t what, int64_t id);
};

// structs.py names these.
enum Phase { NORM, QKV, ROPE, ATTENTION, O, GATE_UP, ACTIVATION, DOWN, HEAD, SHRINK, AFFINE, EXCHANGE, ROUTE, PHASES };
// GATHER makes h [rows, slices, width] of what every process has of it, SUM adds them up; of experts, rows_h. TOTAL adds
// up x, the outputs of linears that are split over their inputs, and scales and shifts the sum.
enum Exchange { NOTHING, GATHER, SUM, TOTAL };

}  // extern "C"

namespace {

struct Stopped {};

// A linear with the pool of its adapters.
struct Adapted {
  const Matrix* matrix;
  const LoraPool* pool;
};

// What each thread of a team goes through.
struct Run {
  const Model& m;
  const Step& s;
  const aio::Member& me;
  bool& stopped;  // the team's
  long& segment_count;  // the team's
  int threads = int(me.count);

  size_t element() const { return m.bf16 ? 2 : 4; }

  template <class Work>
  void timed(Phase phase, const Work& work) const {
    if (s.seconds == nullptr || me.index > 0) return work();
    const double began = omp_get_wtime();
    work();
    s.seconds[phase] += omp_get_wtime() - began;
  }

  void exchange(int64_t what, int64_t pool) const {
    timed(EXCHANGE, [&] { me.once([&] { stopped = s.exchange(what, pool) != 0; }); });
    if (stopped) throw Stopped{};
  }

  // Scales and shifts rows of y [rows, n]. Where inputs are split, a process has all outputs, even if B is for some of them.
  void affine(const LoraPool& pool, const aio::Slots& slots, void* y, long n, const int32_t* segments, long count) const {
    const aio::Slice all{n, 0};
    timed(AFFINE, [&] {
      aio_lora_affine(m.bf16, y, n, &slots, pool.first, pool.exchange == SUM ? &all : pool.slice, pool.slices, segments, count,
                      threads);
    });
  }

  // A's outputs of a batch to s.h.
  void shrink(const LoraPool& pool, const LoraBatch& batch, const void* x, long k) const {
    timed(SHRINK, [&] {
      aio_lora_shrink(m.bf16, x, k, &m.slots, pool.first, s.h, k, pool.slices, batch.width, batch.segments, batch.count,
                      threads);
    });
    if (pool.exchange != NOTHING) exchange(pool.exchange, pool.id);
  }

  // `next` is the linear that follows: with few rows the arithmetic leaves the memory idle.
  // A summand of several processes is left to be added up later.
  void linear(Phase phase, const Adapted& a, const LoraBatch& batch, const void* x, void* y, long rows,
              const Adapted& next, bool summand = false) const {
    const Matrix& w = *a.matrix;
    const LoraPool& pool = *a.pool;
    const auto* const segments = (const aio::Segment*)batch.segments;
    const auto adapters_of = [&](const LoraPool& p) {
      return aio::Adapters{segments, batch.count, s.h, &m.slots, p.first, p.slice, p.slices, batch.width};
    };
    const std::vector<aio::Fetch> fetch = aio::matrices(adapters_of(*next.pool), next.matrix->k, element());
    const aio::Adapters adapters = adapters_of(pool);
    const bool adapted = pool.slices > 0 && batch.count > 0;
    const bool total = s.exchange != nullptr && (phase == O || phase == DOWN) && !summand;
    if (adapted) shrink(pool, batch, x, w.k);
    timed(phase, [&] {
      aio::product(m.bf16, w, x, y, rows,
                   {fetch.data(), long(fetch.size()), adapted ? &adapters : nullptr,
                    {next.matrix->packed, next.matrix->n, next.matrix->panel_bytes}},
                   {}, threads);
    });
    if (total)
      exchange(TOTAL, pool.id);
    else if (adapted && batch.affine_count > 0)
      affine(pool, m.slots, y, w.n, batch.affine, batch.affine_count);
  }

  // Adds the norm of `delta`, or itself if it has no weight, to the hidden state, and returns the norm of that; itself if
  // there is no weight.
  const void* norm(void* delta, const void* delta_weight, const void* weight, long rows) const {
    timed(NORM, [&] {
      aio_add_rms_norm(m.bf16, s.hidden, delta, delta_weight, weight, s.x, rows, m.hidden, m.residual_scale, m.eps,
                       int(m.norm_rounded), m.norm_offset, threads);
    });
    return weight != nullptr ? s.x : s.hidden;
  }

  // gate_up [rows, 2 * size] -> out [rows, size].
  void activate(const void* gate_up, void* out, long rows, long size) const {
    const aio::Gate gate{m.bf16, m.activation, m.swiglu_alpha, m.swiglu_limit, out};
    timed(ACTIVATION, [&] { aio_activate(&gate, gate_up, rows, size, threads); });
  }

  // What the tokens are, where they are and what follows from that.
  void tokens() const {
    const aio::Range mine = me.share(s.tokens);
    const size_t row = m.hidden * element(), half = m.rope_half;
    for (long i = 0; i < s.sequences; i++) {
      const int32_t *span = s.spans + 3 * i, *table = s.tables + i * s.table_width;
      const long first = span[0], end = first + span[1];
      for (long t = std::max(first, mine.begin); t < std::min(end, mine.end); t++) {
        const long at = span[2] + t - first;
        s.cells[t] = table[at / m.block_size] * m.block_size + at % m.block_size;
        s.last[t] = t == end - 1;
        for (long r = 0; r < m.rotations && s.angles_cos != nullptr; r++) {
          const long from = (r * s.positions + at) * half, to = (r * s.tokens + t) * half;
          std::memcpy(s.cos + to, s.angles_cos + from, half * sizeof(float));
          std::memcpy(s.sin + to, s.angles_sin + from, half * sizeof(float));
        }
        if (!s.embedded && !m.embedding_packed)
          std::memcpy((char*)s.hidden + t * row, (const char*)m.embedding + s.token_ids[t] * row, row);
      }
    }
    me.wait();
    if (!s.embedded && m.embedding_packed)
      aio_gather(m.bf16, m.embedding, s.token_ids, s.hidden, s.tokens, m.hidden, threads);
  }

  // `delta` is what the layer before left to be normed and added to the hidden state; this layer's is in x. `next` is what
  // the adapters do next.
  void layer(const Layer& l, void* delta, const void* delta_weight, const Adapted& next) const {
    const long qkv_width = l.qkv.n;
    const void* x = norm(delta, delta_weight, l.input_norm, s.tokens);
    const Adapted o{&l.o, &l.lora_o}, gate_up{&l.gate_up, &l.lora_gate_up}, down{&l.down, &l.lora_down};
    linear(QKV, {&l.qkv, &l.lora_qkv}, s.lora, x, s.wide, s.tokens, o);
    const aio::HeadNorms norms{l.q_norm, l.k_norm, m.q_norm_size, m.k_norm_size, m.norm_rounded, m.eps, m.norm_offset};
    timed(ROPE, [&] {
      const long rotation = l.rope * s.tokens * m.rope_half;
      aio_rope_store(m.bf16, s.wide, s.cos + rotation, s.sin + rotation, s.cells, s.last, l.keys, l.values, s.tokens,
                     m.heads, m.kv_heads, m.head_dim, m.block_size, m.rope_half, int(m.rope_neighbours),
                     int(m.int8_cache), l.q_norm != nullptr ? &norms : nullptr, threads);
    });
    timed(ATTENTION, [&] {
      aio_attention(m.bf16, s.wide, qkv_width, l.keys, l.values, s.tables, s.table_width, s.spans, s.sequences,
                    s.narrow, m.heads, m.kv_heads, m.head_dim, m.block_size, l.window,
                    m.attention_scale, m.attention_cap, l.sinks, int(m.int8_cache), threads);
    });
    linear(O, o, s.lora, s.narrow, s.x, s.tokens, gate_up);
    x = norm(s.x, l.attention_norm, l.mlp_input_norm, s.tokens);
    if (l.mixture != nullptr) return mixture(*l.mixture, x);
    linear(GATE_UP, gate_up, s.lora, x, s.wide, s.tokens, down);
    activate(s.wide, s.narrow, s.tokens, m.intermediate);
    linear(DOWN, down, s.lora, s.narrow, s.x, s.tokens, next);
  }

  // The scores of a small linear, in float32.
  void scores(const void* weight, const void* bias, long n, const LoraPool& pool, const void* x, float* y) const {
    timed(ROUTE, [&] {
      aio::small_linear(m.bf16, x, m.hidden, weight, bias, n, y, s.tokens, threads);
      if (pool.slices == 0 || s.lora.count == 0) return;
      aio::adapt_small_linear(m.bf16, x, m.hidden, n, m.slots, pool.first, s.lora.begin(), s.lora.count, y, threads);
    });
  }

  // The experts' linears for their rows, with the adapters on them. `segments` has room for a segment of each row.
  void experts(Phase phase, const Matrix& w, const LoraPool& pool, const aio::Routes& r, aio::Segment* segments,
               const void* x, void* y) const {
    const long n = w.n / r.experts;
    timed(phase, [&] { aio::product(m.bf16, w, x, y, r.tokens * r.per_token, {}, {r.begin, r.experts}, threads); });
    if (pool.slices == 0 || s.lora.count == 0) return;
    const aio::Slots places{m.slots.memory, m.slots.table, 1, m.slots.int8, m.slots.turned};
    const auto run = [&](const int32_t* of, long count, const auto& work) {
      long* found = (long*)me.from_first([&] {
        segment_count = r.segments((const aio::Segment*)of, count, m.slots.places, pool.slices, segments);
        return (void*)&segment_count;
      });
      work((const int32_t*)segments, *found);
    };
    run(s.lora.segments, s.lora.count, [&](const int32_t* found, long count) {
      timed(SHRINK, [&] {
        aio_lora_shrink(m.bf16, x, w.k, &places, pool.first, s.rows_h, w.k, pool.slices, s.lora.width, found, count, threads);
      });
      if (pool.exchange != NOTHING) exchange(pool.exchange, pool.id);
      timed(phase, [&] {
        aio_lora_expand(m.bf16, s.rows_h, &places, pool.first, pool.slice, pool.slices, s.lora.width, y, n, found, count,
                        threads);
      });
    });
    if (s.lora.affine_count == 0) return;
    run(s.lora.affine, s.lora.affine_count,
        [&](const int32_t* found, long count) { affine(pool, places, y, n, found, count); });
  }

  // What experts make of x [tokens, hidden], to s.x, which x may be. Several processes have summands of all outputs, which
  // are added up once.
  void mixture(const Mixture& e, const void* x) const {
    const long rows = s.tokens * e.per_token;
    const Matrix no_matrix{};
    const LoraPool no_pool{};
    const Adapted nothing{&no_matrix, &no_pool};
    const aio::Routes r{s.tokens,       e.experts,           e.per_token,         s.weights, s.routes,
                        s.routes + rows, s.routes + 2 * rows, s.routes + 8 * rows};
    scores(e.router, e.router_bias, e.experts, e.lora_router, x, s.scores);
    timed(ROUTE, [&] {
      r.choose(s.scores, e.normalized, threads);
      me.once([&] { r.sort(); });
      r.spread(x, s.rows, m.hidden * element(), threads);
    });
    if (e.shared_size > 0) {
      const Adapted down{&e.shared_down, &e.lora_shared_down};
      scores(e.shared_gate, nullptr, 1, e.lora_shared_gate, x, s.gates);
      linear(GATE_UP, {&e.shared_gate_up, &e.lora_shared_gate_up}, s.lora, x, s.wide, s.tokens, down);
      activate(s.wide, s.narrow, s.tokens, e.shared_size);
      linear(DOWN, down, s.lora, s.narrow, s.x, s.tokens, nothing, true);
    }
    aio::Segment* segments = (aio::Segment*)(s.routes + 3 * rows);
    experts(GATE_UP, e.gate_up, e.lora_gate_up, r, segments, s.rows, s.rows_wide);
    activate(s.rows_wide, s.rows_narrow, rows, e.size);
    experts(DOWN, e.down, e.lora_down, r, segments, s.rows_narrow, s.rows);
    timed(ROUTE, [&] {
      r.total(m.bf16, s.rows, e.shared_size > 0 ? s.x : nullptr, s.gates, s.x, m.hidden, threads);
    });
    if (s.exchange != nullptr) exchange(TOTAL, -1);
  }

  void operator()() const {
    const Adapted head{&m.head, &m.lora_head};
    timed(ROPE, [&] { tokens(); });
    void* delta = nullptr;
    const void* delta_weight = nullptr;
    for (long i = 0; i < m.layers; i++) {
      const Layer* next = i + 1 < m.layers ? &m.layer[i + 1] : nullptr;
      layer(m.layer[i], delta, delta_weight, next != nullptr ? Adapted{&next->qkv, &next->lora_qkv} : head);
      delta = s.x, delta_weight = m.layer[i].mlp_norm;
    }
    if (s.samples == 0) {
      if (delta_weight == nullptr) return;
      return timed(NORM, [&] {  // x is the step's result
        aio_add_rms_norm(m.bf16, s.x, nullptr, nullptr, delta_weight, s.x, s.tokens, m.hidden, 1, m.eps, int(m.norm_rounded),
                         m.norm_offset, threads);
      });
    }
    // Only the rows that are sampled go on; row i of the samples never lies before row i of the tokens.
    me.once([&] {
      const size_t row = m.hidden * element();
      for (long i = 0; i < s.samples; i++) {
        std::memmove((char*)s.hidden + i * row, (char*)s.hidden + s.sample_rows[i] * row, row);
        std::memmove((char*)s.x + i * row, (char*)s.x + s.sample_rows[i] * row, row);
      }
    });
    norm(s.x, delta_weight, m.norm, s.samples);
    const Matrix no_matrix{};
    const LoraPool no_pool{};
    linear(HEAD, head, s.sample_lora, s.x, s.logits, s.samples, {&no_matrix, &no_pool});
    if (s.best != nullptr)
      timed(HEAD, [&] { aio_argmax(m.bf16, s.logits, s.samples, m.head.n, s.best, threads); });
  }
};

}  // namespace

AIO_EXPORT void aio_step(const Model* model, const Step* step) {
  bool stopped = false;
  long segment_count = 0;
  const auto work = [&](const aio::Member& me) {
    try {
      Run{*model, *step, me, stopped, segment_count}();
    } catch (const Stopped&) {
    }
  };
  aio::step_together(int(step->threads), work);
}
