// Instructions of sm_90a that C++ has no word for: mbarriers, TMA, clusters; wgmma is in ptx_wgmma.cuh. What ptx.cuh is
// for all targets. Shared memory is addressed by 32-bit addresses; their top byte is the rank of the CTA in its
// cluster.
#pragma once
#include <cstdint>
#include "ptx_wgmma.cuh"

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
/// At the barrier of the CTA of that rank, ordering no memory: it says that reads are done.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier, int rank) {
    asm volatile(
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
        "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
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
