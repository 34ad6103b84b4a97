// Threads that work through the same list of phases together, a product after the other.
#pragma once

#include <atomic>
#include <cstdint>
#include <sched.h>

namespace bm {
namespace {

class Crew {
 public:
  static constexpr int most = 64;  // members

  // Every member says how many there are before anything else; all say the same.
  void enter(int n_members) { n_members_.store(n_members, std::memory_order_relaxed); }
  int size() const { return n_members_.load(std::memory_order_relaxed); }

  // f(i) for i = 0 .. n_tasks - 1, each by some member; returns when all are done. Every member
  // must call it. before() runs once on each member that gets a task.
  //
  // A member begins with a share of its own, tasks that follow each other: what lies in memory one
  // behind the other is one stream, and nobody else's. Who is done takes the last tasks of the others.
  template <class Before, class F>
  void each(int member, std::int64_t n_tasks, const Before& before, const F& f) {
    const int n_members = size();
    if (n_members == 1) {
      before();
      for (std::int64_t i = 0; i < n_tasks; ++i) f(i);
      return;
    }
    bool fresh = true;
    const auto take = [&](std::int64_t i) {
      if (fresh) before();
      fresh = false;
      f(i);
    };
    for (int other = 0; other < n_members; ++other) {
      const int whose = (member + other) % n_members;
      const std::int64_t first = share(n_tasks, n_members, whose), count = share(n_tasks, n_members, whose + 1) - first;
      std::atomic<std::uint64_t>& taken = shares_[whose].taken;
      for (;;) {
        const std::uint64_t before_this =
            taken.fetch_add(other == 0 ? 1 : one_of_the_last, std::memory_order_relaxed);
        const std::int64_t of_first = static_cast<std::uint32_t>(before_this);
        const std::int64_t of_last = static_cast<std::int64_t>(before_this >> 32);
        if (of_first + of_last >= count) break;
        take(other == 0 ? first + of_first : first + count - 1 - of_last);
      }
    }
    wait(n_members);
  }

 private:
  // where a member's tasks begin
  static std::int64_t share(std::int64_t n_tasks, int n_members, int member) {
    return n_tasks * member / n_members;
  }

  void wait(int n_members) {
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == n_members - 1) {
      waiting_.store(0, std::memory_order_relaxed);
      for (int i = 0; i < n_members; ++i) shares_[i].taken.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins > 4000) sched_yield();  // someone else has the processor
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  // How many tasks of a share its member took, from the first on, in the low half, and how many the
  // others did, from the last back, in the high half. Both grow beyond what there is: no task is then left.
  static constexpr std::uint64_t one_of_the_last = std::uint64_t{1} << 32;
  struct alignas(64) Share {
    std::atomic<std::uint64_t> taken{0};
  };

  std::atomic<int> n_members_{1};
  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<unsigned> round_{0};
  Share shares_[most];
};

}  // namespace
}  // namespace bm
