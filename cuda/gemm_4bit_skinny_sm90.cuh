// Skinny 4-bit GEMM on sm_90a: the weight passes a ring in shared memory, the input stays in registers.
// Codes in place, two to a byte, absmax per block: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
#pragma once
#include "gemm_4bit_skinny_mma.cuh"
#include "ptx_sm90.cuh"

/// Arguments of gemm_4bit_skinny_columns; mirrored by `ops::gemm_4bit::skinny_sm90::SkinnySm90Params`.
struct Gemm4bitSkinnySm90Params {
    TensorMap packed_map;  // packed as uint8 [k / 256, n, 128], box [8, 16, 128], 128-byte swizzle
    TensorMap absmax_map;  // absmax as [n, k / block], box [16, 2048 / block], swizzle of a box row's bytes
    Gemm4bitSkinnyParams problem;  // packed and absmax are not read through it
    int32_t weights_ready;         // 1: no kernel in flight writes the weight: it is loaded before their end
    uint32_t zero;  // 0, which the compiler does not know: `& zero` makes an order a dependency
};
static_assert(sizeof(Gemm4bitSkinnySm90Params) == 384, "keep in step with the Rust mirror");

namespace skinny_sm90 {

constexpr int kPanel = 2048;  // columns of a stage, which holds 16 rows

template <int kTokens_, int kPanels_, int kWarps_, int kStages_>
struct Shape {
    static constexpr int kTokens = kTokens_;  // at most
    static constexpr int kPanels = kPanels_;  // of a row, at most
    static constexpr int kWarps = kWarps_;    // that multiply; each owns the same columns of every panel
    static constexpr int kStages = kStages_;
    static constexpr int kConsumers = kWarps * 32, kThreads = kConsumers + 64;
    static constexpr int kUnits = kPanel / 64 / kWarps;  // blocks of 64 columns of a warp in a panel
    static constexpr int kSetBlocks = 8 / kTokens;       // blocks whose input is one operand of the product
    static constexpr int kSets = (kUnits * kPanels + kSetBlocks - 1) / kSetBlocks;
    static constexpr int kCodeBytes = 16 * kPanel / 2, kStageBytes = kCodeBytes + 16 * 128;
    static constexpr int kSumWords = kWarps * 16 * kTokens;  // [warp][token][row] of a tile
    // Shared memory: table of pairs, map of nested absmax, ring, sums of two tiles, barriers.
    static constexpr int kMap = 32768, kRing = kMap + 1024, kSums = kRing + kStages * kStageBytes;
    static constexpr int kBarriers = kSums + 2 * kSumWords * 4;
    static constexpr int kSharedBytes = kBarriers + 16 * kStages + 32;
    static_assert(kTokens == 1 || kTokens == 2 || kTokens == 4 || kTokens == 8, "the product has 8 columns");
    static_assert(kWarps == 8 || kWarps == 16, "a warp has four or two blocks of 64 columns");
    static_assert(kRing % 1024 == 0 && kStageBytes % 1024 == 0, "the swizzle counts from there");
    static_assert(kSharedBytes <= 227 * 1024, "must fit a CTA");
};

/// Row of eight that fragment row g stands for. Even ones first: half a warp then reads from all banks.
__device__ __forceinline__ int memory_row(int g) { return g % 4 * 2 + g / 4; }

/// Adds the warps' sums of each tile in their order; done by one warp. `full`, `empty`: two barriers each.
template <typename T, typename S>
__device__ __forceinline__ void store_tiles(const Gemm4bitSkinnyParams& p, const float* sums, uint32_t full,
                                            uint32_t empty, int64_t first_row, int num_tiles) {
    const int lane = threadIdx.x % 32;
    const float factor = inverse_factor<T>(p.codebook);
    uint32_t parity = 0;
    #pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
        const int buffer = tile % 2;
        barrier_wait(full + 8 * buffer, parity);
        #pragma unroll 1
        for (int o = lane; o < 16 * int(p.m); o += 32) {
            const int64_t row = first_row + tile * 16 + o % 16;
            const float* const from = sums + buffer * S::kSumWords + o;
            float sum = 0.0f;
            #pragma unroll
            for (int w = 0; w < S::kWarps; ++w) sum += from[w * (16 * S::kTokens)];
            if (row < p.n)
                static_cast<T*>(p.output)[o / 16 * p.n + row] = T(fmaf(sum, factor, load_bias(p, row)));
        }
        barrier_arrive(empty + 8 * buffer);
        parity ^= buffer;
    }
}

}  // namespace skinny_sm90

/// One CTA computes a range of tiles of 16 rows. Its warps divide the columns of each panel, so that a warp
/// keeps its input in registers for all rows; they leave partial sums of a tile to one more warp.
///
/// With fewer than eight tokens, the eight columns of a product are kSetBlocks blocks of 64 columns of each
/// token. Only the column of the block that is multiplied belongs to the sums; the lanes that hold it add it.
///
/// Columns behind K and rows behind N are zero: TMA fills them, and the input's stay as they began.
///
/// Shared memory limits it: of the 29.7 cycles that HBM leaves for 16 rows x 64 columns, reads take 21 (the
/// table's 16) and TMA's writes 5. Decoding one word of four in registers was slower: an SM does two PRMT a
/// cycle. So were bulk copies of rows in place of boxes: one takes 23 cycles to issue, behind the reads.
template <typename T, bool kNested, typename S>
__device__ __forceinline__ void gemm_4bit_skinny_columns(const Gemm4bitSkinnySm90Params& q) {
    using namespace skinny_sm90;
    using Stored = std::conditional_t<kNested, uint8_t, float>;
    constexpr int kTokens = S::kTokens, kUnits = S::kUnits, kStages = S::kStages;
    const Gemm4bitSkinnyParams& p = q.problem;
    float* const shared = dynamic_shared();
    uint32_t base = shared_address(shared);
    keep_in_register(base);
    const uint32_t ring = base + S::kRing, full = base + S::kBarriers, empty = full + 8 * kStages;
    const uint32_t sums_full = empty + 8 * kStages, sums_empty = sums_full + 16;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int k = int(p.k), cta = blockIdx.x, num_panels = (k + kPanel - 1) / kPanel;
    const int num_tiles = p.tiles_per_cta + (cta < p.num_larger_ctas);
    const int first_tile = cta * p.tiles_per_cta + min(cta, p.num_larger_ctas);
    const int64_t first_row = int64_t(first_tile) * 16;
    const int row_scale_bytes = (kPanel >> p.block_shift) * int(sizeof(Stored));
    dependency_launch();

    if (threadIdx.x == S::kConsumers) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, S::kWarps);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(sums_full + 8 * i, S::kConsumers);
            barrier_init(sums_empty + 8 * i, 32);
        }
        fence_barrier_init();
    }
    __syncthreads();
    if (warp == S::kWarps) {
        if (lane > 0) return;
        if (!q.weights_ready) dependency_wait();
        int s = 0;
        uint32_t parity = 1;  // the first round of the ring is free
        #pragma unroll 1
        for (int tile = first_tile; tile < first_tile + num_tiles; ++tile)
            #pragma unroll 1
            for (int panel = 0; panel < num_panels; ++panel) {
                const uint32_t stage = ring + s * S::kStageBytes, barrier = full + 8 * s;
                barrier_wait(empty + 8 * s, parity);
                barrier_expect(barrier, S::kCodeBytes + 16 * row_scale_bytes);
                tma_load(stage, &q.packed_map, 0, tile * 16, panel * (kPanel / 256), barrier);
                tma_load(stage + S::kCodeBytes, &q.absmax_map, panel * (kPanel >> p.block_shift), tile * 16,
                         barrier);
                if (++s == kStages) s = 0, parity ^= 1;
            }
        return;
    }
    if (warp > S::kWarps) {
        dependency_wait();
        store_tiles<T, S>(p, shared + S::kSums / 4, sums_full, sums_empty, first_row, num_tiles);
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
            const int block = set * S::kSetBlocks + g % S::kSetBlocks;
            const int column = block / kUnits * kPanel + first_column + block % kUnits * 64 + 16 * t;
            if (column < k) {
                x[set][0] = __ldg(reinterpret_cast<const uint4*>(input + column));
                x[set][1] = __ldg(reinterpret_cast<const uint4*>(input + column) + 1);
            }
        }
    };
    if (!q.weights_ready) {
        dependency_wait();
        load_input();
    }
    if constexpr (kNested) {
        const float* const from = p.absmax_codebook ? p.absmax_codebook : kDynamicMap.value;
        if (threadIdx.x < 256) shared[S::kMap / 4 + threadIdx.x] = from[threadIdx.x];
    }
    skinny::fill_pair_table<T>(p, shared);
    if (q.weights_ready) {
        dependency_wait();
        load_input();
    }
    named_barrier(1, S::kConsumers);

    uint32_t lane_table = base + 4 * lane, zero = q.zero;
    // Under the swizzle, piece i of 16 bytes of a row's 128 is piece i ^ row: block u is 32 u further on.
    uint32_t lane_codes = ring + warp * kUnits / 4 * 2048 + row * 128 +
                          ((warp * kUnits % 4 * 2 + t / 2) ^ row) * 16 + t % 2 * 8;
    // Scales of the blocks whose sums this lane keeps: in a panel these are two, or all.
    constexpr int kOwn = kTokens <= 2 ? 2 : kUnits;
    const auto own_block = [&](int i) { return kOwn < kUnits ? 2 * (t % 2) + i : i; };
    uint32_t lane_scales[kOwn];
    #pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const uint32_t at =
            row * row_scale_bytes + ((first_column + own_block(i) * 64) >> p.block_shift) * sizeof(Stored);
        lane_scales[i] = ring + S::kCodeBytes + (at ^ (at >> 7 & (row_scale_bytes / 16 - 1)) << 4);
        keep_in_register(lane_scales[i]);
    }
    keep_in_register(lane_table);
    keep_in_register(lane_codes);
    keep_in_register(zero);
    const auto look_up = [=](uint32_t word, int byte) {
        return load_shared(__dp4a(word, 128u << 8 * byte, lane_table));
    };
    const int row_blocks = k >> p.block_shift;
    const float absmax_offset = kNested ? *p.absmax_offset : 0.0f;
    int s = 0;
    uint32_t parity = 0;
    #pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
        constexpr int kColumns = kTokens == 8 ? 2 : 1;
        float sum[2][kColumns] = {};  // of rows g and g + 8
        const int64_t tile_block = (first_row + tile * 16) * row_blocks;
        #pragma unroll
        for (int panel = 0; panel < S::kPanels; ++panel) {
            if (panel > 0 && panel >= num_panels) break;
            float group[kOwn][2] = {};  // of 256 scales, nested only
            if constexpr (kNested)
                #pragma unroll
                for (int i = 0; i < kOwn; ++i)
                    #pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int column = panel * kPanel + first_column + own_block(i) * 64;
                        const int block = (row + 8 * h) * row_blocks + (column >> p.block_shift);
                        if (row + 8 * h < p.n - first_row - tile * 16 && column < k)
                            group[i][h] = __ldg(p.absmax_scale + (tile_block >> 8) +
                                                ((int(tile_block & 255) + block) >> 8));
                    }
            barrier_wait(full + 8 * s, parity);
            const uint32_t stage = s * S::kStageBytes;
            uint32_t raw[kOwn][2];
            uint2 words[kUnits][2];
            #pragma unroll
            for (int i = 0; i < kOwn; ++i)
                #pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint32_t at = lane_scales[i] + stage + h * 8 * row_scale_bytes;
                    raw[i][h] =
                        kNested ? reinterpret_cast<const uint8_t*>(shared)[at - base] : load_shared_4(at);
                }
            #pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                words[u][0] = load_shared_8((lane_codes ^ u * 32) + stage);
                words[u][1] = load_shared_8<1024>((lane_codes ^ u * 32) + stage);
            }
            // An arrival may overtake loads of shared memory in flight: stages were seen to be refilled under
            // them. They return in order, and the arrival's address depends on the last.
            const uint32_t seen = (words[kUnits - 1][0].x | words[kUnits - 1][1].x) & zero;
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + 8 * s + seen);
            if (++s == kStages) s = 0, parity ^= 1;
            float scale[kOwn][2];
            #pragma unroll
            for (int i = 0; i < kOwn; ++i)
                #pragma unroll
                for (int h = 0; h < 2; ++h)
                    if constexpr (kNested) {
                        const float value = shared[S::kMap / 4 + raw[i][h]];
                        scale[i][h] = __fadd_rn(__fmul_rn(value, group[i][h]), absmax_offset);
                    } else {
                        scale[i][h] = __uint_as_float(raw[i][h]);
                    }
            #pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                const int block = panel * kUnits + u, set = block / S::kSetBlocks,
                          in_set = block % S::kSetBlocks;
                const uint32_t xs[8] = {x[set][0].x, x[set][0].y, x[set][0].z, x[set][0].w,
                                        x[set][1].x, x[set][1].y, x[set][1].z, x[set][1].w};
                float product[4] = {};
                #pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t top = i < 2 ? words[u][0].x : words[u][0].y;
                    const uint32_t bottom = i < 2 ? words[u][1].x : words[u][1].y;
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
                            sum[h][c] = fmaf(scale[own][h], product[2 * h + (kTokens == 8 ? c : in_set % 2)],
                                             sum[h][c]);
                }
            }
        }
        const int buffer = tile % 2;
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (kTokens <= 2) sum[h][0] += __shfl_xor_sync(~0u, sum[h][0], 1);
            if (kTokens == 1) sum[h][0] += __shfl_xor_sync(~0u, sum[h][0], 2);
        }
        barrier_wait(sums_empty + 8 * buffer, (tile / 2 & 1) ^ 1);
        float* const sums = shared + S::kSums / 4 + buffer * S::kSumWords + warp * (16 * kTokens);
        if (kTokens >= 4 || t % (kTokens == 1 ? 4 : 2) == 0) {
            #pragma unroll
            for (int h = 0; h < 2; ++h)
                #pragma unroll
                for (int c = 0; c < kColumns; ++c)
                    sums[(kTokens == 8 ? 2 * t + c : t * kTokens / 4) * 16 + row + 8 * h] = sum[h][c];
        }
        barrier_arrive(sums_full + 8 * buffer);
    }
}
