"""Finds races in shared memory, where CUDA C++ kernels run on a CPU (cuda_on_cpu.py).

A compiler that looks for races between threads calls a function at each access to memory. These
are ours: a thread is a coroutine, and what orders an access of one before that of another is a
barrier that one has arrived at before the other was let on. As clocks tell: each thread counts the
times that it arrived, a barrier keeps the latest counts of all that arrived, whoever is let on
takes them over. An access has a race with an earlier one that the thread's counts do not include,
if either writes.

Besides, one warp or another is held back until no other can go on. So a deadlock is met that needs
a warp to be late.

What threads of a warp pass on by a shuffle, or matrix units, orders no access. An atomic number
counts as a barrier. Two that write the same number have a race, too: the products that sum over
rows, where both warpgroups write zeros, cannot be looked at so.
"""

import functools
import subprocess
from pathlib import Path

_TEXT = r"""
#include <cstdio>
#include <unordered_map>
#include <vector>
typedef std::vector<unsigned> Clock;  // the latest counts of all threads
struct Piece {  // of two bytes
    int writer;  // -1: none
    unsigned written;
    Clock reads;  // empty: none
    bool of_barrier;
};
static const char* memory;
static std::vector<Piece> pieces;
static std::vector<Clock> clocks;
static std::unordered_map<const void*, Clock> arrived, let_on;
static char found[256];
static unsigned n_bytes;
extern "C" int race_thread();

static void join(Clock& to, const Clock& from) {
    if (to.size() < from.size()) to.resize(from.size());
    for (size_t i = 0; i < from.size(); i++)
        if (to[i] < from[i]) to[i] = from[i];
}
extern "C" void race_begin(const char* at, unsigned bytes, int threads) {
    memory = at, n_bytes = bytes, *found = 0;
    pieces.assign(bytes / 2, {-1, 0, {}, false});
    clocks.assign(threads, Clock(threads));
    for (int i = 0; i < threads; i++) clocks[i][i] = 1;
    arrived.clear(), let_on.clear();
}
extern "C" const char* race_end() {
    n_bytes = 0;
    return *found ? found : nullptr;
}
extern "C" void race_arrive(int thread, const void* barrier) {
    join(arrived[barrier], clocks[thread]);
    clocks[thread][thread]++;
}
extern "C" void race_all_arrived(const void* barrier) { let_on[barrier] = arrived[barrier]; }
extern "C" void race_go_on(int thread, const void* barrier) {
    join(clocks[thread], let_on[barrier]);
}
extern "C" void race_barrier_at(const void* at, unsigned bytes) {
    const unsigned first = (const char*)at - memory;
    for (unsigned i = 0; i < bytes / 2; i++) pieces[first / 2 + i].of_barrier = true;
}
static void tell(const char* what, int thread, int other, unsigned piece) {
    if (!*found)
        snprintf(found, sizeof found, "a race: thread %d %s byte %u of shared memory, thread %d",
                 thread, what, piece * 2, other);
}
extern "C" void race_access(const void* at, unsigned bytes, bool writes) {
    const unsigned long long first = (const char*)at - memory;
    if (first >= n_bytes) return;
    const int thread = race_thread();
    Clock& clock = clocks[thread];
    for (unsigned i = first / 2; i <= (first + bytes - 1) / 2; i++) {
        Piece& p = pieces[i];
        if (p.of_barrier) continue;
        if (p.writer >= 0 && p.written > clock[p.writer])
            tell(writes ? "writes to" : "reads", thread, p.writer, i);
        if (!writes) {
            if (p.reads.empty()) p.reads.resize(clocks.size());
            p.reads[thread] = clock[thread];
            continue;
        }
        for (size_t other = 0; other < p.reads.size(); other++)
            if (p.reads[other] > clock[other] && (int)other != thread)
                tell("overwrites, unread,", thread, other, i);
        p.reads.clear();
        p.writer = thread, p.written = clock[thread];
    }
}
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
#define OF_SIZE(n) \
    void __tsan_read##n(void* p) { race_access(p, n, false); } \
    void __tsan_write##n(void* p) { race_access(p, n, true); } \
    void __tsan_unaligned_read##n(void* p) { race_access(p, n, false); } \
    void __tsan_unaligned_write##n(void* p) { race_access(p, n, true); }
OF_SIZE(1) OF_SIZE(2) OF_SIZE(4) OF_SIZE(8) OF_SIZE(16)
void __tsan_read_range(void* p, unsigned long n) { race_access(p, n, false); }
void __tsan_write_range(void* p, unsigned long n) { race_access(p, n, true); }
}
"""
FLAGS = ("-fsanitize=thread", "-DRACES")
"""To compile a kernel with."""
DECLARATIONS = r"""
#ifdef RACES
#define SOME_WAIT true  // a warp, one or another, is held back until no other can go on
extern "C" void race_begin(const char*, unsigned, int);
extern "C" const char* race_end();
extern "C" void race_arrive(int, const void*);
extern "C" void race_all_arrived(const void*);
extern "C" void race_go_on(int, const void*);
extern "C" void race_barrier_at(const void*, unsigned);
extern "C" void race_access(const void*, unsigned, bool);
#else
#define SOME_WAIT false
#define race_begin(...) ((void)0)
#define race_end() nullptr
#define race_arrive(...) ((void)0)
#define race_all_arrived(...) ((void)0)
#define race_go_on(...) ((void)0)
#define race_barrier_at(...) ((void)0)
#define race_access(...) ((void)0)
#endif
"""
"""What the text of a kernel calls, where it may not be looked for."""


@functools.cache
def compiled(folder: Path, cxx: str) -> Path:
    """What a kernel is linked with."""
    source, binary = folder / "races.cc", folder / "races.o"
    source.write_text(_TEXT)
    subprocess.run([cxx, "-O2", "-std=c++17", "-fPIC", "-c", "-o", binary, source], check=True)
    return binary
