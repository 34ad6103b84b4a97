#include "native/threads.hpp"

#include <dlfcn.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace bm {
namespace {

struct Job {
  TaskFunction run;
  const void* context;
  std::int64_t n_tasks;
  std::atomic<std::int64_t> next{0};
};

void work(void* pointer) {
  Job& job = *static_cast<Job*>(pointer);
  for (std::int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.n_tasks;)
    job.run(job.context, i);
}

// libgomp's entry behind `#pragma omp parallel`. torch loads its OpenMP library for all to see;
// asking for it by name keeps a second copy of that library, with threads of its own, out.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel() {
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

using OmpNumber = int (*)();
OmpNumber omp(const char* name) { return reinterpret_cast<OmpNumber>(dlsym(RTLD_DEFAULT, name)); }

// Threads of our own, for where torch brings another library (macOS). They sleep between jobs.
class Team {
 public:
  static Team& instance() {
    static Team* const team = new Team;  // never destroyed: its threads may outlive main
    return *team;
  }

  // function(pointer) on n_threads threads, of which the caller is one
  void run(int n_threads, void (*function)(void*), void* pointer) {
    const std::lock_guard<std::mutex> one_at_a_time(use_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(members_.size()) < n_threads - 1) {
        const int number = static_cast<int>(members_.size());
        members_.emplace_back([this, number] { serve(number); }).detach();
      }
      function_ = function;
      pointer_ = pointer;
      wanted_ = n_threads - 1;
      busy_ = wanted_;
      ++round_;
    }
    start_.notify_all();
    function(pointer);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void serve(int number) {
    std::uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (number >= wanted_) continue;
      const auto function = function_;
      void* const pointer = pointer_;
      lock.unlock();
      function(pointer);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex use_, mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> members_;
  void (*function_)(void*) = nullptr;
  void* pointer_ = nullptr;
  int wanted_ = 0, busy_ = 0;
  std::uint64_t round_ = 0;
};

std::atomic<std::int64_t> n_allocations{0};

class Memory {
 public:
  ~Memory() { std::free(bytes_); }
  void* at_least(std::size_t size) {
    if (size > size_) {
      std::free(bytes_);
      size_ = (size + 4095) / 4096 * 4096;
      bytes_ = std::aligned_alloc(64, size_);
      if (bytes_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
      n_allocations.fetch_add(1, std::memory_order_relaxed);
    }
    return bytes_;
  }

 private:
  void* bytes_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace

void run_tasks(int n_threads, std::int64_t n_tasks, TaskFunction run, const void* context) {
  if (n_threads > n_tasks) n_threads = static_cast<int>(n_tasks);
  if (n_threads <= 1) {
    for (std::int64_t i = 0; i < n_tasks; ++i) run(context, i);
    return;
  }
  Job job{run, context, n_tasks};
  if (const GompParallel parallel = gomp_parallel())
    parallel(work, &job, static_cast<unsigned>(n_threads), 0);
  else
    Team::instance().run(n_threads, work, &job);
}

namespace {

struct Crew {
  MemberFunction run;
  const void* context;
  int n_members;  // 0: the OpenMP library knows
  std::atomic<int> next{0};
};

void join(void* pointer) {
  Crew& crew = *static_cast<Crew*>(pointer);
  static const OmpNumber size = omp("omp_get_num_threads");
  const int n = crew.n_members ? crew.n_members : size();
  crew.run(crew.context, crew.next.fetch_add(1, std::memory_order_relaxed), n);
}

}  // namespace

void run_crew(int n_threads, MemberFunction run, const void* context) {
  if (n_threads <= 1) return run(context, 0, 1);
  static const bool has_size = omp("omp_get_num_threads") != nullptr;
  if (const GompParallel parallel = gomp_parallel(); parallel && has_size) {
    Crew crew{run, context, 0};
    parallel(join, &crew, static_cast<unsigned>(n_threads), 0);
  } else {
    Crew crew{run, context, n_threads};
    Team::instance().run(n_threads, join, &crew);
  }
}

const char* threading() { return gomp_parallel() ? "OpenMP of torch" : "own threads"; }

void* scratch_bytes(Slot slot, std::size_t bytes) {
  thread_local Memory slots[4];
  return slots[static_cast<int>(slot)].at_least(bytes);
}

std::int64_t scratch_allocations() { return n_allocations.load(std::memory_order_relaxed); }

}  // namespace bm
