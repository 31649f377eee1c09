// The threads that compute a step together. They meet at barriers and share out work by a counter.
//
// A thread that waits spins for some tens of microseconds, which covers the phases of a step, then sleeps in the
// kernel: an idle engine takes no processor time, and where a processor is shared with others, a waiting thread soon
// gives it to the one that it waits for.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace octavo {

// A number that only grows; threads wait for it to change.
class Signal {
 public:
  uint32_t now() const { return value_.load(std::memory_order_acquire); }

  void advance() {
    value_.fetch_add(1);  // ordered before the read of sleepers_, as theirs are the other way round
    if (sleepers_.load() != 0) syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  void wait_beyond(uint32_t seen) {
    for (int spin = 0; spin < kSpins; spin++) {
      if (now() != seen) return;
      __builtin_ia32_pause();
    }
    sleepers_.fetch_add(1);
    while (value_.load() == seen) syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    sleepers_.fetch_sub(1);
  }

 private:
  static constexpr int kSpins = 2000;  // a pause is 10 to 40 ns
  std::atomic<uint32_t> value_{0};
  std::atomic<int> sleepers_{0};
};

class Pool {
 public:
  explicit Pool(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads) {
    for (int thread = 1; thread < num_threads_; thread++) threads_.emplace_back([this, thread] { work(thread); });
  }

  ~Pool() {
    ending_ = true;
    started_.advance();
    for (std::thread& thread : threads_) thread.join();
  }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_threads() const { return num_threads_; }

  // Runs `job(thread)` on every thread, the caller's as number 0; returns when all are done.
  void run(const std::function<void(int)>& job) {
    job_ = &job;
    next_.store(0, std::memory_order_relaxed);
    started_.advance();
    job(0);
    barrier();
  }

  // Returns when all threads are here; then `claim` counts from 0 again.
  void barrier() {
    const uint32_t seen = passed_.now();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      passed_.advance();
    } else {
      passed_.wait_beyond(seen);
    }
  }

  // Takes the next units [first, last) of `count` for the calling thread: many at first, one towards the end; at most `most`.
  bool claim(int count, int& first, int& last, int most = INT_MAX) {
    first = next_.load(std::memory_order_relaxed);
    do {
      if (first >= count) return false;
      const int share = (count - first) / (2 * num_threads_);
      last = first + std::max(1, std::min(share, most));
    } while (!next_.compare_exchange_weak(first, last, std::memory_order_relaxed));
    return true;
  }

 private:
  void work(int thread) {
    uint32_t seen = 0;
    for (;;) {
      started_.wait_beyond(seen);
      seen++;
      if (ending_) return;
      (*job_)(thread);
      barrier();
    }
  }

  const int num_threads_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* job_ = nullptr;
  std::atomic<bool> ending_{false};
  alignas(64) Signal started_;
  alignas(64) Signal passed_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> next_{0};
};

}  // namespace octavo
