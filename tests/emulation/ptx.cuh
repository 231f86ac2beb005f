// Stands in for cuda/ptx.cuh: the same functions without assembly.
#pragma once
#include <cstdint>
#include "emulation.h"

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

inline float* dynamic_shared() {
    alignas(128) __shared__ float memory[66560 / 4];
    return memory;
}
inline uint32_t shared_address(const void* p) {
    return uint32_t(static_cast<const char*>(p) - reinterpret_cast<const char*>(dynamic_shared()));
}
inline uint32_t load_shared(uint32_t address) {
    return reinterpret_cast<const uint32_t*>(dynamic_shared())[address / 4];
}

/// Lane (g, t) holds rows g and g + 8 of a and d, column g of b; columns 2 t and 2 t + 1 of d.
template <bool kBfloat16>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto value = [](uint64_t word, int half) {
        const uint16_t bits = uint16_t(word >> 16 * half);
        return kBfloat16 ? __bfloat162float(emulation::from_bits<__nv_bfloat16>(bits))
                         : __half2float(emulation::from_bits<__half>(bits));
    };
    uint64_t left[2][32];  // [0]: columns 2 t, 2 t + 1 of rows g (low word) and g + 8; [1]: 8 columns further on
    uint64_t right[32];
    std::memcpy(left[0], emulation::exchange(uint64_t(a[1]) << 32 | a[0]), sizeof left[0]);
    std::memcpy(left[1], emulation::exchange(uint64_t(a[3]) << 32 | a[2]), sizeof left[1]);
    std::memcpy(right, emulation::exchange(uint64_t(b1) << 32 | b0), sizeof right);
    const int g = int(threadIdx.x % 32 / 4), t = int(threadIdx.x % 4);
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) {
            const int lane = k % 8 / 2, column = 2 * t + i % 2;
            d[i] += value(left[k / 8][4 * g + lane] >> 32 * (i / 2), k % 2) *
                    value(right[4 * column + lane] >> 32 * (k / 8), k % 2);
        }
}
