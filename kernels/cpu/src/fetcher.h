// What a linear fetches from memory while it computes.
#pragma once

#include <vector>

#include "ops.h"

namespace aio {

// Where the matrices A [rank, k] of adapters lie, whose elements take so many bytes.
inline std::vector<Fetch> matrices(const Adapters& adapters, long k, long size) {
  constexpr long TOKENS = 32;  // of an adapter; with more, its matrices are a small part of what is read
  const Slots& slots = *adapters.slots;
  std::vector<Fetch> found;
  for (const Segment* g = adapters.segments; g < adapters.segments + adapters.count; g++) {
    if (g->end - g->begin > TOKENS) continue;
    long begin = -1, rows = 0;  // those of the slices adjoin
    for (long j = 0; j < adapters.slices; j++) {
      const Where& where = slots.where(g->slot, adapters.first + j);
      if (where.a_rank > 0 && begin < 0) begin = where.a;
      rows += where.a_rank;
    }
    if (rows == 0) continue;
    const char* const from = slots.at(begin, size);
    found.push_back({from, slots.at(begin + rows * k, size) - from});
  }
  return found;
}

// Gives out cache lines to be fetched while a thread computes its blocks, a few for each step of the inner loop.
// For each block that is: what is wanted when it is done, then the next block's weights, then a share of what is needed
// after the linear. The last is left for the last blocks, at most half of them, or what comes in between would drive it out.
class Fetcher {
 public:
  // `blocks` are the thread's.
  Fetcher(const Beside& beside, long index, long threads, long blocks) : later_(beside.fetch), blocks_(blocks) {
    long total = 0;
    for (long i = 0; i < beside.fetch_count; i++) total += lines(beside.fetch[i]);
    const Range mine = share(total, index, threads);
    left_ = mine.end - mine.begin < MOST_LATER ? mine.end - mine.begin : MOST_LATER;
    line_ = mine.begin;
    while (left_ > 0 && line_ >= lines(*later_)) line_ -= lines(*later_++);
    half_ = (blocks + 1) / 2;
  }

  // A block of so many steps begins. Call want() afterwards.
  void begin() {
    count_ = 0, next_ = 0, total_ = 0;
  }

  void want(const void* from, long bytes) {
    if (bytes <= 0) return;
    if (count_ == ranges_.size()) ranges_.resize(2 * count_ + 16);
    Lines& range = ranges_[count_++];  // written by parts: push_back stored and reloaded it, which stalls
    range.begin = (const char*)from, range.count = (bytes + 63) / 64;
    total_ += range.count;
  }

  // All is wanted; the block has so many steps.
  void ready(long steps) {
    if (left_ > 0 && blocks_ <= half_ && (blocks_ - 1) * steps <= left_) {
      for (long quota = (left_ + blocks_ - 1) / blocks_; quota > 0 && left_ > 0;) {
        if (line_ == lines(*later_)) later_++, line_ = 0;
        long count = lines(*later_) - line_;
        if (count > left_) count = left_;
        if (count > quota) count = quota;
        want((const char*)later_->begin + line_ * 64, count * 64);
        line_ += count, left_ -= count, quota -= count;
      }
    }
    blocks_--;
    rate_ = total_ > steps ? (total_ + steps - 1) / steps : 1;
  }

  // How many lines are to be fetched for each step; a loop may take fewer.
  long rate() const { return rate_; }

  // Up to `count` lines that adjoin: where they begin, and how many; none if all are given out.
  inline __attribute__((always_inline)) const char* take(long count, long& taken) {
    taken = 0;
    if (next_ == count_) return nullptr;
    Lines& range = ranges_[next_];
    const char* const from = range.begin;
    taken = range.count < count ? range.count : count;
    range.begin += taken * 64, range.count -= taken;
    if (range.count == 0) next_++;
    return from;
  }

  // Fetches up to `count` lines.
  inline void fetch(long count) {
    for (long taken; next_ < count_ && count > 0; count -= taken) {
      const char* const from = take(count, taken);
      for (long i = 0; i < taken; i++) __builtin_prefetch(from + i * 64, 0, 2);
    }
  }

 private:
  static constexpr long MOST_LATER = (1 << 20) / 64;  // lines; about what a core's L2 cache holds

  static long lines(const Fetch& r) { return (r.bytes + 63) / 64; }

  struct Lines {
    const char* begin;
    long count;
  };

  const Fetch* later_;
  long line_, left_, blocks_, half_;
  std::vector<Lines> ranges_;
  size_t count_ = 0, next_ = 0;  // ranges that are wanted, and the one that is given out
  long total_ = 0, rate_ = 1;
};

}  // namespace aio
