// Stands in for cuda/ptx_wgmma.cuh: the same functions without assembly, with the layouts of fragments and operands. A
// group runs as early or as late as it may.
#pragma once
#include <cstdint>
#include <type_traits>
#include "dtype.cuh"
#include "hopper.h"

inline uint32_t swizzled(uint32_t address, int width) {
    return address ^ ((address >> 7 & uint32_t(width / 16 - 1)) << 4);
}
inline void wgmma_fence() {}
/// Runs the groups but the last kPending.
inline void run_wgmmas(size_t pending) {
    auto& committed = emulation::wgmmas().committed;
    while (committed.size() > pending) {
        const auto group = std::move(committed.front());
        committed.pop_front();
        for (const auto& run : group) run();
    }
}
inline void wgmma_commit() {
    emulation::Wgmmas& all = emulation::wgmmas();
    all.committed.push_back(std::move(all.open));
    all.open.clear();
    if (++all.num_groups * 0x9e3779b9u >> 31) run_wgmmas(0);  // lanes agree: half of the groups run at once
}
template <int kPending>
void wgmma_wait() {
    run_wgmmas(kPending);
}
template <typename V, int kCount>
void pin(V (&)[kCount]) {}
inline uint32_t opaque(uint32_t v) { return v; }
inline uint64_t operand_descriptor(uint32_t address) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

/// Sixteen bytes of a row of an operand under the 128 B swizzle, 8 rows 1024 bytes apart.
inline void read_piece(void* to, int row, int piece, uint64_t descriptor) {
    const uint64_t fields = operand_descriptor(0);
    if ((descriptor & ~uint64_t(0x3fff)) != fields)
        emulation::fail("an operand's descriptor of another form");
    const uint32_t start = emulation::cta_rank() << 24 | uint32_t(descriptor & 0x3fff) << 4;
    const uint32_t from = start + uint32_t(row / 8 * 1024 + row % 8 * 128 + 16 * piece);
    std::memcpy(to, emulation::shared_at(swizzled(from, 128), 16), 16);
}
/// Sixteen elements of each row.
template <typename T>
void read_operand(float (*rows)[16], int num_rows, uint64_t descriptor) {
    for (int row = 0; row < num_rows; ++row)
        for (int half = 0; half < 2; ++half) {
            uint16_t bits[8];
            read_piece(bits, row, half, descriptor);
            for (int i = 0; i < 8; ++i) rows[row][8 * half + i] = float(emulation::from_bits<T>(bits[i]));
        }
}
/// Lane (g, t) holds rows g and g + 8 of a, and of the sums columns 2 t and 2 t + 1 of each 8 tokens. Lane 0 works for
/// its warp, which has 16 of the 64 rows.
template <typename T, int kTokens, bool kAdd, bool kSharedA>
void run_wgmma(float* acc, const uint32_t (&a)[4], uint64_t a_shared, uint64_t b) {
    struct Fragments {
        float* acc;
        uint32_t a[4];
    } own = {acc, {a[0], a[1], a[2], a[3]}};
    const uint64_t* const all = emulation::exchange(reinterpret_cast<uint64_t>(&own));
    if (threadIdx.x % 32 == 0) {
        const auto lane = [=](int i) -> const Fragments& {
            return *reinterpret_cast<const Fragments*>(all[i]);
        };
        float left[16][16], right[kTokens][16];
        if constexpr (kSharedA) {
            read_operand<T>(left, 16, a_shared + threadIdx.x % 128 / 32 * (16 * 128 / 16));
        } else {
            for (int row = 0; row < 16; ++row)
                for (int k = 0; k < 16; ++k) {
                    const uint32_t word = lane(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
                    left[row][k] = float(emulation::from_bits<T>(word >> 16 * (k % 2) & 0xffff));
                }
        }
        read_operand<T>(right, kTokens, b);
        for (int i = 0; i < 32; ++i)
            for (int j = 0; j < kTokens / 2; ++j) {
                const float* const x = left[i / 4 + j / 2 % 2 * 8];
                const float* const y = right[j / 4 * 8 + i % 4 * 2 + j % 2];
                float sum = 0.0f;
                for (int k = 0; k < 16; ++k) sum += x[k] * y[k];
                float& to = lane(i).acc[j];
                to = (kAdd ? to : 0.0f) + sum;
            }
    }
    __syncwarp();
}
template <typename T, int kTokens, bool kAdd = true>
void wgmma_k16(float (&acc)[kTokens / 2], const uint32_t* a, uint64_t b) {
    const uint32_t words[4] = {a[0], a[1], a[2], a[3]};
    emulation::wgmmas().open.push_back(
        [to = &acc[0], words, b] { run_wgmma<T, kTokens, kAdd, false>(to, words, 0, b); });
}
template <typename T, int kTokens>
void wgmma_k16_shared(float (&acc)[kTokens / 2], uint64_t a, uint64_t b) {
    emulation::wgmmas().open.push_back([to = &acc[0], a, b] {
        const uint32_t words[4] = {};
        run_wgmma<T, kTokens, true, true>(to, words, a, b);
    });
}

template <typename Code>
using CodeSum = std::conditional_t<std::is_same_v<Code, int8_t>, int32_t, float>;

/// Thirty-two codes of each row.
template <typename Code>
void read_codes(Code (*rows)[32], int num_rows, uint64_t descriptor) {
    for (int row = 0; row < num_rows; ++row)
        for (int half = 0; half < 2; ++half) read_piece(&rows[row][16 * half], row, half, descriptor);
}
/// The sums of lane (g, t) as above; integers wrap around.
template <typename Code, int kTokens, bool kAdd>
void run_wgmma_codes(CodeSum<Code>* acc, uint64_t a, uint64_t b) {
    const uint64_t* const all = emulation::exchange(reinterpret_cast<uint64_t>(acc));
    if (threadIdx.x % 32 == 0) {
        Code left[16][32], right[kTokens][32];
        read_codes(left, 16, a + threadIdx.x % 128 / 32 * (16 * 128 / 16));
        read_codes(right, kTokens, b);
        for (int i = 0; i < 32; ++i)
            for (int j = 0; j < kTokens / 2; ++j) {
                const Code* const x = left[i / 4 + j / 2 % 2 * 8];
                const Code* const y = right[j / 4 * 8 + i % 4 * 2 + j % 2];
                CodeSum<Code> sum = 0;
                for (int k = 0; k < 32; ++k) sum += CodeSum<Code>(x[k]) * CodeSum<Code>(y[k]);
                CodeSum<Code>& to = reinterpret_cast<CodeSum<Code>*>(all[i])[j];
                if constexpr (std::is_same_v<Code, int8_t>)
                    to = int32_t(uint32_t(kAdd ? to : 0) + uint32_t(sum));
                else
                    to = (kAdd ? to : 0.0f) + sum;
            }
    }
    __syncwarp();
}
template <typename Code, int kTokens, bool kAdd = true>
void wgmma_k32(CodeSum<Code>* acc, uint64_t a, uint64_t b) {
    emulation::wgmmas().open.push_back([=] { run_wgmma_codes<Code, kTokens, kAdd>(acc, a, b); });
}
