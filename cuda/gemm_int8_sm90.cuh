// The product of int8 matrices for many tokens on sm_90a: tiles, the ring, the warps that load and store.
// Persistent CTAs of 128 threads that load and store, and a warpgroup for every 64 columns of a tile.
#pragma once
#include "gemm_int8_wgmma.cuh"

/// Arguments of gemm_int8_tile*; mirrored by `ops::gemm_int8::sm90::Sm90Params`.
struct GemmInt8Sm90Params {
    TensorMap input;   // [m, k]
    TensorMap weight;  // [n, k]
    TensorMap output;  // [m, n], if output_by_tma
    GemmInt8Operands o;
    int32_t num_token_tiles;
    int32_t num_column_tiles;  // of a cluster's CTAs together
    int32_t raster_tokens;     // tiles of the input that are walked together, so that they stay in L2
    int32_t output_by_tma;     // rows of the output start on 16 bytes
};
static_assert(sizeof(GemmInt8Sm90Params) == 512, "keep in step with the Rust mirror");

namespace gemm_int8 {

/// Sizes of one kernel. kSplitLast: a tile's last block is multiplied in two halves of its tokens, so that one half is
/// scaled and rounded under the other's products.
template <typename Code_, typename Output_, int kTokens_, int kConsumers_, int kStages_, int kCluster_ = 1,
          bool kSplitLast_ = false>
struct Shape {
    using Code = Code_;
    using Output = Output_;
    using Sum = CodeSum<Code>;
    static constexpr int kTokens = kTokens_, kConsumers = kConsumers_, kStages = kStages_;
    static constexpr int kCluster = kCluster_;  // CTAs that share a tile's tokens, side by side in n
    static constexpr bool kSplitLast = kSplitLast_;
    static constexpr int kPieces = kSplitLast || kConsumers == 3 ? 2 : 1;
    static constexpr bool kIsRaw = std::is_same_v<Output, int32_t>;
    static constexpr int kColumns = 64 * kConsumers;
    static constexpr int kThreads = 128 * (1 + kConsumers);
    // Rounded pairs of a tile wait in registers and are stored under the next tile's products. With three consumers there
    // are no registers left.
    static constexpr bool kWaits = sizeof(Output) == 2 && kConsumers == 2;
    static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
    static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
    static constexpr int kInputBytes = kTokens * kCodeBlock, kWeightBytes = kColumns * kCodeBlock;
    static constexpr int kStageBytes = kInputBytes + kWeightBytes;
    // The output leaves in chunks of 8 KB: 64 columns of some tokens, in boxes of 128 bytes of a row.
    static constexpr int kBoxColumns = 128 / int(sizeof(Output)), kBoxes = 64 / kBoxColumns;
    static constexpr int kChunk = 128 / int(sizeof(Output)), kChunks = kTokens / kChunk;
    static constexpr int kSlotBytes = kChunk * 64 * int(sizeof(Output));
    static constexpr int kSlots = 2;  // of each consumer: one is filled while the other is stored
    static constexpr int kSlotsAt = kStages * kStageBytes;
    static constexpr int kFactors = kSlotsAt + kConsumers * kSlots * kSlotBytes;  // [kTokens] of the rows
    // Barriers. kFull, kEmpty [kStages]: a stage is loaded; every warp of the cluster has read it. kFactorsFull: the rows'
    // factors of a tile are there, kFactorsEmpty: have been read. kSlotFull, kSlotEmpty [kConsumers][kSlots].
    static constexpr int kFull = kFactors + 4 * kTokens, kEmpty = kFull + 8 * kStages;
    static constexpr int kFactorsFull = kEmpty + 8 * kStages, kFactorsEmpty = kFactorsFull + 8;
    static constexpr int kSlotFull = kFactorsEmpty + 8, kSlotEmpty = kSlotFull + 8 * kConsumers * kSlots;
    static constexpr int kSharedBytes = kSlotEmpty + 8 * kConsumers * kSlots;
    static_assert(kTokens == 128 || kTokens == 256, "two halves of a wgmma's columns");
    static_assert(kConsumers == 2 || kConsumers == 3, "their registers are spelled out");
    static_assert(kChunks % kSlots == 0, "every tile starts in slot 0");
    static_assert(kIsRaw || sizeof(Output) <= 4, "float32, float16, bfloat16 or int32");
    static_assert(!kIsRaw || std::is_same_v<Sum, int32_t>, "raw sums are those of integers");
    static_assert(kStageBytes % 1024 == 0 && kSlotBytes % 1024 == 0, "swizzles start on 1024 bytes");
    static_assert(kSharedBytes <= 232448, "a CTA of sm_90 has 227 KB");
};

/// Tiles of a CTA: clusters walk over n within groups of raster_tokens tiles of the input.
template <typename S>
class Walk {
 public:
    __device__ __forceinline__ explicit Walk(const GemmInt8Sm90Params& p)
        : p_(p), tile_(int(blockIdx.x) / S::kCluster) {}
    __device__ __forceinline__ bool is_done() const {
        return tile_ >= p_.num_token_tiles * p_.num_column_tiles;
    }
    __device__ __forceinline__ bool is_last() const {
        return tile_ + step() >= p_.num_token_tiles * p_.num_column_tiles;
    }
    __device__ __forceinline__ void advance() { tile_ += step(); }
    /// The first token and this CTA's first column.
    __device__ __forceinline__ int2 corner() const {
        const int group_size = p_.raster_tokens * p_.num_column_tiles;
        const int group = tile_ / group_size, rest = tile_ - group * group_size;
        const int first = group * p_.raster_tokens, num = min(p_.raster_tokens, p_.num_token_tiles - first);
        const int column = rest / num, token = first + rest - column * num;
        return make_int2(token * S::kTokens, (column * S::kCluster + rank()) * S::kColumns);
    }
    static __device__ __forceinline__ int rank() { return S::kCluster > 1 ? cluster_rank() : 0; }
    /// A tile's first and last block are treated apart, so there are two; beyond K the loads bring zeros.
    static __device__ __forceinline__ int num_blocks(const GemmInt8Sm90Params& p) {
        return max(2, (p.o.k + kCodeBlock - 1) / kCodeBlock);
    }

 private:
    static __device__ __forceinline__ int step() { return int(gridDim.x) / S::kCluster; }

    const GemmInt8Sm90Params& p_;
    int tile_;
};

/// One lane fills the ring. While the kernel before this one ends, it may already fetch the first tile's weight.
template <typename S>
__device__ __forceinline__ void load_stages(const GemmInt8Sm90Params& p, uint32_t base) {
    const int num_blocks = Walk<S>::num_blocks(p), rank = Walk<S>::rank();
    constexpr int kShare = S::kTokens / S::kCluster;  // of a tile's tokens; the cluster's CTAs get them all
    const auto load_weight = [&](int slot, int block, int column) {
        barrier_expect(base + S::kFull + 8 * slot, S::kStageBytes);
        tma_load(base + slot * S::kStageBytes, &p.weight, block * kCodeBlock, column,
                 base + S::kFull + 8 * slot);
    };
    Walk<S> walk(p);
    int num_early = 0;
    if (p.o.weights_ready)
        for (const int column = walk.corner().y; num_early < min(S::kStages, num_blocks); ++num_early)
            load_weight(num_early, num_early, column);
    wait_for_earlier_kernels();
    for (Ring<S::kStages> ring; !walk.is_done(); walk.advance()) {
        const int2 corner = walk.corner();
        for (int block = 0; block < num_blocks; ++block, ring.advance()) {
            const uint32_t full = base + S::kFull + 8 * ring.slot;
            const uint32_t input =
                base + ring.slot * S::kStageBytes + S::kWeightBytes + rank * kShare * kCodeBlock;
            if (num_early > 0) {
                --num_early;
            } else {
                barrier_wait(base + S::kEmpty + 8 * ring.slot, ring.parity ^ 1);
                load_weight(ring.slot, block, corner.y);
            }
            if constexpr (S::kCluster == 1)
                tma_load(input, &p.input, block * kCodeBlock, corner.x, full);
            else
                tma_load_multicast(input, &p.input, block * kCodeBlock, corner.x + rank * kShare, full,
                                   (1 << S::kCluster) - 1);
        }
    }
}

/// A warp brings the factors of a tile's rows; `parity` is that of the tile's number.
template <typename S>
__device__ __forceinline__ void bring_factors(const GemmInt8Sm90Params& p, uint32_t base, const Walk<S>& walk,
                                              uint32_t parity) {
    const int lane = threadIdx.x % 32, first_token = walk.corner().x;
    float factor[S::kTokens / 32];
    #pragma unroll
    for (int i = 0; i < S::kTokens / 32; ++i) {
        const int token = first_token + lane + 32 * i;
        factor[i] = token < p.o.m ? row_factor(p.o.input_scales, token) : 0.0f;
    }
    barrier_wait(base + S::kFactorsEmpty, parity ^ 1);
    #pragma unroll
    for (int i = 0; i < S::kTokens / 32; ++i)
        store_shared_4(base + S::kFactors + 4 * (lane + 32 * i), __float_as_uint(factor[i]));
    barrier_arrive(base + S::kFactorsFull);
}

/// A warp stores what one consumer stages of a tile.
template <typename S>
__device__ __forceinline__ void store_chunks(const GemmInt8Sm90Params& p, uint32_t base, int consumer,
                                             const Walk<S>& walk, Ring<S::kSlots>& ring) {
    using Output = typename S::Output;
    const int lane = threadIdx.x % 32;
    const int2 corner = walk.corner();
    const int column = corner.y + consumer * 64;
    for (int chunk = 0; chunk < S::kChunks; ++chunk, ring.advance()) {
        const int token = corner.x + chunk * S::kChunk, index = consumer * S::kSlots + ring.slot;
        const uint32_t slot = base + S::kSlotsAt + index * S::kSlotBytes;
        barrier_wait(base + S::kSlotFull + 8 * index, ring.parity);
        if (p.output_by_tma) {
            if (lane == 0) {
                #pragma unroll
                for (int box = 0; box < S::kBoxes; ++box)
                    if (token < p.o.m && column + box * S::kBoxColumns < p.o.n)
                        tma_store(&p.output, slot + box * S::kChunk * 128, column + box * S::kBoxColumns,
                                  token);
                tma_store_wait_read();
            }
        } else {
            for (int i = lane; i < S::kChunk * 64; i += 32) {
                const int r = i / 64, c = i % 64, byte = c % S::kBoxColumns * int(sizeof(Output));
                const uint32_t from = slot + (c / S::kBoxColumns * S::kChunk + r) * 128 +
                                      (((byte / 16) ^ (r % 8)) << 4) + byte % 16;
                if (token + r >= p.o.m || column + c >= p.o.n) continue;
                const int64_t to = int64_t(token + r) * p.o.n + column + c;
                if constexpr (sizeof(Output) == 2)
                    static_cast<uint16_t*>(p.o.output)[to] = uint16_t(load_shared_2(from));
                else
                    static_cast<uint32_t*>(p.o.output)[to] = load_shared_4(from);
            }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(base + S::kSlotEmpty + 8 * index);
    }
}

/// The first warpgroup: warp 0 loads, warp 1 brings factors, warps 2 and 3 store for a consumer each, warp 1 for the
/// third.
template <typename S>
__device__ __forceinline__ void load_and_store(const GemmInt8Sm90Params& p, uint32_t base) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp == 0) {
        if (threadIdx.x == 0) load_stages<S>(p, base);
        return;
    }
    const int consumer = warp == 1 ? 2 : warp - 2;
    wait_for_earlier_kernels();
    Ring<S::kSlots> ring;
    uint32_t parity = 0;
    for (Walk<S> walk(p); !walk.is_done(); walk.advance(), parity ^= 1) {
        if (!S::kIsRaw && warp == 1) bring_factors<S>(p, base, walk, parity);
        if (consumer < S::kConsumers) store_chunks<S>(p, base, consumer, walk, ring);
    }
    if (threadIdx.x % 32 == 0) tma_store_wait();
}

}  // namespace gemm_int8
