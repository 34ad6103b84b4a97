// Products of groups of rows with their expert's matrix, by the matrix units of NVIDIA's Hopper, in bfloat16. FORM:
//
//     0    y_i = W_e x_i           both lie with the numbers that are summed over side by side
//     1    y_i = W_e^T x_i         W_e has the columns of y side by side
//     2    Y_e = sum of w_i x_i^T  over the rows i of group e: the gradient of a matrix; columns side by side in both
//
// MODE, what becomes of a row of sums s_i:
//
//     0    y_i = s_i
//     1    y_i = act(g) * u of [g | u] = s_i, and h_i = s_i if KEEP           (fc1)
//     2    y_order[i] = gate_order[i] * s_i                                   (fc2, rows back in the tokens' order)
//
// ADD, in MODE 2: the same, rounded to bfloat16, is added to y, which is float32. One thread adds to a number, and once.
//
// PLACES, in FORM 0: each group has places for `places` rows, as prompt/norm.cu leaves them. Group e's, as many as `ends` says
// by itself, begin at row e * places: of x in MODE 1; of order and gate, which is by place then, in MODE 2. What MODE 1 writes
// and MODE 2 reads has no gaps.
//
// A block makes a tile of 128 rows of one group and WIDE columns after the other. One of its 12 warps asks for parts of x
// and W, 64 numbers deep, DEPTH of them ahead (TMA: one instruction a part, a barrier in shared memory counts the bytes);
// the 8 warps of two warpgroups, 64 rows each, multiply what has come and leave the place to the next. How many rows a
// group has is known on the device alone (`ends`), so each block walks over all tiles in steps of the grid.
//
// Bound by the matrix units: 2 m WIDE operations for a row of a tile.
//
// APART, in FORM 1: where m is not a whole number of parts, the last part of a W_e would end with the first rows of W_(e+1),
// times zeros of x; but 0 times NaN is NaN. So each W_e is a matrix of its own for TMA, which gives 0 for what is outside.
//
// Compiled at run time, without headers, with: FORM, MODE, GELU, KEEP, HAS_GATE, APART, ADD, PLACES (each 0 or 1), WIDE
// (columns of sums in a tile: 128, 192 or 256; in MODE 1 one half are g's), DEPTH, SHARED (bytes).
//
// Letters: t rows, e groups, m numbers of a row of x, n columns of y.

#define ROWS 128
#define DEEP BOX               // numbers of a part
#define HALF (WIDE / 2)
#define OUT (MODE == 1 ? HALF : WIDE)  // columns of y in a tile
#define CONSUMERS 2            // warpgroups that multiply
#define THREADS (128 * (CONSUMERS + 1))
#define LOG2E 1.4426950408889634f

struct Arguments {
    Map x, w;
    const int* ends;      // of the groups, ascending; PLACES: how many rows each has
    u16* y;               // ADD: of float32
    u16* h;               // KEEP
    const int* order;     // MODE 2
    const float* gate;    // HAS_GATE
    int n_groups, n;      // columns of y
    int size;             // numbers that a product sums over; FORM 2: rows of Y_e
    int places;           // PLACES
};

struct Shared {
    u16 x[DEPTH][ROWS * DEEP];
    u16 w[DEPTH][WIDE * DEEP];
    u64 full[DEPTH], empty[DEPTH];
};

// Columns side by side: a box for each DEEP of them.
template <int COLUMNS>
__device__ __forceinline__ void fetch_columns(u16* to, const Map& map, int column, int row, u64& barrier) {
#pragma unroll
    for (int i = 0; i < COLUMNS / DEEP; i++) fetch(to + i * DEEP * DEEP, map, column + i * DEEP, row, barrier);
}

#if APART
// Columns side by side of the matrix of a group.
template <int COLUMNS>
__device__ __forceinline__ void fetch_columns_of(u16* to, const Map& map, int column, int row, int group, u64& barrier) {
#pragma unroll
    for (int i = 0; i < COLUMNS / DEEP; i++) fetch(to + i * DEEP * DEEP, map, column + i * DEEP, row, group, barrier);
}
#endif

// ---- the matrix units ------------------------------------------------------------------------------------------------

// 16 of the numbers that are summed over: 32 bytes of a row, or 16 rows.
#define X_STEP (FORM == 2 ? 16 * 128 >> 4 : 32 >> 4)
#define W_STEP (FORM == 0 ? 32 >> 4 : 16 * 128 >> 4)

#if WIDE == 128
#define NUMBERS "n128k16", N0 N1, "%64, %65", "%66"
#define REGISTERS R32(0), R32(32)
#elif WIDE == 192
#define NUMBERS "n192k16", N0 N1 N2, "%96, %97", "%98"
#define REGISTERS R32(0), R32(32), R32(64)
#else
#define NUMBERS "n256k16", N0 N1 N2 N3, "%128, %129", "%130"
#define REGISTERS R32(0), R32(32), R32(64), R32(96)
#endif
#if FORM == 0
#define TURNED "0, 0"
#elif FORM == 1
#define TURNED "0, 1"
#else
#define TURNED "1, 1"
#endif

// d = a b^T, or d += a b^T: 64 rows of a, WIDE of b, 16 numbers each, by a warpgroup. Thread 32 w + 4 g + k has of d, for
// each 8 columns j, those 2 k and 2 k + 1 of rows 16 w + g (d[4 j], d[4 j + 1]) and 16 w + g + 8 (d[4 j + 2], d[4 j + 3]).
__device__ __forceinline__ void multiply(float (&d)[WIDE / 2], u64 a, u64 b, int add) {
    asm volatile(PRODUCT(NUMBERS) : REGISTERS : "l"(a), "l"(b), "r"(add));
}

// ---- tiles --------------------------------------------------------------------------------------------------------------

struct Tile {  // rows of y from `row` on, of which those before `end` are the group's; columns from `column` on
    int group, row, end, column;
    int first, last;  // what is summed over
    int to_place;     // from a row to its place
};
#if FORM == 2
// A block's tiles, one after the other.
struct Walk {
    int at;
    __device__ __forceinline__ Walk(const Arguments&) : at(blockIdx.x) {}
    __device__ __forceinline__ bool next(const Arguments& a, Tile& tile) {
        const int across = (a.n + OUT - 1) / OUT, down = (a.size + ROWS - 1) / ROWS;
        tile.group = at / (down * across);
        if (tile.group >= a.n_groups) return false;
        const int here = at % (down * across);
        tile.row = here % down * ROWS, tile.end = a.size, tile.column = here / down * OUT;
        tile.first = tile.group ? a.ends[tile.group - 1] : 0, tile.last = a.ends[tile.group];
        at += gridDim.x;
        return true;
    }
};
#else
// The same. Of a group first all rows of the same columns, so that W is read soon again.
struct Walk {
    int at, group, begin, end, before;
    __device__ __forceinline__ Walk(const Arguments& a) : at(blockIdx.x), group(0), begin(0), end(a.ends[0]), before(0) {}
    __device__ __forceinline__ bool next(const Arguments& a, Tile& tile) {
        const int across = (a.n + OUT - 1) / OUT;
        for (;;) {
            const int down = (end - begin + ROWS - 1) / ROWS, here = at - before;
            if (here < down * across) {
                tile.group = group;
                tile.row = begin + here % down * ROWS, tile.end = end, tile.column = here / down * OUT;
                tile.first = 0, tile.last = a.size;
                tile.to_place = PLACES ? group * a.places - begin : 0;
                at += gridDim.x;
                return true;
            }
            before += down * across;
            if (++group == a.n_groups) return false;
            begin = end;
            end = a.ends[group] + (PLACES ? begin : 0);
        }
    }
};
#endif

struct Place {  // in the ring of parts
    int at = 0;
    u32 turn = 0;
    __device__ __forceinline__ void next() {
        if (++at == DEPTH) at = 0, turn ^= 1;
    }
};

// The part of w.
__device__ __forceinline__ void fetch_w(const Arguments& a, const Tile& tile, int at, u16* w, u64& full) {
#if FORM == 2
    fetch_columns<WIDE>(w, a.w, tile.column, at, full);
#elif APART
    fetch_columns_of<WIDE>(w, a.w, tile.column, at, tile.group, full);
#elif FORM == 1
    fetch_columns<WIDE>(w, a.w, tile.column, tile.group * a.size + at, full);
#elif MODE == 1  // first g's, then u's, a.n further down
    fetch(w, a.w, at, tile.group * 2 * a.n + tile.column, full);
    fetch(w + HALF * DEEP, a.w, at, tile.group * 2 * a.n + a.n + tile.column, full);
#else
    fetch(w, a.w, at, tile.group * a.n + tile.column, full);
#endif
}

__device__ __forceinline__ void produce(const Arguments& a, Shared& shared) {
    if (threadIdx.x != CONSUMERS * 128) return;
    Walk walk(a);
    Tile tile;
    Place place;
    while (walk.next(a, tile)) {
        for (int at = tile.first; at < tile.last; at += DEEP) {
            u64& full = shared.full[place.at];
            u16* const x = shared.x[place.at];
            wait(shared.empty[place.at], place.turn ^ 1);
            expect(full, (ROWS + WIDE) * DEEP * 2);
#if FORM == 2
            fetch_columns<ROWS>(x, a.x, tile.row, at, full);
#else
            fetch(x, a.x, at, MODE == 1 ? tile.row + tile.to_place : tile.row, full);
#endif
            fetch_w(a, tile, at, shared.w[place.at], full);
            place.next();
        }
    }
}

// act(g) u of two numbers. Two reciprocals are one, of their product, as there are few units for them; what is below 2^-60
// counts as that, so that the product is finite.
__device__ __forceinline__ void activate(const float* g, const float* u, float* y) {
#if GELU
    for (int i = 0; i < 2; i++) y[i] = 0.5f * g[i] * (1.f + erff(g[i] * 0.7071067811865476f)) * u[i];
#else
    const float a = 1.f + exp2_fast(fminf(g[0] * -LOG2E, 60.f)), b = 1.f + exp2_fast(fminf(g[1] * -LOG2E, 60.f));
    const float r = reciprocal(a * b);
    y[0] = g[0] * u[0] * (r * b), y[1] = g[1] * u[1] * (r * a);
#endif
}

#if ADD
__device__ __forceinline__ void add_four(float* to, float a, float b, float c, float d) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
// The same, added to float32. Two threads have 8 columns that lie side by side, twice: 32 bytes that meet.
__device__ __forceinline__ void add(float* row, int column, int columns, bool inside, const u32* v) {
    const int k = threadIdx.x & 3;
    const bool odd = k & 1;
    column += (odd ? 8 : 0) + (k >> 1) * 4;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 other = __shfl_xor_sync(FULL, odd ? v[i] : v[i + 1], 1);
        const u32 first = odd ? other : v[i], second = odd ? v[i + 1] : other;
        const int at = column + i * 8;
        if (inside && at < columns) add_four(row + at, low(first), high(first), low(second), high(second));
    }
}
#endif

// The sums of a tile that is done, in bfloat16: they are finished while the next tile is multiplied, a task after every few of
// its parts.
struct Done {
    u32 sums[2][WIDE / 8];  // of the thread's two rows, 8 apart, two of each 8 columns
    int to[2], column;      // rows of y; none before the first tile
    enum { TASKS = OUT / 32 * 2 };  // 32 columns of a row each

    __device__ __forceinline__ void take(const float (&d)[WIDE / 2], const Tile& tile, const float* scale) {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int j = 0; j < WIDE / 8; j++)
                sums[half][j] = narrow(d[j * 4 + half * 2] * scale[half], d[j * 4 + half * 2 + 1] * scale[half]);
        column = tile.column;
    }
    __device__ __forceinline__ void finish(const Arguments& a, int task) {
        const int half = task % 2, first = task / 2 * 4;
        const bool inside = to[half] >= 0;
        const i64 row = inside ? to[half] : 0;
        const int at = column + first * 8;
#if MODE == 1
        u32 g[4], u[4], y[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            g[i] = sums[half][first + i], u[i] = sums[half][first + i + HALF / 8];
            const float gs[2] = {low(g[i]), high(g[i])}, us[2] = {low(u[i]), high(u[i])};
            float ys[2];
            activate(gs, us, ys);
            y[i] = narrow(ys[0], ys[1]);
        }
        write(a.y + row * a.n, at, a.n, inside, y);
#if KEEP
        write(a.h + row * 2 * a.n, at, a.n, inside, g);
        write(a.h + row * 2 * a.n + a.n, at, a.n, inside, u);
#endif
#elif ADD
        add(reinterpret_cast<float*>(a.y) + row * a.n, at, a.n, inside, sums[half] + first);
#else
        write(a.y + row * a.n, at, a.n, inside, sums[half] + first);
#endif
    }
};

#if FORM == 2
// Rows of the next group that came with the last of this one count as 0: in a warpgroup's own part of x, and in w, where
// both warpgroups write the same.
__device__ __forceinline__ void clear_rows(u16* x, u16* w, int from, int warpgroup) {
    for (int at = from * DEEP + (threadIdx.x & 127) * 8; at < DEEP * DEEP; at += 128 * 8) {
        const uint4 zeros = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(x + at) = zeros;
#pragma unroll
        for (int box = 0; box < WIDE / DEEP; box++) *reinterpret_cast<uint4*>(w + box * DEEP * DEEP + at) = zeros;
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}
#endif

__device__ __forceinline__ void consume(const Arguments& a, Shared& shared, int warpgroup) {
    Walk walk(a);
    Tile tile;
    Place place;
    Done done;
    done.to[0] = done.to[1] = -1, done.column = 0;
    const bool first_lane = (threadIdx.x & 31) == 0;
    while (walk.next(a, tile)) {
        const bool any = tile.row + warpgroup * 64 < tile.end;
        float d[WIDE / 2], scale[2] = {1.f, 1.f};
        int to[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = tile.row + warpgroup * 64 + (threadIdx.x >> 5 & 3) * 16 + (threadIdx.x >> 2 & 7) + half * 8;
            to[half] = row >= tile.end ? -1 : FORM == 2 ? tile.group * a.size + row : row;
#if MODE == 2
            const int place = row + tile.to_place;
            if (to[half] >= 0) to[half] = a.order[place];
#if HAS_GATE
            if (to[half] >= 0) scale[half] = a.gate[PLACES ? place : to[half]];
#endif
#endif
        }
#if FORM == 2
        if (tile.first == tile.last)
            for (int i = 0; i < WIDE / 2; i++) d[i] = 0.f;
#endif
        int at = tile.first, before = -1;
        const auto start = [&] {
            wait(shared.full[place.at], place.turn);
            if (!any) return;
            u16* const part = shared.x[place.at] + warpgroup * 64 * DEEP;
            const u64 x = described(part), w = described(shared.w[place.at]);
#if FORM == 2
            if (tile.last - at < DEEP) clear_rows(part, shared.w[place.at], tile.last - at, warpgroup);
#endif
            begin_products();
#pragma unroll
            for (int k = 0; k < DEEP / 16; k++) multiply(d, x + k * X_STEP, w + k * W_STEP, at > tile.first || k > 0);
            end_products();
        };
        const auto leave = [&] {  // the part before, which is multiplied by now
            wait_products<1>();
            if (before >= 0 && first_lane) arrive(shared.empty[before]);
            before = place.at;
            place.next();
            at += DEEP;
        };
        const int apart = max(1, (tile.last - tile.first) / DEEP / Done::TASKS);
#pragma unroll
        for (int task = 0; task < Done::TASKS; task++) {
            const bool more = at < tile.last;
            if (more) start();
            done.finish(a, task);
            if (more) leave();
            for (int i = 1; i < apart; i++) {
                start();
                leave();
            }
        }
        while (at < tile.last) {
            start();
            leave();
        }
        wait_products<0>();
        if (before >= 0 && first_lane) arrive(shared.empty[before]);
        done.take(d, tile, scale);
        done.to[0] = to[0], done.to[1] = to[1];
    }
#pragma unroll
    for (int task = 0; task < Done::TASKS; task++) done.finish(a, task);
}

extern __shared__ char memory[];

extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped_product(const __grid_constant__ Arguments a) {
    static_assert(sizeof(Shared) + 1024 == SHARED, "hopper.py counts another size");
    Shared& shared = *reinterpret_cast<Shared*>(memory + (1024 - address_of(memory) % 1024) % 1024);
    if (threadIdx.x == 0) {
        for (int i = 0; i < DEPTH; i++) {
            make_barrier(shared.full[i], 1);
            make_barrier(shared.empty[i], CONSUMERS * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int warpgroup = threadIdx.x / 128;
    if (warpgroup == CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        produce(a, shared);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume(a, shared, warpgroup);
    }
}
