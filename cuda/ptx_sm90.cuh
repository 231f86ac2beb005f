// Instructions of sm_90a that C++ has no word for: mbarriers, TMA, clusters, wgmma. What ptx.cuh is for all
// targets. Shared memory is addressed by 32-bit addresses; their top byte is the rank of the CTA in its
// cluster.
#pragma once
#include <cstdint>
#include <type_traits>
#include "dtype.cuh"

/// A CUtensorMap, encoded by the driver and passed by value in the arguments.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

// ------------------------------------------------------------------------------------------ shared memory

/// Start of the dynamic shared memory: 1024 on sm_90, behind a KB of the system's.
__device__ __forceinline__ uint32_t shared_start() {
    extern __shared__ __align__(1024) uint8_t aligned_memory[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(aligned_memory));
}
/// The offset becomes part of the instruction.
template <int kOffset = 0>
__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(address), "n"(kOffset));
    return v;
}
template <int kOffset = 0>
__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + %3];" : "=r"(v.x), "=r"(v.y) : "r"(address), "n"(kOffset));
    return v;
}
template <int kOffset = 0>
__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address), "n"(kOffset));
    return v;
}
__device__ __forceinline__ uint32_t load_shared_1(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ uint32_t load_shared_2(uint32_t address) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}
template <int kOffset = 0>
__device__ __forceinline__ void store_shared_4(uint32_t address, uint32_t v) {
    asm volatile("st.shared.u32 [%0 + %2], %1;" ::"r"(address), "r"(v), "n"(kOffset) : "memory");
}
__device__ __forceinline__ void store_shared_8(uint32_t address, uint2 v) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store_shared_16(uint32_t address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}
/// Sixteen bytes at the same place in the shared memory of CTA `rank` of the cluster.
__device__ __forceinline__ uint4 load_remote_16(uint32_t address, int rank) {
    uint4 v;
    asm volatile(
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %4, %5; ld.shared::cluster.v4.u32 {%0, %1, %2, "
        "%3}, [remote]; }"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "r"(address), "r"(rank)
        : "memory");
    return v;
}
/// Sixteen bytes to the same place in the shared memory of CTA `rank` of the cluster, where the barrier counts them
/// when they are there: no fence, which would wait for all that the thread has written.
__device__ __forceinline__ void store_remote_16(uint32_t address, uint32_t barrier, int rank, uint4 v) {
    asm volatile(
        "{ .reg .b32 to, at; mapa.shared::cluster.u32 to, %0, %2; mapa.shared::cluster.u32 at, %1, %2; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, [at]; }" ::"r"(
            address),
        "r"(barrier), "r"(rank), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
        : "memory");
}
/// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8 and gets word l % 4
/// of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address));
}
/// Four 8 x 8 matrices of 16-bit elements, turned: lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_turned(uint32_t address, const uint32_t (&pairs)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                 : "memory");
}

// ----------------------------------------------------------------------------------------------- barriers

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// At the barrier of the CTA of that rank; orders this thread's writes before the arrival for the whole cluster.
__device__ __forceinline__ void barrier_arrive_cluster(uint32_t barrier, int rank) {
    asm volatile(
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
        "r"(rank)
        : "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes)
                 : "memory");
}
__device__ __forceinline__ bool barrier_try_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.shared.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done;
}
/// QBITS_MAX_WAITS bounds the tries in debug builds: a trap in place of a hang.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef QBITS_MAX_WAITS
    for (int i = 0; !barrier_try_wait(barrier, parity); ++i)
        if (i > QBITS_MAX_WAITS) __trap();
#else
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @!done bra again; }" ::
            "r"(barrier),
        "r"(parity)
        : "memory");
#endif
}
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1; "
        "@!done bra again; }" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void named_barrier(int id, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}
/// Counts this warp's threads without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int num_threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// ----------------------------------------------------------------------------------------------- clusters

__device__ __forceinline__ int cluster_rank() {
    uint32_t v;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
    return int(v);
}
__device__ __forceinline__ int cluster_size() {
    uint32_t v;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(v));
    return int(v);
}
/// All threads of all CTAs of the cluster; what they wrote before is seen by all behind it. The release is a fence
/// of the whole GPU: where no data is handed over, the two halves below do without.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---------------------------------------------------------------------------------------------------- TMA

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t dst, const TensorMap* map, int column, int row,
                                         uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
        "%3}], [%4];" ::"r"(dst),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t dst, const TensorMap* map, int column, int row, int plane,
                                         uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
        "%3, %4}], [%5];" ::"r"(dst),
        "l"(map), "r"(column), "r"(row), "r"(plane), "r"(barrier)
        : "memory");
}
/// To the same place of every CTA whose bit is set in the mask; each one's barrier gets the bytes.
__device__ __forceinline__ void tma_load_multicast(uint32_t dst, const TensorMap* map, int column, int row,
                                                   uint32_t barrier, uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask)
        : "memory");
}
__device__ __forceinline__ void tma_load_multicast(uint32_t dst, const TensorMap* map, int column, int row,
                                                   int plane, uint32_t barrier, uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(dst),
        "l"(map), "r"(column), "r"(row), "r"(plane), "r"(barrier), "h"(mask)
        : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t src, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
        "r"(column), "r"(row), "r"(src)
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/// Until the stores of this thread have read their shared memory, or are done.
__device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
/// Orders this thread's writes to shared memory before what TMA and wgmma do behind the next barrier.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ----------------------------------------------------------------------------------- dependent launch, registers

/// From here the next kernel may be launched.
__device__ __forceinline__ void dependency_launch() { asm volatile("griddepcontrol.launch_dependents;"); }
/// The sum over the warpgroups must fit the registers that the CTA had at launch, or the raise waits for ever.
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// -------------------------------------------------------------------------------------------------- wgmma

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving the computation of a fragment below the fence that precedes its wgmma, or
/// the use of an accumulator above the wait that completes it: it knows of no dependence.
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&a)[kCount]) {
    #pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(float (&a)[kCount]) {
    #pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(a[i])::"memory");
}
/// The same value, but one that the compiler keeps in a register in place of computing it again. For whole
/// warps.
__device__ __forceinline__ uint32_t opaque(uint32_t v) { return __shfl_sync(~0u, v, threadIdx.x % 32); }

/// Descriptor of a K-major operand in shared memory under the 128 B swizzle: 8 rows are 1024 bytes apart. One
/// k16 step adds 2.
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

#define QBITS_ACC8(i)                                                                                       \
    "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
        "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define QBITS_ACC16(i) QBITS_ACC8(i), QBITS_ACC8(i + 8)
#define QBITS_ACC32(i) QBITS_ACC16(i), QBITS_ACC16(i + 16)
#define QBITS_NAMES8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define QBITS_NAMES16 QBITS_NAMES8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define QBITS_NAMES32 QBITS_NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QBITS_NAMES64                                                                                       \
    QBITS_NAMES32                                                                                           \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
    "%57,%58,%59,%60,%61,%62,%63"
#define QBITS_NAMES96                                                                                       \
    QBITS_NAMES64                                                                                           \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88," \
    "%89,%90,%91,%92,%93,%94,%95"
#define QBITS_NAMES128                                                                                       \
    QBITS_NAMES96                                                                                            \
    ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116," \
    "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define QBITS_WGMMA(shape, type, keep, names, inputs, ...)                                           \
    asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names "}, " inputs \
                 ", " keep ", 1, 1, 0;"                                                              \
                 : __VA_ARGS__                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define QBITS_WGMMA_TYPES(shape, names, inputs, ...)                 \
    if constexpr (std::is_same_v<T, float16> && kAdd)                \
        QBITS_WGMMA(shape, "f16", "1", names, inputs, __VA_ARGS__);  \
    else if constexpr (std::is_same_v<T, float16>)                   \
        QBITS_WGMMA(shape, "f16", "0", names, inputs, __VA_ARGS__);  \
    else if constexpr (kAdd)                                         \
        QBITS_WGMMA(shape, "bf16", "1", names, inputs, __VA_ARGS__); \
    else                                                             \
        QBITS_WGMMA(shape, "bf16", "0", names, inputs, __VA_ARGS__)

/// acc[64 rows, kTokens] += a[64 rows, 16] b[kTokens, 16]^T, without kAdd = in place of +=; kTokens / 2
/// accumulators per thread.
template <typename T, int kTokens, bool kAdd = true>
__device__ __forceinline__ void wgmma_k16(float (&acc)[kTokens / 2], const uint32_t* a, uint64_t b) {
    if constexpr (kTokens == 16) {
        QBITS_WGMMA_TYPES("m64n16k16", QBITS_NAMES8, "{%8,%9,%10,%11}, %12", QBITS_ACC8(0));
    } else if constexpr (kTokens == 32) {
        QBITS_WGMMA_TYPES("m64n32k16", QBITS_NAMES16, "{%16,%17,%18,%19}, %20", QBITS_ACC16(0));
    } else if constexpr (kTokens == 64) {
        QBITS_WGMMA_TYPES("m64n64k16", QBITS_NAMES32, "{%32,%33,%34,%35}, %36", QBITS_ACC32(0));
    } else if constexpr (kTokens == 128) {
        QBITS_WGMMA_TYPES("m64n128k16", QBITS_NAMES64, "{%64,%65,%66,%67}, %68", QBITS_ACC32(0),
                          QBITS_ACC32(32));
    } else {
        static_assert(kTokens == 256, "wgmma is written out for 16, 32, 64, 128 and 256 tokens");
        QBITS_WGMMA_TYPES("m64n256k16", QBITS_NAMES128, "{%128,%129,%130,%131}, %132", QBITS_ACC32(0),
                          QBITS_ACC32(32), QBITS_ACC32(64), QBITS_ACC32(96));
    }
}

#define QBITS_WGMMA_SHARED(shape, type, names, a_name, b_name, ...)                                  \
    asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names "}, " a_name \
                 ", " b_name ", 1, 1, 1, 0, 0;"                                                      \
                 : __VA_ARGS__                                                                       \
                 : "l"(a), "l"(b))
#define QBITS_WGMMA_SHARED_TYPES(shape, names, a_name, b_name, ...)           \
    if constexpr (std::is_same_v<T, float16>)                                 \
        QBITS_WGMMA_SHARED(shape, "f16", names, a_name, b_name, __VA_ARGS__); \
    else                                                                      \
        QBITS_WGMMA_SHARED(shape, "bf16", names, a_name, b_name, __VA_ARGS__)

/// acc[64 rows, kTokens] += a[64 rows, 16] b[kTokens, 16]^T, both operands by descriptors.
template <typename T, int kTokens>
__device__ __forceinline__ void wgmma_k16_shared(float (&acc)[kTokens / 2], uint64_t a, uint64_t b) {
    if constexpr (kTokens == 128) {
        QBITS_WGMMA_SHARED_TYPES("m64n128k16", QBITS_NAMES64, "%64", "%65", QBITS_ACC32(0), QBITS_ACC32(32));
    } else if constexpr (kTokens == 192) {
        QBITS_WGMMA_SHARED_TYPES("m64n192k16", QBITS_NAMES96, "%96", "%97", QBITS_ACC32(0), QBITS_ACC32(32),
                                 QBITS_ACC32(64));
    } else {
        static_assert(kTokens == 256, "wgmma is written out for 128, 192 and 256 tokens");
        QBITS_WGMMA_SHARED_TYPES("m64n256k16", QBITS_NAMES128, "%128", "%129", QBITS_ACC32(0),
                                 QBITS_ACC32(32), QBITS_ACC32(64), QBITS_ACC32(96));
    }
}
#undef QBITS_WGMMA_SHARED
#undef QBITS_WGMMA_SHARED_TYPES
#undef QBITS_NAMES96
#undef QBITS_ACC8
#undef QBITS_ACC16
#undef QBITS_ACC32
#undef QBITS_NAMES8
#undef QBITS_NAMES16
#undef QBITS_NAMES32
#undef QBITS_NAMES64
#undef QBITS_NAMES128
#undef QBITS_WGMMA
#undef QBITS_WGMMA_TYPES
