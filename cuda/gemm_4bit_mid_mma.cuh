// The multiplying warps of gemm_4bit_mid for up to 16 tokens: products of one warp, 64 rows by one block of 64 columns
// at a time. Unlike wgmma they take the input in any order of the columns, so that codes need not be exchanged between
// lanes; and a wgmma of 16 tokens keeps its scheduler from all else for 13 cycles, as long as it lasts.
#pragma once
#include "gemm_4bit_mid_producers.cuh"

namespace mid {

/// A group of 4 kTiles warps takes a stage: warp i of it rows 64 (i / 4) .. of block i % 4. acc: [tile of 16 rows][eight
/// tokens], a fragment each; its columns 2t, 2t + 1 are tokens t, t + 4.
template <typename T, typename S>
__device__ __forceinline__ void multiply_mma(float (&acc)[4][S::kTokens / 8][4], uint32_t base,
                                             int num_stages, Ring<S::kStages>& ring, int& stage,
                                             int rows_per_tile) {
    static_assert(S::kStageBlocks == 4, "a warp takes a block of a stage");
    constexpr int kOctets = S::kTokens / 8, kUnits = 64 / S::kUnit;  // units of a block
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const int tile = warp / 4 % S::kTiles, block = warp % 4;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t table = lane_of_table<S::kTableRowBytes>(base, lane);
    const uint32_t codes_at =
        opaque(base + S::kCodes +
               swizzled_offset<S::kRowBytes>(tile * 64 + lane % 8 + lane / 16 * 8, block * 2 + lane / 8 % 2));
    const uint32_t scales_at =
        opaque(base + S::kScales + ((tile * 64 + g) * S::kStageUnits + block * kUnits) * 4);
    // Column g of the input is token g / 2 + g % 2 * 4 of eight, so that eight lanes read from all banks.
    const int token = g / 2 + g % 2 * 4;
    const uint32_t input_at =
        opaque(base + S::kInput + block * S::kInputBytes + swizzled_offset<128>(token, t));
    const uint32_t full = base + S::kFull, empty = base + S::kEmpty;
    const uint32_t zero = opaque(uint32_t(rows_per_tile) >> 31);  // 0, which the compiler does not know
    while (stage < num_stages) {
        const int slot = ring.slot;
        barrier_wait(full + 8 * slot, ring.parity);
        ring.advance(S::kGroups);
        stage += S::kGroups;
        // Lane t has word t of both pieces of 16 bytes of a row of codes: columns 8 (4 piece + t) ..
        uint32_t x[kOctets][8];
        #pragma unroll
        for (int i = 0; i < kOctets; ++i)
            #pragma unroll
            for (int piece = 0; piece < 2; ++piece) {
                const uint4 v =
                    load_shared_16((input_at ^ piece << 6) + slot * (4 * S::kInputBytes) + i * 1024);
                x[i][4 * piece] = v.x, x[i][4 * piece + 1] = v.y;
                x[i][4 * piece + 2] = v.z, x[i][4 * piece + 3] = v.w;
            }
        uint32_t seen = 0;
        #pragma unroll
        for (int rows = 0; rows < 4; ++rows) {
            if (S::kTiles > 1 && tile * 64 + rows * 16 >= rows_per_tile) break;
            uint32_t words[4];  // pieces 0, 1 of row g, then of row g + 8
            load_matrices(words, codes_at + slot * S::kCodesBytes + rows * 16 * S::kRowBytes);
            float scale[2][kUnits];
            #pragma unroll
            for (int i = 0; i < 2 * kUnits; ++i) {
                const uint32_t bits =
                    load_shared_4(scales_at + slot * S::kScalesBytes +
                                  ((rows * 16 + i / kUnits * 8) * S::kStageUnits + i % kUnits) * 4);
                scale[i / kUnits][i % kUnits] = __uint_as_float(bits);
                seen = bits & zero;
            }
            float product[kOctets][4] = {};
            #pragma unroll
            for (int step = 0; step < 4; ++step) {
                // a: columns of byte 2 (step % 2) of the lane's word for rows g, g + 8, then of the byte behind it.
                uint32_t a[4];
                #pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t word = words[half * 2 + step / 2];
                    a[half] = step % 2 ? look_up_pair<2, S::kTableRowBytes>(word, table)
                                       : look_up_pair<0, S::kTableRowBytes>(word, table);
                    a[half + 2] = step % 2 ? look_up_pair<3, S::kTableRowBytes>(word, table)
                                           : look_up_pair<1, S::kTableRowBytes>(word, table);
                }
                #pragma unroll
                for (int i = 0; i < kOctets; ++i)
                    mma_m16n8k16<std::is_same_v<T, bfloat16>>(product[i], a, x[i][2 * step],
                                                              x[i][2 * step + 1]);
                if ((step + 1) % (S::kUnit / 16) != 0) continue;
                #pragma unroll
                for (int i = 0; i < kOctets * 4; ++i) {
                    float& sum = acc[rows][i / 4][i % 4];
                    sum = fmaf(scale[i % 4 / 2][step * 16 / S::kUnit], product[i / 4][i % 4], sum);
                    product[i / 4][i % 4] = 0.0f;
                }
            }
        }
        // An arrival may overtake loads in flight; they return in order, and its address depends on the last.
        barrier_arrive(empty + 8 * slot + seen);
    }
    stage -= num_stages;
}

/// What leave_sums does: two sums of a group, of the warps of blocks 0 and 2 and of those of blocks 1 and 3.
template <typename S>
__device__ __forceinline__ void leave_sums_mma(const float (&acc)[4][S::kTokens / 8][4], uint32_t base,
                                               int first_stage) {
    uint32_t thread = threadIdx.x;
    keep_in_register(thread);
    const int lane = thread % 32, tile = thread / 128 % S::kTiles, block = thread / 32 % 4;
    const uint32_t at = base + S::kInput +
                        ((first_stage * 2 + block % 2) * S::kTiles + tile) * S::kSumsBytes + lane / 4 * 4 +
                        lane % 4 * S::kSumsPitch;
    const auto for_each = [&](auto&& f) {
        #pragma unroll
        for (int i = 0; i < 2 * S::kTokens; ++i) {
            const int rows = i / (S::kTokens / 2), octet = i / 4 % (S::kTokens / 8), j = i % 4;
            f(at + (8 * octet + j % 2 * 4) * S::kSumsPitch + (rows * 16 + j / 2 * 8) * 4,
              acc[rows][octet][j]);
        }
    };
    if (block >= 2) for_each([](uint32_t to, float sum) { store_shared_4(to, __float_as_uint(sum)); });
    named_barrier(kRingFree, S::kConsumers);
    if (block < 2)
        for_each([](uint32_t to, float sum) {
            store_shared_4(to, __float_as_uint(sum + __uint_as_float(load_shared_4(to))));
        });
}

}  // namespace mid
