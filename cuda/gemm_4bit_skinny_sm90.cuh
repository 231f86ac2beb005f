// Skinny 4-bit GEMM on sm_90a: the weight passes a ring in shared memory, the input stays in registers.
// Codes in place, two to a byte, absmax per block: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
#pragma once
#include "gemm_4bit_skinny_sm90_nested.cuh"
#include "gemm_4bit_skinny_sm90_sums.cuh"

/// Arguments of gemm_4bit_skinny_columns; mirrored by `ops::gemm_4bit::skinny_sm90::SkinnySm90Params`.
struct Gemm4bitSkinnySm90Params {
    TensorMap
        packed_map;  // packed as uint8 [k / 256, n, 128], box [panel / 256, rows, 128], 128-byte swizzle
    TensorMap
        absmax_map;  // absmax as [n, k / block], box [rows, panel / block], swizzle of a box row's bytes;
                     // nested: no swizzle, and 16 bytes of a row at least
    Gemm4bitSkinnyParams problem;  // packed and absmax are not read through it
    int32_t weights_ready;         // 1: no kernel in flight writes the weight: it is loaded before their end
    uint32_t zero;  // 0, which the compiler does not know: `& zero` makes an order a dependency
};
static_assert(sizeof(Gemm4bitSkinnySm90Params) == 384, "keep in step with the Rust mirror");

namespace skinny_sm90 {

template <bool kNested_, int kTokens_, int kPanels_, int kWarps_, int kPanel_ = 2048, int kRowTiles_ = 1,
          int kCluster_ = 1>
struct Shape {
    static constexpr bool kNested = kNested_;
    static constexpr int kTokens = kTokens_;      // at most
    static constexpr int kPanels = kPanels_;      // of a CTA's part of a row, at most
    static constexpr int kWarps = kWarps_;        // that multiply; each owns the same columns of every panel
    static constexpr int kPanel = kPanel_;        // columns of a stage
    static constexpr int kRowTiles = kRowTiles_;  // tiles of 16 rows of a stage
    static constexpr int kCluster = kCluster_;    // CTAs that divide the panels of a row
    static constexpr int kStages = 4;
    static constexpr int kRows = 16 * kRowTiles, kConsumers = kWarps * 32,
                         kThreads = kConsumers + (kNested ? 96 : 64);
    static constexpr int kUnits = kPanel / 64 / kWarps;  // blocks of 64 columns of a warp in a panel
    static constexpr int kSetBlocks = 8 / kTokens;       // blocks whose input is one operand of the product
    static constexpr int kSets = (kUnits * kPanels + kSetBlocks - 1) / kSetBlocks;
    static constexpr int kCodeBytes = kRows * kPanel / 2;
    static constexpr int kScaleBytes = kRows * kPanel / 16;
    static constexpr int kStageBytes = kCodeBytes + kScaleBytes + (kNested ? 1024 : 0);
    // Shared memory: table of pairs, ring, two maps of nested absmax, sums, barriers.
    static constexpr int kRing = 32768, kMap = kRing + kStages * kStageBytes,
                         kSums = kMap + (kNested ? 2048 : 0);
    using TileSums = Sums<kTokens, kWarps, kRowTiles, kCluster>;
    static constexpr int kBarriers = kSums + TileSums::kBytes;
    static constexpr int kSharedBytes = kBarriers + 24 * kStages + 48;
    static_assert(kTokens == 1 || kTokens == 2 || kTokens == 4 || kTokens == 8, "the product has 8 columns");
    static_assert(kUnits == 1 || kUnits == 2 || kUnits == 4, "blocks of 64 columns of a warp");
    static_assert(kRing % 1024 == 0 && kStageBytes % 1024 == 0, "the swizzle counts from there");
    static_assert(kCluster == 1 || (kCluster == 2 && kRowTiles == 2), "each CTA of a cluster ends 16 rows");
    static_assert(kSharedBytes <= 227 * 1024, "must fit a CTA");
};

/// Row of eight that fragment row g stands for. Even ones first: half a warp then reads from all banks.
__device__ __forceinline__ int memory_row(int g) { return g % 4 * 2 + g / 4; }

}  // namespace skinny_sm90

/// One CTA computes a range of tiles of rows, or two of a cluster do, each its half of the columns. The warps
/// divide the columns of each panel, so that a warp keeps its input in registers for all rows; they leave partial
/// sums of a tile to one more warp.
///
/// With fewer than eight tokens, the eight columns of a product are kSetBlocks blocks of 64 columns of each
/// token. Only the column of the block that is multiplied belongs to the sums; the lanes that hold it add it.
///
/// Columns behind K and rows behind N are zero: TMA fills them, and the input's stay as they began.
///
/// Shared memory limits it: of the 29.7 cycles that HBM leaves for 16 rows x 64 columns, reads take 21 (the
/// table's 16) and TMA's writes 5. Decoding one word of four in registers was slower: an SM does two PRMT a
/// cycle. So were bulk copies of rows in place of boxes: one takes 23 cycles to issue, behind the reads.
template <typename T, typename S>
__device__ __forceinline__ void gemm_4bit_skinny_columns(const Gemm4bitSkinnySm90Params& q) {
    using namespace skinny_sm90;
    using Stored = std::conditional_t<S::kNested, uint8_t, float>;
    constexpr bool kNested = S::kNested;
    constexpr int kTokens = S::kTokens, kUnits = S::kUnits, kStages = S::kStages, kPanel = S::kPanel;
    constexpr int kRowTiles = S::kRowTiles, kRows = S::kRows;
    const Gemm4bitSkinnyParams& p = q.problem;
    float* const shared = dynamic_shared();
    uint32_t base = shared_address(shared);
    keep_in_register(base);
    const uint32_t ring = base + S::kRing, full = base + S::kBarriers, empty = full + 8 * kStages,
                   ready = empty + 8 * kStages;
    const typename S::TileSums sums = {base + S::kSums, ready + 8 * kStages, ready + 8 * kStages + 16,
                                       ready + 8 * kStages + 32};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int k = int(p.k), group = blockIdx.x / S::kCluster, rank = S::kCluster > 1 ? cluster_rank() : 0;
    const int row_panels = (k + kPanel - 1) / kPanel, share = (row_panels + S::kCluster - 1) / S::kCluster;
    const int first_panel = rank * share, num_panels = min(share, row_panels - first_panel);
    const int num_tiles = p.tiles_per_cta + (group < p.num_larger_ctas);
    const int first_tile = group * p.tiles_per_cta + min(group, p.num_larger_ctas);
    const int64_t first_row = int64_t(first_tile) * kRows;
    const int row_scale_bytes = (kPanel >> p.block_shift) * 4;
    dependency_launch();

    if (threadIdx.x == S::kConsumers) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, kNested ? S::kConsumers : S::kWarps);
            if (kNested) barrier_init(ready + 8 * i, 32);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(sums.full + 8 * i, S::kConsumers);
            barrier_init(sums.empty + 8 * i, 32);
            if (S::kCluster > 1) barrier_init(sums.exchanged + 8 * i, 1);
        }
        fence_barrier_init();
    }
    if constexpr (S::kCluster > 1)
        cluster_sync();
    else
        __syncthreads();
    if (warp == S::kWarps) {
        if (lane > 0) return;
        if (!q.weights_ready) wait_for_earlier_kernels();
        const int row_bytes = max((kPanel >> p.block_shift) * int(sizeof(Stored)), 16);
        int s = 0;
        uint32_t parity = 1;  // the first round of the ring is free
        #pragma unroll 1
        for (int tile = first_tile; tile < first_tile + num_tiles; ++tile)
            #pragma unroll 1
            for (int panel = first_panel; panel < first_panel + num_panels; ++panel) {
                const uint32_t stage = ring + s * S::kStageBytes, barrier = full + 8 * s;
                const int block = panel * kPanel >> p.block_shift;
                barrier_wait(empty + 8 * s, parity);
                barrier_expect(barrier, S::kCodeBytes + kRows * row_bytes);
                tma_load(stage, &q.packed_map, 0, tile * kRows, panel * (kPanel / 256), barrier);
                // A box begins on 16 bytes of a row.
                tma_load(stage + S::kCodeBytes + (kNested ? S::kScaleBytes : 0), &q.absmax_map,
                         kNested ? block & -16 : block, tile * kRows, barrier);
                if (++s == kStages) s = 0, parity ^= 1;
            }
        return;
    }
    if (warp > S::kWarps) {
        if constexpr (kNested) {
            if (!q.weights_ready) wait_for_earlier_kernels();
            ScaleDecoder<S> decoder(p, shared_address(shared), full, ready, first_row, num_tiles, first_panel,
                                    num_panels, warp - S::kWarps - 1);
            decoder.decode(0);
            if (warp == S::kWarps + 1) {
                store_tiles<T, S>(p, sums, first_row, num_tiles, rank, [&](int tile) {
                    if (tile + 1 < num_tiles) decoder.decode(tile + 1);
                });
            } else {
                for (int tile = 1; tile < num_tiles; ++tile) decoder.decode(tile);
            }
        } else {
            store_tiles<T, S>(p, sums, first_row, num_tiles, rank, [](int) {});
        }
        return;
    }

    const int g = lane / 4, t = lane % 4, row = memory_row(g), first_column = warp * (kUnits * 64);
    uint4 x[S::kSets][2] =
        {};  // 16 columns of a block: token g / kSetBlocks, block g % kSetBlocks of the set
    const auto load_input = [&] {
        const int token = g / S::kSetBlocks;
        if (token >= p.m) return;
        const T* const input = static_cast<const T*>(p.input) + int64_t(token) * k;
        #pragma unroll
        for (int set = 0; set < S::kSets; ++set) {
            const int block = set * S::kSetBlocks + g % S::kSetBlocks, panel = block / kUnits;
            const int column = (first_panel + panel) * kPanel + first_column + block % kUnits * 64 + 16 * t;
            if (panel < num_panels && column < k) {
                x[set][0] = __ldg(reinterpret_cast<const uint4*>(input + column));
                x[set][1] = __ldg(reinterpret_cast<const uint4*>(input + column) + 1);
            }
        }
    };
    if (!q.weights_ready) {
        wait_for_earlier_kernels();
        load_input();
    }
    skinny::fill_pair_table<T>(p, shared);
    if (q.weights_ready) {
        wait_for_earlier_kernels();
        load_input();
    }
    named_barrier(1, S::kConsumers);

    uint32_t lane_table = base + 4 * lane, zero = q.zero;
    // Under the swizzle, piece i of 16 bytes of a row's 128 is piece i ^ row: block u is 32 u further on.
    uint32_t lane_codes = ring + warp * kUnits / 4 * (128 * kRows) + row * 128 +
                          ((warp * kUnits % 4 * 2 + t / 2) ^ row) * 16 + t % 2 * 8;
    // Scales of the blocks whose sums this lane keeps: in a panel these are two, or all.
    constexpr int kOwn = kTokens <= 2 && kUnits == 4 ? 2 : kUnits;
    const auto own_block = [&](int i) { return kOwn < kUnits ? 2 * (t % 2) + i : i; };
    uint32_t lane_scales[kOwn];
    #pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const uint32_t at = row * row_scale_bytes + ((first_column + own_block(i) * 64) >> p.block_shift) * 4;
        lane_scales[i] = ring + S::kCodeBytes + (at ^ (at >> 7 & (row_scale_bytes / 16 - 1)) << 4);
        keep_in_register(lane_scales[i]);
    }
    keep_in_register(lane_table);
    keep_in_register(lane_codes);
    keep_in_register(zero);
    const auto look_up = [=](uint32_t word, int byte) {
        return load_shared(__dp4a(word, 128u << 8 * byte, lane_table));
    };
    int s = 0;
    uint32_t parity = 0;
    #pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
        constexpr int kColumns = kTokens == 8 ? 2 : 1;
        float sum[kRowTiles][2][kColumns] = {};  // of rows g and g + 8
        #pragma unroll
        for (int panel = 0; panel < S::kPanels; ++panel) {
            if ((panel > 0 || S::kCluster > 1) && panel >= num_panels) break;
            barrier_wait((kNested ? ready : full) + 8 * s, parity);
            const uint32_t stage = s * S::kStageBytes;
            uint32_t scale[kRowTiles][kOwn][2];
            uint2 words[kRowTiles][kUnits][2];
            #pragma unroll
            for (int r = 0; r < kRowTiles; ++r) {
                #pragma unroll
                for (int i = 0; i < kOwn; ++i)
                    #pragma unroll
                    for (int h = 0; h < 2; ++h)
                        scale[r][i][h] =
                            load_shared_4(lane_scales[i] + stage + (2 * r + h) * 8 * row_scale_bytes);
                #pragma unroll
                for (int u = 0; u < kUnits; ++u) {
                    words[r][u][0] = load_shared_8((lane_codes ^ u * 32) + stage + r * 2048);
                    words[r][u][1] = load_shared_8<1024>((lane_codes ^ u * 32) + stage + r * 2048);
                }
            }
            // An arrival may overtake loads of shared memory in flight: stages were seen to be refilled under
            // them. They return in order, and the arrival's address depends on the last.
            const uint32_t seen =
                (words[kRowTiles - 1][kUnits - 1][0].x | words[kRowTiles - 1][kUnits - 1][1].x) & zero;
            __syncwarp();
            // Nested scales are overwritten by a warp, and racecheck follows only the lanes that arrive.
            if (kNested || lane == 0) barrier_arrive(empty + 8 * s + seen);
            if (++s == kStages) s = 0, parity ^= 1;
            #pragma unroll
            for (int unit = 0; unit < kRowTiles * kUnits; ++unit) {
                const int r = unit / kUnits, u = unit % kUnits, block = panel * kUnits + u;
                const int set = block / S::kSetBlocks, in_set = block % S::kSetBlocks;
                const uint32_t xs[8] = {x[set][0].x, x[set][0].y, x[set][0].z, x[set][0].w,
                                        x[set][1].x, x[set][1].y, x[set][1].z, x[set][1].w};
                float product[4] = {};
                #pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t top = i < 2 ? words[r][u][0].x : words[r][u][0].y;
                    const uint32_t bottom = i < 2 ? words[r][u][1].x : words[r][u][1].y;
                    const int byte = i % 2 * 2;
                    const uint32_t weights[4] = {look_up(top, byte), look_up(bottom, byte),
                                                 look_up(top, byte + 1), look_up(bottom, byte + 1)};
                    mma_m16n8k16<std::is_same_v<T, bfloat16>>(product, weights, xs[2 * i], xs[2 * i + 1]);
                }
                pin(product);  // or the compiler multiplies in the branch, without the other lanes
                if (kTokens >= 4 || t % (kTokens == 1 ? 4 : 2) == in_set / 2) {
                    const int own = kOwn < kUnits ? u % 2 : u;
                    #pragma unroll
                    for (int h = 0; h < 2; ++h)
                        #pragma unroll
                        for (int c = 0; c < kColumns; ++c)
                            sum[r][h][c] =
                                fmaf(__uint_as_float(scale[r][own][h]),
                                     product[2 * h + (kTokens == 8 ? c : in_set % 2)], sum[r][h][c]);
                }
            }
        }
        const int buffer = tile % 2;
        float* const to = shared + S::kSums / 4 + buffer * sums.kWords + warp * sums.kWarpWords + row;
        #pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (kTokens <= 2) sum[r][h][0] += __shfl_xor_sync(~0u, sum[r][h][0], 1);
                if (kTokens == 1) sum[r][h][0] += __shfl_xor_sync(~0u, sum[r][h][0], 2);
            }
        barrier_wait(sums.empty + 8 * buffer, (tile / 2 & 1) ^ 1);
        if (kTokens >= 4 || t % (kTokens == 1 ? 4 : 2) == 0) {
            const int token = kTokens == 8 ? 2 * t : t * kTokens / 4;
            #pragma unroll
            for (int r = 0; r < kRowTiles; ++r)
                #pragma unroll
                for (int h = 0; h < 2; ++h)
                    #pragma unroll
                    for (int c = 0; c < kColumns; ++c)
                        to[r * sums.kTileWords + (token + c) * sums.kTokenWords + 8 * h] = sum[r][h][c];
        }
        barrier_arrive(sums.full + 8 * buffer);
    }
}
