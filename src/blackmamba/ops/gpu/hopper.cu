// What NVIDIA's Hopper alone has: barriers in shared memory that count bytes, copies of boxes (TMA), products by warpgroups.
// Kernels' text follows this and numbers.cu.

#define BOX 64  // numbers of a row of what is copied at once: 128 bytes, which is how shared memory is swizzled
#define FULL 0xffffffffu

typedef unsigned long long u64;

struct alignas(64) Map {  // how TMA finds its way in a matrix
    u64 words[16];
};

__device__ __forceinline__ u32 address_of(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- barriers in shared memory: `full` when the bytes have come, `empty` when all have read them -----------------

__device__ __forceinline__ void make_barrier(u64& barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(&barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void expect(u64& barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(&barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        " @done bra.uni end;\n bra.uni again;\n"
        "end:\n}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void wait(u64& barrier, u32 parity) { wait(address_of(&barrier), parity); }
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive(u64& barrier) { arrive(address_of(&barrier)); }
// Once all that this thread copies (cp.async) has come.
__device__ __forceinline__ void arrive_with_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// ---- TMA: a box of a matrix, BOX numbers of as many rows as its map says; what is outside of the matrix is 0 -------

__device__ __forceinline__ void fetch(u16* to, const Map& map, int at, int row, u64& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            address_of(to)),
        "l"(&map), "r"(at), "r"(row), "r"(address_of(&barrier)) : "memory");
}
// The same of one of several matrices.
__device__ __forceinline__ void fetch(u16* to, const Map& map, int at, int row, int of, u64& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
            address_of(to)),
        "l"(&map), "r"(at), "r"(row), "r"(of), "r"(address_of(&barrier)) : "memory");
}
// The other way, what lies inside of the matrix; by the thread that at last waits until all it asked for has been read.
__device__ __forceinline__ void send(const u16* from, const Map& map, int at, int row, int of) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&map), "r"(at), "r"(row),
        "r"(of), "r"(address_of(from)) : "memory");
}
__device__ __forceinline__ void wait_sent() {
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// ---- the matrix units: lists of registers and of their numbers, and the instruction. What follows has to define TURNED: "0, 0",
// or 1 for a matrix whose numbers that are summed over lie a row apart.

// Where a matrix begins in shared memory, that it is swizzled, and how far apart its parts are: 8 rows of 128 bytes, and
// boxes, where columns lie side by side.
__device__ __forceinline__ u64 described(const u16* p) {
    return (u64)((address_of(p) & 0x3ffff) >> 4) | (u64)(BOX * 128 >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

#define R8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define R32(i) R8(i), R8(i + 8), R8(i + 16), R8(i + 24)
#define N0 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" \
    ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define N1 \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
    ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define N2 \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
    ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define N3 \
    ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
    ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define PRODUCT(...) PRODUCT_OF(__VA_ARGS__)
#define PRODUCT_OF(size, numbers, matrices, add)                                         \
    "{\n.reg .pred add;\nsetp.ne.b32 add, " add ", 0;\n"                                 \
    "wgmma.mma_async.sync.aligned.m64" size ".f32.bf16.bf16 {" numbers "}, " matrices ", add, 1, 1, " TURNED ";\n}"

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// 32 columns of a row, which 4 threads have: of v[i], 8 columns, the k-th of them those 2 k and 2 k + 1. Each writes 8.
__device__ __forceinline__ void write(u16* row, int column, int columns, bool inside, u32* v) {
    const int k = threadIdx.x & 3;
    // v[i] of thread k becomes v[k] of thread i: pairs change places, then pairs of pairs
    const bool odd = k & 1, high = k & 2;
    u32 s0 = __shfl_xor_sync(FULL, odd ? v[0] : v[1], 1), s1 = __shfl_xor_sync(FULL, odd ? v[2] : v[3], 1);
    if (odd) v[0] = s0, v[2] = s1;
    else v[1] = s0, v[3] = s1;
    s0 = __shfl_xor_sync(FULL, high ? v[0] : v[2], 2), s1 = __shfl_xor_sync(FULL, high ? v[1] : v[3], 2);
    if (high) v[0] = s0, v[1] = s1;
    else v[2] = s0, v[3] = s1;
    column += k * 8;
    if (inside && column < columns) *reinterpret_cast<uint4*>(row + column) = make_uint4(v[0], v[1], v[2], v[3]);
}
