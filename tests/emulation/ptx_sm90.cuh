// Stands in for cuda/ptx_sm90.cuh: the same functions without assembly. Kept: phases and transaction counts of
// barriers, boxes, zero fill and swizzles of TMA, ranks in shared addresses, fragment layouts of wgmma and ldmatrix.
// Not modelled: the asynchrony of wgmma, memory ordering.
#pragma once
#include <cstdint>
#include <type_traits>
#include "dtype.cuh"
#include "hopper.h"

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
inline uint32_t load_shared_2(uint32_t address) { return read_shared<uint16_t>(address); }
template <int kOffset = 0>
void store_shared_4(uint32_t address, uint32_t v) {
    write_shared(address + kOffset, v);
}
inline void store_shared_8(uint32_t address, uint2 v) { write_shared(address, v); }
inline void store_shared_16(uint32_t address, uint4 v) { write_shared(address, v); }
inline uint4 load_remote_16(uint32_t address, int rank) {
    uint4 v;
    std::memcpy(&v, emulation::shared_at(at_rank(address, rank), 16), 16);
    return v;
}
inline void load_matrices(uint32_t (&words)[4], uint32_t address) {
    const uint64_t* const addresses = emulation::exchange(address);
    const int lane = int(threadIdx.x % 32);
    for (int i = 0; i < 4; ++i)
        words[i] = read_shared<uint32_t>(uint32_t(addresses[8 * i + lane / 4]) + uint32_t(4 * (lane % 4)));
    __syncwarp();
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
inline void barrier_arrive(uint32_t barrier) { emulation::barrier_arrive(barrier, 0); }
inline void barrier_arrive_cluster(uint32_t barrier, int rank) {
    emulation::barrier_arrive(at_rank(barrier, rank), 0);
}
inline void barrier_expect(uint32_t barrier, int num_bytes) { emulation::barrier_arrive(barrier, num_bytes); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulation::barrier_wait(barrier, parity); }
inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
    emulation::barrier_wait(barrier, parity);
}
inline void named_barrier(int id, int num_threads) { emulation::named_barrier(id, num_threads); }
inline void named_barrier_arrive(int id, int num_threads) {
    emulation::named_barrier_arrive(id, num_threads);
}
inline int cluster_rank() { return int(emulation::cta_rank()); }
inline int cluster_size() { return emulation::cluster_size(); }
inline void cluster_arrive_relaxed() { emulation::cluster_arrive(); }
inline void cluster_wait() { emulation::cluster_wait(); }
inline void cluster_sync() {
    emulation::cluster_arrive();
    emulation::cluster_wait();
}

// ---------------------------------------------------------------------------------------------------- TMA

inline uint32_t swizzled(uint32_t address, int width) {
    return address ^ ((address >> 7 & uint32_t(width / 16 - 1)) << 4);
}
inline void tma_load(uint32_t dst, const TensorMap* map, int column, int row, int plane, uint32_t barrier) {
    if (dst % 128) emulation::fail("TMA to a misaligned address");
    emulation::delay();
    const int bytes = map->element_bytes;
    uint32_t to = dst;
    for (int64_t z = plane; z < plane + map->box[2]; ++z)
        for (int64_t y = row; y < row + map->box[1]; ++y)
            for (int64_t x = column; x < column + map->box[0]; ++x, to += uint32_t(bytes)) {
                uint8_t* const p = emulation::shared_at(swizzled(to, map->swizzle_bytes), bytes);
                if (x < map->sizes[0] && y < map->sizes[1] && z < map->sizes[2])
                    std::memcpy(p, map->data + x * bytes + y * map->strides[1] + z * map->strides[2],
                                size_t(bytes));
                else
                    std::memset(p, 0, size_t(bytes));
            }
    emulation::barrier_complete(barrier, map->box[0] * map->box[1] * map->box[2] * bytes);
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
    for (int y = 0; y < map->box[1] && row + y < map->sizes[1]; ++y)
        for (int x = 0; x < map->box[0] && column + x < map->sizes[0]; ++x) {
            const uint32_t from = src + uint32_t((y * map->box[0] + x) * bytes);
            std::memcpy(map->data + (column + x) * bytes + (row + y) * map->strides[1],
                        emulation::shared_at(swizzled(from, map->swizzle_bytes), bytes), size_t(bytes));
        }
}
inline void prefetch_map(const TensorMap*) {}
inline void tma_store_wait_read() {}
inline void tma_store_wait() {}
inline void fence_async_proxy() {}
inline void dependency_wait() {}
inline void dependency_launch() {}
template <int kRegisters>
void raise_registers() {}
template <int kRegisters>
void lower_registers() {}

// -------------------------------------------------------------------------------------------------- wgmma

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kPending>
void wgmma_wait() {}
template <typename V, int kCount>
void pin(V (&)[kCount]) {}
inline uint32_t opaque(uint32_t v) { return v; }
inline uint64_t operand_descriptor(uint32_t address) { return (address & 0x3ffff) >> 4; }

/// Lane (g, t) holds rows g and g + 8 of a, and of the sums columns 2 t and 2 t + 1 of each 8 tokens.
template <typename T, int kTokens, bool kAdd = true>
void wgmma_k16(float (&acc)[kTokens / 2], const uint32_t* a, uint64_t b) {
    uint64_t left[2][32];
    std::memcpy(left[0], emulation::exchange(uint64_t(a[1]) << 32 | a[0]), sizeof left[0]);
    std::memcpy(left[1], emulation::exchange(uint64_t(a[3]) << 32 | a[2]), sizeof left[1]);
    const int g = int(threadIdx.x % 32 / 4), t = int(threadIdx.x % 4);
    const auto value = [](uint64_t bits) { return float(emulation::from_bits<T>(bits & 0xffff)); };
    const uint32_t start = emulation::cta_rank() << 24 | uint32_t(b & 0x3fff) << 4;
    for (int i = 0; i < kTokens / 4; ++i) {
        const uint32_t token = uint32_t(i / 2 * 8 + 2 * t + i % 2);
        float sum[2] = {};
        for (int k = 0; k < 16; ++k) {
            const uint32_t from = start + token / 8 * 1024 + token % 8 * 128 + uint32_t(2 * k);
            const float x = value(read_shared<uint16_t>(swizzled(from, 128)));
            const uint64_t words = left[k / 8][4 * g + k % 8 / 2] >> 16 * (k % 2);
            sum[0] += value(words) * x;
            sum[1] += value(words >> 32) * x;
        }
        for (int half = 0; half < 2; ++half) {
            float& to = acc[4 * (i / 2) + 2 * half + i % 2];
            to = (kAdd ? to : 0.0f) + sum[half];
        }
    }
    __syncwarp();  // the lanes of a warp are done together
}
