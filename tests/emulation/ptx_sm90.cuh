// Stands in for cuda/ptx_sm90.cuh: the same functions without assembly. Kept: phases and transaction counts of
// barriers, boxes, zero fill and swizzles of TMA, ranks in shared addresses, fragment layouts of ldmatrix. Copies come at
// random times. Not modelled: memory ordering.
#pragma once
#include <cstdint>
#include "hopper.h"
#include "ptx_wgmma.cuh"

/// In place of the driver's encoding; filled by the tests.
struct alignas(64) TensorMap {
    uint8_t* data;
    int64_t sizes[3];    // elements, the fastest dimension first
    int64_t strides[3];  // bytes
    int32_t box[3];
    int32_t element_bytes;
    int32_t swizzle_bytes;
    int32_t unused[13];
};
static_assert(sizeof(TensorMap) == 128);

// ------------------------------------------------------------------------------------------ shared memory

inline uint32_t shared_start() { return emulation::cta_rank() << 24 | 1024; }
/// A plain access reaches the thread's own CTA alone.
inline uint8_t* own_shared(uint32_t address, int bytes) {
    if (address >> 24 != emulation::cta_rank()) emulation::fail("a shared address of another CTA");
    if (address % uint32_t(bytes)) emulation::fail("a misaligned shared address");
    return emulation::shared_at(address, bytes);
}
template <typename V>
V read_shared(uint32_t address) {
    V v;
    std::memcpy(&v, own_shared(address, sizeof v), sizeof v);
    return v;
}
template <typename V>
void write_shared(uint32_t address, V v) {
    std::memcpy(own_shared(address, sizeof v), &v, sizeof v);
}
inline uint32_t at_rank(uint32_t address, int rank) { return uint32_t(rank) << 24 | (address & 0xffffff); }
template <int kOffset = 0>
uint32_t load_shared_4(uint32_t address) {
    return read_shared<uint32_t>(address + kOffset);
}
template <int kOffset = 0>
uint2 load_shared_8(uint32_t address) {
    return read_shared<uint2>(address + kOffset);
}
template <int kOffset = 0>
uint4 load_shared_16(uint32_t address) {
    return read_shared<uint4>(address + kOffset);
}
inline uint32_t load_shared_1(uint32_t address) { return read_shared<uint8_t>(address); }
inline uint32_t load_shared_2(uint32_t address) { return read_shared<uint16_t>(address); }
template <int kOffset = 0>
void store_shared_4(uint32_t address, uint32_t v) {
    write_shared(address + kOffset, v);
}
inline void store_shared_8(uint32_t address, uint2 v) { write_shared(address, v); }
inline void store_shared_16(uint32_t address, uint4 v) { write_shared(address, v); }
inline uint4 load_remote_16(uint32_t address, int rank) {
    emulation::delay();
    uint4 v;
    std::memcpy(&v, emulation::shared_at(at_rank(address, rank), 16), 16);
    return v;
}
inline void store_remote_16(uint32_t address, uint32_t barrier, int rank, uint4 v) {
    const uint32_t to = at_rank(address, rank), at = at_rank(barrier, rank);
    const auto run = [=] {
        std::memcpy(emulation::shared_at(to, 16), &v, 16);
        emulation::barrier_complete(at, 16);
    };
    emulation::shared_at(to, 16);  // the other CTA has started
    emulation::copy_later(run, false);
}
inline void store_turned(uint32_t address, const uint32_t (&pairs)[4]) {
    uint64_t addresses[32];
    std::memcpy(addresses, emulation::exchange(address), sizeof addresses);
    const int lane = int(threadIdx.x % 32);
    for (int matrix = 0; matrix < 4; ++matrix)
        for (int i = 0; i < 2; ++i)
            write_shared(uint32_t(addresses[8 * matrix + 2 * (lane % 4) + i]) + uint32_t(2 * (lane / 4)),
                         uint16_t(pairs[matrix] >> 16 * i));
    __syncwarp();
}

// ------------------------------------------------------------------------------------- barriers, clusters

inline void barrier_init(uint32_t barrier, int arrivals) { emulation::barrier_init(barrier, arrivals); }
inline void fence_barrier_init() {}
inline void barrier_arrive(uint32_t barrier) {
    emulation::barrier_arrive(barrier, 0);
    emulation::delay();
}
inline void barrier_arrive_cluster(uint32_t barrier, int rank) { barrier_arrive(at_rank(barrier, rank)); }
inline void barrier_arrive_remote(uint32_t barrier, int rank) { barrier_arrive(at_rank(barrier, rank)); }
inline void barrier_expect(uint32_t barrier, int num_bytes) { emulation::barrier_arrive(barrier, num_bytes); }
inline bool barrier_try_wait(uint32_t barrier, uint32_t parity) {
    emulation::delay();
    return emulation::barrier_is_done(barrier, parity);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulation::barrier_wait(barrier, parity); }
inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
    emulation::barrier_wait(barrier, parity);
}
inline void named_barrier(int id, int num_threads) { emulation::named_barrier_arrive(id, num_threads, true); }
inline void named_barrier_arrive(int id, int num_threads) {
    emulation::named_barrier_arrive(id, num_threads, false);
    emulation::delay();
}
inline int cluster_rank() { return int(emulation::cta_rank()); }
inline int cluster_size() { return emulation::cluster_size(); }
inline void cluster_arrive_relaxed() {
    emulation::cluster_arrive();
    emulation::delay();
}
inline void cluster_wait() { emulation::cluster_wait(); }
inline void cluster_sync() {
    emulation::cluster_arrive();
    emulation::cluster_wait();
}

// ---------------------------------------------------------------------------------------------------- TMA

inline void tma_load(uint32_t dst, const TensorMap* map, int column, int row, int plane, uint32_t barrier) {
    if (dst % 128 || swizzled(dst, map->swizzle_bytes) != dst) emulation::fail("TMA to a misaligned address");
    const int bytes = map->element_bytes;
    if (map->box[0] * bytes % 16) emulation::fail("TMA of rows that are no multiple of 16 bytes");
    const auto run = [=] {
        uint32_t to = dst;
        const int per_piece = 16 / bytes;
        for (int64_t z = plane; z < plane + map->box[2]; ++z)
            for (int64_t y = row; y < row + map->box[1]; ++y)
                for (int64_t x = column; x < column + map->box[0]; x += per_piece, to += 16) {
                    const bool exists = z < map->sizes[2] && y < map->sizes[1];
                    const int64_t num = exists ? std::clamp<int64_t>(map->sizes[0] - x, 0, per_piece) : 0;
                    uint8_t piece[16] = {};
                    if (num)
                        std::memcpy(piece, map->data + x * bytes + y * map->strides[1] + z * map->strides[2],
                                    size_t(num * bytes));
                    std::memcpy(emulation::shared_at(swizzled(to, map->swizzle_bytes), 16), piece, 16);
                }
        emulation::barrier_complete(barrier, map->box[0] * map->box[1] * map->box[2] * bytes);
    };
    emulation::copy_later(run, false);
}
inline void tma_load(uint32_t dst, const TensorMap* map, int column, int row, uint32_t barrier) {
    tma_load(dst, map, column, row, 0, barrier);
}
inline void tma_load_multicast(uint32_t dst, const TensorMap* map, int column, int row, int plane,
                               uint32_t barrier, uint16_t mask) {
    for (int rank = 0; rank < 16; ++rank)
        if (mask >> rank & 1) tma_load(at_rank(dst, rank), map, column, row, plane, at_rank(barrier, rank));
}
inline void tma_load_multicast(uint32_t dst, const TensorMap* map, int column, int row, uint32_t barrier,
                               uint16_t mask) {
    tma_load_multicast(dst, map, column, row, 0, barrier, mask);
}
inline void tma_store(const TensorMap* map, uint32_t src, int column, int row) {
    const int bytes = map->element_bytes;
    const auto run = [=] {
        for (int y = 0; y < map->box[1] && row + y < map->sizes[1]; ++y)
            for (int x = 0; x < map->box[0] && column + x < map->sizes[0]; ++x) {
                const uint32_t from = src + uint32_t((y * map->box[0] + x) * bytes);
                std::memcpy(map->data + (column + x) * bytes + (row + y) * map->strides[1],
                            emulation::shared_at(swizzled(from, map->swizzle_bytes), bytes), size_t(bytes));
            }
    };
    emulation::copy_later(run, true);
}
inline void prefetch_map(const TensorMap*) {}
inline void tma_store_wait_read() { emulation::await_stores(); }
inline void tma_store_wait() { emulation::await_stores(); }
inline void fence_async_proxy() {}
inline void dependency_launch() {}
template <int kRegisters>
void raise_registers() {}
template <int kRegisters>
void lower_registers() {}
