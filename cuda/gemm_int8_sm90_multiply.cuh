// The product of int8 matrices for many tokens on sm_90a: the warps that multiply, scale and round, and the body.
#pragma once
#include "gemm_int8_sm90.cuh"

namespace gemm_int8 {

/// A warpgroup's place in shared memory, and how it hands results to the warp that stores them.
template <typename S>
struct Staging {
    uint32_t slots, full, empty;  // of this warpgroup
    uint32_t parity = 0;          // of the slots' fills

    __device__ __forceinline__ Staging(uint32_t base, int consumer)
        : slots(base + S::kSlotsAt + consumer * S::kSlots * S::kSlotBytes),
          full(base + S::kSlotFull + 8 * consumer * S::kSlots),
          empty(base + S::kSlotEmpty + 8 * consumer * S::kSlots) {}

    __device__ __forceinline__ uint32_t acquire(int chunk) const {
        barrier_wait(empty + 8 * (chunk % S::kSlots), parity ^ 1);
        return slots + chunk % S::kSlots * S::kSlotBytes;
    }
    __device__ __forceinline__ void publish(int chunk) {
        fence_async_proxy();
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(full + 8 * (chunk % S::kSlots));
        if (chunk % S::kSlots == S::kSlots - 1) parity ^= 1;
    }
    /// A chunk of pairs of tokens: of column `lane / 4` and the eighth after it, tokens 2 (lane % 4) of every eight.
    __device__ __forceinline__ void store_pairs(int chunk, const uint32_t* pairs) {
        const int lane = threadIdx.x % 32, piece = threadIdx.x % 128 / 32 * 2 + lane / 8 % 2;
        const uint32_t slot = acquire(chunk);
        #pragma unroll
        for (int j = 0; j < S::kChunk / 8; j += 2) {
            const int token = 8 * (j + lane / 16) + lane % 8;
            const uint32_t four[4] = {pairs[2 * j], pairs[2 * j + 1], pairs[2 * j + 2], pairs[2 * j + 3]};
            store_turned(slot + token * 128 + ((piece ^ (token % 8)) << 4), four);
        }
        publish(chunk);
    }
    /// The same of words: value(j, h, i) is of token 2 (lane % 4) + i of the chunk's eight j and of column h.
    template <typename Value>
    __device__ __forceinline__ void store_words(int chunk, Value&& value) {
        const int lane = threadIdx.x % 32, first_column = threadIdx.x % 128 / 32 * 16 + lane / 4;
        const uint32_t slot = acquire(chunk);
        #pragma unroll
        for (int j = 0; j < S::kChunk / 8; ++j)
            #pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int token = 8 * j + lane % 4 * 2 + e % 2, column = first_column + e / 2 * 8;
                const auto v = value(j, e / 2, e % 2);
                store_shared_4(slot + (column / 32 * S::kChunk + token) * 128 +
                                   ((column % 32 / 4 ^ token % 8) << 4) + column % 4 * 4,
                               *reinterpret_cast<const uint32_t*>(&v));
            }
        publish(chunk);
    }
};

template <typename S>
__device__ __forceinline__ void multiply(const GemmInt8Sm90Params& p, uint32_t base) {
    using Code = typename S::Code;
    using Sum = typename S::Sum;
    using Output = typename S::Output;
    using Half = Sum[S::kTokens / 4];
    constexpr int kHalf = S::kTokens / 2, kEights = S::kChunk / 8;
    wait_for_earlier_kernels();
    // From a shuffle the compiler knows that the warp agrees, and keeps descriptors in uniform registers.
    const int consumer = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, lane = threadIdx.x % 32;
    const uint32_t full = base + S::kFull, empty = base + S::kEmpty;
    const uint64_t weight = operand_descriptor(base + consumer * 64 * kCodeBlock);
    const uint64_t input = operand_descriptor(base + S::kWeightBytes);
    const int num_blocks = Walk<S>::num_blocks(p);
    Staging<S> staging(base, consumer);
    Ring<S::kStages> ring;
    int previous = 0;
    uint32_t factors_parity = 0;
    Sum acc[S::kTokens / 2];
    uint32_t pairs[S::kWaits ? S::kTokens / 4 : 1];  // of the tile before, not yet staged
    bool has_pairs = false;

    const auto wait_stage = [&] { barrier_wait(full + 8 * ring.slot, ring.parity), wgmma_fence(); };
    const auto advance = [&] { previous = ring.slot, ring.advance(); };
    const auto release_previous = [&] {
        if constexpr (S::kCluster > 1) {
            if (lane < S::kCluster) barrier_arrive_remote(empty + 8 * previous, lane);
        } else {
            if (lane == 0) barrier_arrive(empty + 8 * previous);
        }
    };
    const auto issue_step = [&](auto is_first, uint64_t stage, int i, int piece) {
        constexpr int kTokens = S::kTokens / S::kPieces;
        Sum* const to = acc + piece * (kTokens / 2);
        const uint64_t w = weight + stage + 2 * i;
        const uint64_t x = input + stage + piece * (kTokens * kCodeBlock / 16) + 2 * i;
        if (is_first.value && i == 0)
            wgmma_k32<Code, kTokens, false>(to, w, x);
        else
            wgmma_k32<Code, kTokens>(to, w, x);
    };
    const auto issue = [&](auto is_first) {
        const uint64_t stage = ring.slot * (S::kStageBytes / 16);
        #pragma unroll
        for (int i = 0; i < kCodeBlock / 32; ++i)
            #pragma unroll
            for (int piece = 0; piece < S::kPieces; ++piece) issue_step(is_first, stage, i, piece);
        wgmma_commit();
    };
    const auto issue_last = [&] {
        const uint64_t stage = ring.slot * (S::kStageBytes / 16);
        #pragma unroll
        for (int piece = 0; piece < S::kPieces; ++piece) {
            #pragma unroll
            for (int i = 0; i < kCodeBlock / 32; ++i) issue_step(std::false_type(), stage, i, piece);
            wgmma_commit();
        }
    };
    const auto multiply_block = [&] {
        wait_stage(), issue(std::false_type());
        wgmma_wait<1>(), release_previous(), advance();
    };

    wait_stage(), issue(std::true_type()), advance();  // there are no more clusters than tiles
    for (Walk<S> walk(p);; walk.advance()) {           // the tile's first block has been issued
        const ColumnScales column(p.o,
                                  walk.corner().y + consumer * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4);
        wgmma_wait<0>();
        int num_left = num_blocks - 2;  // without the first and the last
        if (S::kWaits && has_pairs) {
            #pragma unroll
            for (int chunk = 0; chunk < S::kChunks; ++chunk) {
                if (num_left > 0) multiply_block(), --num_left;
                staging.store_pairs(chunk, pairs + chunk * kEights * 2);
            }
        }
        for (; num_left > 0; --num_left) multiply_block();
        if constexpr (S::kSplitLast) {
            wait_stage(), issue_last();
            wgmma_wait<2>(), release_previous(), advance();
            wgmma_wait<1>();
        } else {
            multiply_block();
            wgmma_wait<0>(), release_previous();
        }

        if constexpr (!S::kIsRaw) barrier_wait(base + S::kFactorsFull, factors_parity);
        factors_parity ^= 1;
        const auto finish_half = [&](int half) {
            pin(reinterpret_cast<Half&>(acc[half * (kHalf / 2)]));
            #pragma unroll
            for (int chunk = half * S::kChunks / 2; chunk < (half + 1) * S::kChunks / 2; ++chunk) {
                const Sum* const sums = acc + chunk * kEights * 4;
                float2 factor[kEights];
                if constexpr (!S::kIsRaw) {
                    #pragma unroll
                    for (int j = 0; j < kEights; ++j) {
                        const uint2 v = load_shared_8(base + S::kFactors + (chunk * S::kChunk + 8 * j) * 4 +
                                                      lane % 4 * 8);
                        factor[j] = make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
                    }
                }
                const auto value = [&](int j, int h, int i) {
                    const Sum sum = sums[4 * j + 2 * h + i];
                    if constexpr (S::kIsRaw)
                        return sum;
                    else
                        return scaled(sum, i ? factor[j].y : factor[j].x, column.scale[h], column.bias[h]);
                };
                if constexpr (sizeof(Output) == 4) {
                    staging.store_words(chunk, value);
                } else {
                    uint32_t* const to = pairs + (S::kWaits ? chunk * kEights * 2 : 0);
                    uint32_t rounded[kEights * 2];
                    #pragma unroll
                    for (int j = 0; j < kEights; ++j)
                        #pragma unroll
                        for (int h = 0; h < 2; ++h)
                            (S::kWaits ? to : rounded)[2 * j + h] =
                                pack_pair<Output>(value(j, h, 0), value(j, h, 1));
                    if constexpr (!S::kWaits) staging.store_pairs(chunk, rounded);
                }
            }
        };
        finish_half(0);
        if (walk.is_last()) {  // left here, so that no path joins another with other products in flight
            wgmma_wait<0>();
            finish_half(1);
            break;
        }
        if constexpr (S::kSplitLast) wgmma_wait<0>(), release_previous();
        finish_half(1);
        wait_stage(), issue(std::true_type()), advance();
        if constexpr (!S::kIsRaw) barrier_arrive(base + S::kFactorsEmpty);
        has_pairs = true;
    }
    if constexpr (S::kWaits) {
        #pragma unroll
        for (int chunk = 0; chunk < S::kChunks; ++chunk)
            staging.store_pairs(chunk, pairs + chunk * kEights * 2);
    }
}

}  // namespace gemm_int8

template <typename S>
__device__ __forceinline__ void gemm_int8_sm90(const GemmInt8Sm90Params& p) {
    using namespace gemm_int8;
    const uint32_t base = shared_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::kStages; ++i) {
            barrier_init(base + S::kFull + 8 * i, 1);
            barrier_init(base + S::kEmpty + 8 * i, 4 * S::kConsumers * S::kCluster);
        }
        barrier_init(base + S::kFactorsFull, 32);
        barrier_init(base + S::kFactorsEmpty, 128 * S::kConsumers);
        for (int i = 0; i < S::kConsumers * S::kSlots; ++i) {
            barrier_init(base + S::kSlotFull + 8 * i, 4);
            barrier_init(base + S::kSlotEmpty + 8 * i, 1);
        }
        fence_barrier_init();
    }
    if (threadIdx.x == 32) prefetch_map(&p.input), prefetch_map(&p.weight);
    dependency_launch();
    if constexpr (S::kCluster > 1)
        cluster_sync();
    else
        __syncthreads();
    if (threadIdx.x < 128) {
        lower_registers<S::kProducerRegisters>();
        load_and_store<S>(p, base);
    } else {
        raise_registers<S::kConsumerRegisters>();
        multiply<S>(p, base);
    }
    // No CTA may leave while its neighbour can still write into it or arrive at its barriers.
    if constexpr (S::kCluster > 1) cluster_sync();
}
