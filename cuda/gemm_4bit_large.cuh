// The multiplying warpgroups of the 4-bit GEMM for many tokens, its epilogue and the kernel's body.
#pragma once
#include "gemm_4bit_large_decode.cuh"

namespace large {

/// Adds the bias, rounds, turns and stores a warpgroup's tile of output^T: 64 rows from `column` of the output.
/// acc holds rows r, r + 8 (r = lane / 4 of the warp's sixteen) and tokens 8j + 2 (lane % 4) + {0, 1}.
template <typename T, int kTokens>
__device__ __forceinline__ void store_tile(const Gemm4bitLargeParams& p, const float (&acc)[kTokens / 2],
                                           uint32_t staging, int column, int first_token) {
    const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, barrier = 1 + threadIdx.x / 128;
    float bias[2];
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = column + thread / 32 * 16 + lane / 4 + 8 * i;
        bias[i] = row < p.o.n ? load_bias(p.o, row) : 0.0f;
    }
    if (thread == 0) tma_store_wait_read();
    named_barrier(barrier, 128);
    const int piece = thread / 32 * 2 + (lane / 8 & 1);
    #pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
        uint32_t pairs[4];
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* v = acc + 4 * (j + i / 2) + 2 * (i % 2);
            pairs[i] = pack_pair<T>(v[0] + bias[i % 2], v[1] + bias[i % 2]);
        }
        const int token = 8 * (j + lane / 16) + lane % 8;
        store_turned(staging + token * 128 + ((piece ^ (token & 7)) << 4), pairs);
    }
    fence_async_proxy();
    named_barrier(barrier, 128);
    if (p.output_by_tma) {
        if (thread == 0 && column < p.o.n && first_token < p.o.m)
            tma_store(&p.output, staging, column, first_token);
        return;
    }
    const int num_columns = min(64, p.o.n - column), num_tokens = min(kTokens, p.o.m - first_token);
    for (int i = thread; i < num_tokens * 64; i += 128) {
        const int token = i / 64, c = i % 64;
        const uint32_t v = load_shared_2(staging + token * 128 + (((c / 8) ^ (token & 7)) << 4) + c % 8 * 2);
        if (c < num_columns)
            static_cast<uint16_t*>(p.o.output)[int64_t(first_token + token) * p.o.n + column + c] =
                uint16_t(v);
    }
    named_barrier(barrier, 128);
}

/// Adds up the parts of K, each part a share of the tokens, in the order of the parts. The ring is idle by now
/// (there is one tile per cluster) and takes the sums.
template <typename S>
__device__ __forceinline__ void add_parts(float (&share)[S::kShare / 2], const float (&acc)[S::kTokens / 2],
                                          uint32_t base) {
    constexpr int kPieces = S::kShare / 8;  // of 16 bytes, of a thread's share
    const int part = Walk<S>::part();
    named_barrier(3, S::kConsumers);
    #pragma unroll
    for (int i = 0; i < S::kTokens / 8; ++i)
        store_shared_16(base + (i * S::kConsumers + threadIdx.x) * 16,
                        make_uint4(__float_as_uint(acc[4 * i]), __float_as_uint(acc[4 * i + 1]),
                                   __float_as_uint(acc[4 * i + 2]), __float_as_uint(acc[4 * i + 3])));
    #pragma unroll
    for (int to = 0; to < S::kParts; ++to) barrier_arrive_cluster(base + S::kSums, to);
    barrier_wait_cluster(base + S::kSums, 0);
    #pragma unroll
    for (int i = 0; i < S::kShare / 2; ++i) share[i] = 0.0f;
    #pragma unroll
    for (int from = 0; from < S::kParts; ++from) {
        #pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const uint4 v =
                load_remote_16(base + ((part * kPieces + i) * S::kConsumers + threadIdx.x) * 16, from);
            share[4 * i] += __uint_as_float(v.x), share[4 * i + 1] += __uint_as_float(v.y);
            share[4 * i + 2] += __uint_as_float(v.z), share[4 * i + 3] += __uint_as_float(v.w);
        }
    }
}

template <typename T, typename S>
__device__ __forceinline__ void multiply(const Gemm4bitLargeParams& p, uint32_t base) {
    // From a shuffle the compiler knows that the warp agrees, and keeps descriptors in uniform registers.
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    const uint32_t full = base + S::kFull, empty = base + S::kEmpty;
    const uint32_t staging = base + S::kStaging + warpgroup * S::kStagingBytes;
    const uint64_t input = operand_descriptor(base);
    const uint64_t weight = operand_descriptor(base + S::kInputBytes + warpgroup * 64 * 128);
    auto release = [&](int slot) {
        if (lane == 0) barrier_arrive(empty + 8 * slot);
    };
    Tile t;
    if (threadIdx.x == 0) {  // the first stages wait for no one
        int slot = 0;
        for (Walk<S> first(p); slot < S::kStages && first(t);)
            for (int block = t.begin; block < t.end && slot < S::kStages; ++block)
                load_input<S>(p, base, t, block, slot++);
    }
    __syncwarp();

    Ring<S::kStages> ring;
    for (Walk<S> walk(p); walk(t);) {
        float acc[S::kTokens / 2];
        #pragma unroll
        for (int i = 0; i < S::kTokens / 2; ++i) acc[i] = 0.0f;
        int previous = 0;
        for (int block = t.begin; block < t.end; ++block) {
            barrier_wait(full + 8 * ring.slot, ring.parity);
            // The decoded weights were written by other threads, through the other proxy. The fence on their side
            // costs more: it waits for their loads too.
            fence_async_proxy();
            const uint64_t offset = ring.slot * (S::kStageBytes / 16);
            wgmma_fence();
            #pragma unroll
            for (int step = 0; step < 4; ++step)
                wgmma_k16_shared<T, S::kTokens>(acc, weight + offset + 2 * step, input + offset + 2 * step);
            wgmma_commit();
            wgmma_wait<1>();
            if (block > t.begin) release(previous);
            previous = ring.slot;
            ring.advance();
        }
        wgmma_wait<0>();
        pin(acc);
        if (t.begin < t.end) release(previous);
        const int column = t.row + warpgroup * 64;
        if constexpr (S::kParts == 1) {
            store_tile<T, S::kTokens>(p, acc, staging, column, t.token);
        } else {
            float share[S::kShare / 2];
            add_parts<S>(share, acc, base);
            store_tile<T, S::kShare>(p, share, staging, column, t.token + Walk<S>::part() * S::kShare);
        }
    }
    if (threadIdx.x % 128 == 0) tma_store_wait();
}

}  // namespace large

template <typename T, typename S>
__device__ __forceinline__ void gemm_4bit_large(const Gemm4bitLargeParams& p) {
    using namespace large;
    const uint32_t base = shared_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::kStages; ++i) {
            barrier_init(base + S::kFull + 8 * i, 1 + 128);  // the input, four decoding warps
            barrier_init(base + S::kEmpty + 8 * i, S::kConsumers / 32);
        }
        barrier_init(base + S::kSums, S::kParts * S::kConsumers);
        for (int i = 0; i < 8 * S::kDecoders; ++i) barrier_init(base + S::kPairs + 8 * i, 1);
        fence_barrier_init();
    }
    const bool is_decoder = threadIdx.x >= S::kConsumers;
    if (is_decoder && p.o.weights_ready)
        RowScales<S::kUnit, 1>::fill_map(p.o, base + S::kMap, threadIdx.x - S::kConsumers,
                                         128 * S::kDecoders);
    constexpr bool kIsCluster = S::kParts > 1;
    if constexpr (kIsCluster)
        cluster_sync();
    else
        __syncthreads();
    dependency_launch();
    if (!is_decoder) {
        wait_for_earlier_kernels();
        multiply<T, S>(p, base);
    } else {
        if (!p.o.weights_ready) {
            wait_for_earlier_kernels();
            RowScales<S::kUnit, 1>::fill_map(p.o, base + S::kMap, threadIdx.x - S::kConsumers,
                                             128 * S::kDecoders);
            named_barrier(4, 128 * S::kDecoders);
        }
        with_codebook(p.o.codebook,
                      [&]<typename Codebook>(Codebook) { decode_weights<T, S, Codebook>(p, base); });
    }
    // No CTA may leave while a neighbour can still write into its shared memory or read from it.
    if constexpr (kIsCluster) cluster_sync();
}
