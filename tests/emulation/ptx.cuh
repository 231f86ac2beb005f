// Stands in for cuda/ptx.cuh: the same functions without assembly.
#pragma once
#include <cstdint>
#include "emulation.h"
#include "hopper.h"

template <typename V>
V load_streaming(const V* p) {
    return *p;
}
template <typename V>
void store_streaming(V* p, V v) {
    *p = v;
}
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return pick_bytes(a, b, selector);
}
template <typename T>
void keep_in_register(T&) {}
inline void prefetch_l2(const void*) {}
inline void wait_for_earlier_kernels() { emulation::await_earlier_work(); }

/// Of the size that the launch says, behind the KB of the system.
inline float* dynamic_shared() {
    return reinterpret_cast<float*>(emulation::shared_at(emulation::cta_rank() << 24 | 1024, 0));
}
inline uint32_t shared_address(const void* p) {
    const auto* const start = reinterpret_cast<const uint8_t*>(dynamic_shared());
    return (emulation::cta_rank() << 24) + 1024 + uint32_t(static_cast<const uint8_t*>(p) - start);
}
inline uint32_t load_shared(uint32_t address) {
    uint32_t v;
    std::memcpy(&v, emulation::shared_at(address, sizeof v), sizeof v);
    return v;
}

/// Lane (g, t) holds rows g and g + 8 of a and d, column g of b; columns 2 t and 2 t + 1 of d. Lane 0 works for all.
template <bool kBfloat16>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragments {
        float* d;
        uint32_t a[4], b[2];
    } own = {d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    const uint64_t* const all = emulation::exchange(reinterpret_cast<uint64_t>(&own));
    if (threadIdx.x % 32 == 0) {
        const auto lane = [=](int i) -> const Fragments& {
            return *reinterpret_cast<const Fragments*>(all[i]);
        };
        const auto value = [](uint32_t word, int half) {
            const uint16_t bits = uint16_t(word >> 16 * half);
            return kBfloat16 ? __bfloat162float(emulation::from_bits<__nv_bfloat16>(bits))
                             : __half2float(emulation::from_bits<__half>(bits));
        };
        float left[16][16], right[8][16];
        for (int k = 0; k < 16; ++k) {
            for (int row = 0; row < 16; ++row)
                left[row][k] = value(lane(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k % 2);
            for (int column = 0; column < 8; ++column)
                right[column][k] = value(lane(column * 4 + k % 8 / 2).b[k / 8], k % 2);
        }
        for (int i = 0; i < 32; ++i)
            for (int j = 0; j < 4; ++j)
                for (int k = 0; k < 16; ++k)
                    lane(i).d[j] += left[i / 4 + j / 2 * 8][k] * right[i % 4 * 2 + j % 2][k];
    }
    __syncwarp();
}

/// As above; columns 4 t to 4 t + 3 and 16 more of a and b are in a word each. Sums wrap around.
inline void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragments {
        int32_t* d;
        uint32_t a[4], b[2];
    } own = {d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    const uint64_t* const all = emulation::exchange(reinterpret_cast<uint64_t>(&own));
    if (threadIdx.x % 32 == 0) {
        const auto lane = [=](int i) -> const Fragments& {
            return *reinterpret_cast<const Fragments*>(all[i]);
        };
        const auto code = [](uint32_t word, int k) { return int8_t(word >> 8 * (k % 4)); };
        int8_t left[16][32], right[8][32];
        for (int k = 0; k < 32; ++k) {
            for (int row = 0; row < 16; ++row)
                left[row][k] = code(lane(row % 8 * 4 + k % 16 / 4).a[row / 8 + k / 16 * 2], k);
            for (int column = 0; column < 8; ++column)
                right[column][k] = code(lane(column * 4 + k % 16 / 4).b[k / 16], k);
        }
        for (int i = 0; i < 32; ++i)
            for (int j = 0; j < 4; ++j) {
                uint32_t sum = uint32_t(lane(i).d[j]);
                for (int k = 0; k < 32; ++k)
                    sum += uint32_t(left[i / 4 + j / 2 * 8][k] * right[i % 4 * 2 + j % 2][k]);
                lane(i).d[j] = int32_t(sum);
            }
    }
    __syncwarp();
}
inline void load_matrices(uint32_t (&words)[4], uint32_t address) {
    if (address % 16) emulation::fail("a row of a matrix at a misaligned address");
    const uint64_t* const addresses = emulation::exchange(address);
    const int lane = int(threadIdx.x % 32);
    for (int i = 0; i < 4; ++i)
        words[i] = load_shared(uint32_t(addresses[8 * i + lane / 4]) + uint32_t(4 * (lane % 4)));
    __syncwarp();
}

// A thread's copies are kept like its wgmmas: some groups run at once, the others when they are waited for.
inline void copy_later(uint32_t to, const void* from, bool is_inside) {
    if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16) emulation::fail("a misaligned copy of sixteen bytes");
    uint8_t* const target = emulation::shared_at(to, 16);
    emulation::wgmmas().open.push_back([=] {
        is_inside ? std::memcpy(target, from, 16) : std::memset(target, 0, 16);
    });
}
inline void run_copies(size_t pending) {
    auto& committed = emulation::wgmmas().committed;
    while (committed.size() > pending) {
        const auto group = std::move(committed.front());
        committed.pop_front();
        for (const auto& run : group) run();
    }
}
inline void end_copy_group() {
    emulation::Wgmmas& all = emulation::wgmmas();
    all.committed.push_back(std::move(all.open));
    all.open.clear();
    if ((++all.num_groups + threadIdx.x) * 0x9e3779b9u >> 31) run_copies(0);
}
template <int kPending>
void wait_for_copies() {
    run_copies(kPending);
}
