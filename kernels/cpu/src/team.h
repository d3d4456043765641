// The threads of a step. Each goes through all of its operations and does a share of every one, after which they wait
// for each other.
//
// With a parallel region for each operation, a step of 30 layers would have 400 of them, and in most processes that
// costs much: once there are more OpenMP threads than processors, for which it is enough that torch computed something
// in a second thread, libgomp puts threads to sleep at the end of every region, and wakes them up at the next. So a
// step is one region, and between its operations threads spin for a while. They do not spin for long: the one that is
// waited for may need the processor.
#pragma once

#include <omp.h>

#include <atomic>
#include <condition_variable>
#include <mutex>

#include "common.h"

namespace aio {

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What the members of a team share.
class Team {
 public:
  // Returns when `count` threads have called this as often as each other (Mellor-Crummey and Scott, "Algorithms for
  // Scalable Synchronization", 1991: a centralized barrier that reverses its sense).
  void wait(long count) {
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      round_.store(round + 1);
      if (sleepers_.load() > 0) {
        { std::lock_guard<std::mutex> held(mutex_); }  // whoever is about to sleep does, and is woken up
        awake_.notify_all();
      }
      return;
    }
    for (int i = 0; i < SPINS; i++) {
      if (round_.load(std::memory_order_acquire) != round) return;
      relax();
    }
    std::unique_lock<std::mutex> held(mutex_);
    sleepers_.fetch_add(1);
    awake_.wait(held, [&] { return round_.load() != round; });
    sleepers_.fetch_sub(1);
  }

  // 0, 1, 2, ... for whoever calls; from 0 again after all have waited.
  long take() { return next_.fetch_add(1, std::memory_order_relaxed); }

  void* given = nullptr;  // see Member::from_first

 private:
  static constexpr int SPINS = 2000;  // some 20 to 100 microseconds

  alignas(64) std::atomic<long> arrived_{0};
  alignas(64) std::atomic<unsigned> round_{0};
  alignas(64) std::atomic<long> next_{0};
  std::atomic<long> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable awake_;
};

// One of the `count` threads of a team.
struct Member {
  Team& team;
  const long index, count;

  Range share(long n) const { return aio::share(n, index, count); }
  void wait() const { team.wait(count); }

  // Has the first of them do something that is not to be shared, and all wait for it.
  template <class Work>
  void once(const Work& work) const {
    if (index == 0) work();
    wait();
  }

  // A pointer that the first has, for all.
  template <class Make>
  void* from_first(const Make& make) const {
    once([&] { team.given = make(); });
    return team.given;
  }
};

// The calling thread's part in a step; null outside of one.
inline thread_local const Member* current = nullptr;

// Has `work` done by a team: within a step by its threads, all of which call this, else by `threads` new ones. Returns
// when all are done.
template <class Work>
void together(int threads, const Work& work) {
  if (current != nullptr) {
    work(*current);
    current->wait();
    return;
  }
  Team team;
#pragma omp parallel num_threads(threads)
  {
    const Member me{team, omp_get_thread_num(), omp_get_num_threads()};
    work(me);
  }
}

// Has a step's threads go through `work`, in which together() is theirs.
template <class Work>
void step_together(int threads, const Work& work) {
  together(threads, [&](const Member& me) {
    current = &me;
    work(me);
    current = nullptr;
  });
}

}  // namespace aio
