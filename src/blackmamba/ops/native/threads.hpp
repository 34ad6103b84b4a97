// Work shared between threads: those of torch's own OpenMP team where it has one, so that two teams
// never compete for the processor; otherwise threads of our own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bm {

using TaskFunction = void (*)(const void* context, std::int64_t task);

// Calls run(context, i) for i = 0 .. n_tasks - 1 on up to n_threads threads, in no certain order.
// A kernel's tasks depend on its shapes alone and share no output: then so does every bit of it.
void run_tasks(int n_threads, std::int64_t n_tasks, TaskFunction run, const void* context);

// "OpenMP of torch" or "own threads".
const char* threading();

template <class F>
inline void parallel_for(int n_threads, std::int64_t n_tasks, const F& f) {
  run_tasks(
      n_threads, n_tasks,
      [](const void* context, std::int64_t task) { (*static_cast<const F*>(context))(task); }, &f);
}

// Calls run(context, member, n_members) once on each of n_members threads at the same time, where
// 1 <= n_members <= n_threads: they may wait for each other.
using MemberFunction = void (*)(const void* context, int member, int n_members);
void run_crew(int n_threads, MemberFunction run, const void* context);

// Of `size` each, the last perhaps smaller, that n are cut into.
constexpr std::int64_t pieces(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// Memory of the calling thread for as long as its task runs, 64-byte aligned, kept for the next one.
// Slots are independent; what a slot held before is lost when it has to grow.
enum class Slot { a, b, c, d };
void* scratch_bytes(Slot slot, std::size_t bytes);

template <class T>
inline T* scratch(Slot slot, std::size_t count) {
  return static_cast<T*>(scratch_bytes(slot, count * sizeof(T)));
}

// How often scratch memory had to grow since the module was loaded.
std::int64_t scratch_allocations();

}  // namespace bm
