// The product of int8 matrices for few tokens on sm_90a, bound by the bytes of the weight: a CTA streams part of the
// columns of a tile's weight rows, and the CTAs of a cluster add their parts.
#pragma once
#include "gemm_int8_wgmma.cuh"

/// Arguments of gemm_int8_skinny_*; mirrored by `ops::gemm_int8::skinny_sm90::SkinnyParams`.
struct GemmInt8SkinnyParams {
    TensorMap input;   // [m, k]
    TensorMap weight;  // [n, k]
    GemmInt8Operands o;
};
static_assert(sizeof(GemmInt8SkinnyParams) == 320, "keep in step with the Rust mirror");

namespace gemm_int8 {

/// Sizes of one kernel. Of kParts CTAs, each adds up the sums of as many warps.
template <typename Code_, typename Output_, int kTokens_, int kColumns_, int kStages_, int kParts_>
struct SkinnyShape {
    using Code = Code_;
    using Output = Output_;
    using Sum = CodeSum<Code>;
    static constexpr int kTokens = kTokens_, kColumns = kColumns_, kStages = kStages_, kParts = kParts_;
    static constexpr bool kIsRaw = std::is_same_v<Output, int32_t>;
    static constexpr int kWarps = kColumns / 16, kOwnWarps = kWarps / kParts;
    static constexpr int kConsumers = 32 * kWarps, kThreads = kConsumers + 32;  // and a warp that loads
    static constexpr int kWeightBytes = kColumns * kCodeBlock, kInputBytes = kTokens * kCodeBlock;
    static constexpr int kStageBytes = kWeightBytes + kInputBytes;
    // What other CTAs send: [kParts - 1][kTokens / 8][32 * kOwnWarps] pieces of four sums.
    static constexpr int kPartBytes = kTokens / 8 * kOwnWarps * 32 * 16;
    static constexpr int kParcels = kStages * kStageBytes;
    static constexpr int kFactors = kParcels + (kParts - 1) * kPartBytes;  // [kTokens] of the rows
    // Barriers: [kStages] each, then one for what other CTAs send.
    static constexpr int kFull = kFactors + 4 * kTokens, kEmpty = kFull + 8 * kStages;
    static constexpr int kParcelsFull = kEmpty + 8 * kStages, kSharedBytes = kParcelsFull + 8;
    static_assert(kColumns % 64 == 0, "wgmma takes 64 rows of the weight");
    static_assert(kWarps % kParts == 0, "whole warps' sums are added up");
    static_assert(kTokens <= kConsumers, "a thread brings one row's factor");
    static_assert(!kIsRaw || std::is_same_v<Sum, int32_t>, "raw sums are those of integers");
    static_assert(kStageBytes % 1024 == 0, "swizzles start on 1024 bytes");
    static_assert(kSharedBytes <= 232448, "a CTA of sm_90 has 227 KB");
};

/// Where a CTA works: its tile, and its blocks of K.
template <typename S>
struct Place {
    int column, token, rank, begin, end;

    __device__ __forceinline__ explicit Place(const GemmInt8SkinnyParams& p)
        : column(int(blockIdx.x) / S::kParts * S::kColumns),
          token(int(blockIdx.y) * S::kTokens),
          rank(S::kParts > 1 ? cluster_rank() : 0) {
        const int num_blocks = (p.o.k + kCodeBlock - 1) / kCodeBlock;
        begin = num_blocks * rank / S::kParts, end = num_blocks * (rank + 1) / S::kParts;
    }
};

/// The first round of the ring: it waits for no one, and its weight not even for earlier kernels.
template <typename S>
__device__ __forceinline__ void load_first_weights(const GemmInt8SkinnyParams& p, uint32_t base,
                                                   const Place<S>& place) {
    for (int i = 0; i < min(S::kStages, place.end - place.begin); ++i) {
        const uint32_t full = base + S::kFull + 8 * i;
        barrier_expect(full, S::kStageBytes);
        tma_load(base + i * S::kStageBytes, &p.weight, (place.begin + i) * kCodeBlock, place.column, full);
    }
}
template <typename S>
__device__ __forceinline__ void load_rest(const GemmInt8SkinnyParams& p, uint32_t base,
                                          const Place<S>& place) {
    Ring<S::kStages> ring;
    for (int block = place.begin; block < place.end; ++block, ring.advance()) {
        const uint32_t full = base + S::kFull + 8 * ring.slot, stage = base + ring.slot * S::kStageBytes;
        if (block >= place.begin + S::kStages) {
            barrier_wait(base + S::kEmpty + 8 * ring.slot, ring.parity ^ 1);
            barrier_expect(full, S::kStageBytes);
            tma_load(stage, &p.weight, block * kCodeBlock, place.column, full);
        }
        tma_load(stage + S::kWeightBytes, &p.input, block * kCodeBlock, place.token, full);
    }
}

/// Adds up the parts of the sums of a warp of this CTA, in the order of the others' ranks; other warps' sums are sent to
/// the CTA that ends them. Whether the warp has an output.
template <typename S>
__device__ __forceinline__ bool add_parts(typename S::Sum (&acc)[S::kTokens / 2], uint32_t base, int rank) {
    if constexpr (S::kParts > 1) {
        const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), owner = warp / S::kOwnWarps;
        const uint32_t own = base + S::kParcels + threadIdx.x % (32 * S::kOwnWarps) * 16;
        if (owner != rank) {
            #pragma unroll
            for (int i = 0; i < S::kTokens / 8; ++i) {
                const uint32_t to =
                    own + (rank - (rank > owner)) * S::kPartBytes + i * (32 * S::kOwnWarps * 16);
                const uint32_t* const v = reinterpret_cast<const uint32_t*>(acc + 4 * i);
                store_remote_16(to, base + S::kParcelsFull, owner, make_uint4(v[0], v[1], v[2], v[3]));
            }
            return false;
        }
        barrier_wait_cluster(base + S::kParcelsFull, 0);
        #pragma unroll
        for (int part = 0; part < S::kParts - 1; ++part)
            #pragma unroll
            for (int i = 0; i < S::kTokens / 8; ++i) {
                const uint4 v = load_shared_16(own + part * S::kPartBytes + i * (32 * S::kOwnWarps * 16));
                const typename S::Sum* const x = reinterpret_cast<const typename S::Sum*>(&v);
                #pragma unroll
                for (int e = 0; e < 4; ++e) acc[4 * i + e] += x[e];
            }
    }
    return true;
}

/// Scales, rounds and stores the sums of a warp: columns `column` and the eighth after it of each thread, tokens
/// 8 j + 2 (lane % 4) + {0, 1}. `staging` is the warp's own.
template <typename S>
__device__ __forceinline__ void store_sums(const GemmInt8SkinnyParams& p,
                                           const typename S::Sum (&acc)[S::kTokens / 2],
                                           const ColumnScales& scales, uint32_t factors, uint32_t staging,
                                           int first_column, int first_token) {
    using Output = typename S::Output;
    const int lane = threadIdx.x % 32, t = lane % 4;
    const auto value = [&](int j, int h, int i, const uint2& factor) {
        const auto sum = acc[4 * j + 2 * h + i];
        if constexpr (S::kIsRaw)
            return sum;
        else
            return scaled(sum, __uint_as_float(i ? factor.y : factor.x), scales.scale[h], scales.bias[h]);
    };
    const auto factor_of = [&](int j) {
        return S::kIsRaw ? make_uint2(0, 0) : load_shared_8(factors + 32 * j + 8 * t);
    };
    Output* const output = static_cast<Output*>(p.o.output) + int64_t(first_token) * p.o.n + first_column;
    const int num_tokens = p.o.m - first_token, num_columns = p.o.n - first_column;
    if constexpr (sizeof(Output) == 2 && S::kTokens >= 16) {
        if (p.o.n % 8 == 0 && reinterpret_cast<uint64_t>(p.o.output) % 16 == 0) {
            #pragma unroll
            for (int j = 0; j < S::kTokens / 8; j += 2) {
                uint32_t pairs[4];
                #pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const uint2 factor = factor_of(j + i);
                    #pragma unroll
                    for (int h = 0; h < 2; ++h)
                        pairs[2 * i + h] =
                            pack_pair<Output>(value(j + i, h, 0, factor), value(j + i, h, 1, factor));
                }
                const int token = 8 * (j + lane / 16) + lane % 8;
                store_turned(staging + token * 32 + ((lane / 8 ^ token / 4) % 2 << 4), pairs);
            }
            __syncwarp();
            #pragma unroll
            for (int i = 0; i < S::kTokens / 16; ++i) {
                const int token = 16 * i + lane / 2, piece = lane % 2;
                const uint4 v = load_shared_16(staging + token * 32 + ((piece ^ token / 4) % 2 << 4));
                if (token < num_tokens && 8 * piece < num_columns)
                    *reinterpret_cast<uint4*>(output + int64_t(token) * p.o.n + 8 * piece) = v;
            }
            return;
        }
    }
    #pragma unroll
    for (int j = 0; j < S::kTokens / 8; ++j) {
        const uint2 factor = factor_of(j);
        #pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int token = 8 * j + 2 * t + e % 2, column = lane / 4 + e / 2 * 8;
            if (token < num_tokens && column < num_columns)
                output[int64_t(token) * p.o.n + column] = Output(value(j, e / 2, e % 2, factor));
        }
    }
}

template <typename S>
__device__ __forceinline__ void multiply(const GemmInt8SkinnyParams& p, uint32_t base,
                                         const Place<S>& place) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int column = place.column + warp * 16;
    const uint64_t weight = operand_descriptor(base + warp / 4 * 64 * kCodeBlock);
    const uint64_t input = operand_descriptor(base + S::kWeightBytes);
    const ColumnScales scales(p.o, column + lane / 4);
    float factor = 0.0f;
    if (!S::kIsRaw && threadIdx.x < S::kTokens && place.token + int(threadIdx.x) < p.o.m)
        factor = row_factor(p.o.input_scales, place.token + threadIdx.x);
    typename S::Sum acc[S::kTokens / 2] = {};
    Ring<S::kStages> ring;
    int previous = 0;
    for (int block = place.begin; block < place.end; ++block) {
        barrier_wait(base + S::kFull + 8 * ring.slot, ring.parity);
        const uint64_t stage = ring.slot * (S::kStageBytes / 16);
        wgmma_fence();
        #pragma unroll
        for (int i = 0; i < kCodeBlock / 32; ++i)
            wgmma_k32<typename S::Code, S::kTokens>(acc, weight + stage + 2 * i, input + stage + 2 * i);
        wgmma_commit();
        wgmma_wait<1>();
        if (block > place.begin && lane == 0) barrier_arrive(base + S::kEmpty + 8 * previous);
        previous = ring.slot;
        ring.advance();
    }
    wgmma_wait<0>();
    pin(acc);
    if (threadIdx.x < S::kTokens)
        store_shared_4(base + S::kFactors + 4 * threadIdx.x, __float_as_uint(factor));
    named_barrier(1, S::kConsumers);  // the factors are there, and nobody needs the ring any more
    if constexpr (S::kParts > 1) cluster_wait();
    if (add_parts<S>(acc, base, place.rank))
        store_sums<S>(p, acc, scales, base + S::kFactors, base + warp * (S::kTokens * 32), column,
                      place.token);
}

}  // namespace gemm_int8

template <typename S>
__device__ __forceinline__ void gemm_int8_skinny_sm90(const GemmInt8SkinnyParams& p) {
    using namespace gemm_int8;
    const uint32_t base = shared_start();
    const Place<S> place(p);
    if (threadIdx.x == S::kConsumers) {
        prefetch_map(&p.weight), prefetch_map(&p.input);
        for (int i = 0; i < S::kStages; ++i) {
            barrier_init(base + S::kFull + 8 * i, 1);
            barrier_init(base + S::kEmpty + 8 * i, S::kWarps);
        }
        barrier_init(base + S::kParcelsFull, 1);
        fence_barrier_init();
        if constexpr (S::kParts > 1) barrier_expect(base + S::kParcelsFull, (S::kParts - 1) * S::kPartBytes);
        if (!p.o.weights_ready) wait_for_earlier_kernels();
        load_first_weights<S>(p, base, place);
    }
    dependency_launch();
    __syncthreads();
    if constexpr (S::kParts > 1) cluster_arrive_relaxed();  // from here others may send to this CTA
    wait_for_earlier_kernels();
    if (threadIdx.x < S::kConsumers) {
        multiply<S>(p, base, place);
        return;
    }
    if (threadIdx.x == S::kConsumers) load_rest<S>(p, base, place);
    __syncwarp();
    if constexpr (S::kParts > 1) cluster_wait();
}
