// What feeds the multiplying warpgroups of gemm_4bit_mid: arguments, layout of shared memory, the copying thread and
// the warps of scales.
#pragma once
#include "gemm_4bit_wgmma.cuh"

/// Arguments of gemm_4bit_mid; mirrored by `ops::gemm_4bit::Gemm4bitMidParams`.
struct Gemm4bitMidParams {
    TensorMap
        input;  // [k / 64, m, 64] T: dimensions {64, m, k / 64}, box {64, kTokens, kStageBlocks}, 128 B swizzle
    TensorMap packed;  // [n, k / 2] bytes, box {32 kStageBlocks, rows_per_tile}, swizzle as wide as the box
    TensorMap
        absmax;  // [n, k / block] float, box {stage's columns / block, rows_per_tile}; only if scales_by_copy
    Gemm4bitOperands o;
    int32_t rows_per_tile;  // of a cluster; a multiple of 16, at most 64 kTiles
    int32_t
        scales_by_copy;  // TMA brings them: blocks of kUnit, not nested, rows and boxes of multiples of 16 bytes
};
static_assert(sizeof(Gemm4bitMidParams) == 512, "keep in step with the Rust mirror");

namespace mid {

using namespace wgmma;

/// kTiles row tiles of 64 x kGroups groups of warpgroups that take stages in turn; each warpgroup holds the
/// sums of one row tile over its group's stages. kUnit elements share a scale at most.
template <int kTokens_, int kTiles_, int kGroups_, int kStageBlocks_, int kUnit_, bool kLooksAhead_ = false>
struct Shape {
    static constexpr int kTokens = kTokens_, kTiles = kTiles_, kGroups = kGroups_;
    static constexpr int kStageBlocks = kStageBlocks_, kUnit = kUnit_;
    static constexpr int kStageK = 64 * kStageBlocks;
    static constexpr int kRows = 64 * kTiles;
    static constexpr int kWarpgroups = kTiles * kGroups;
    static constexpr int kConsumers = 128 * kWarpgroups;  // threads
    static constexpr int kThreads = kConsumers + 128;     // a warp copies, kScaleWarps bring scales
    static constexpr int kScaleWarps = 2;
    static constexpr int kAhead = kTiles == 1 ? 2 : 0;  // panels of scales
    // Up to 16 tokens by products of one warp, see gemm_4bit_mid_mma.cuh.
    static constexpr bool kUsesMma = kTokens == 16;
    // ptxas gives all threads what fits a quarter of the SM's registers with the warps that share it; 4 and 1
    // warpgroups, 96 each, or 2 and 1, 168 each. Raising and lowering must keep the sum.
    static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 216 : kWarpgroups == 3 ? 144 : 104;
    static constexpr int kProducerRegisters = kWarpgroups == 2 ? 72 : kWarpgroups == 3 ? 80 : 64;
    // Two sets of sums for 128 tokens and 64 rows: while one is added the other is multiplied.
    static constexpr bool kIsLean = (kTokens == 64 && kWarpgroups == 4) || kUnit == 32;  // of registers
    static constexpr int kHalves = kTokens == 128 && !kLooksAhead_ ? 2 : 1, kSums = kTokens / 2 / kHalves;
    // While wgmma works on a block the next one is decoded, where registers suffice for two fragments.
    static constexpr bool kOverlaps = kTokens == 64 ? kWarpgroups < 4 : kTokens != 32 || kUnit == 64;
    // .. even that of the next stage; with fewer tokens this only keeps a stage from being filled.
    static constexpr bool kLooksAhead = kLooksAhead_;
    static constexpr int kStageUnits = kStageK / kUnit;
    static constexpr int kPanelStages = 8 / kStageUnits;  // the scales of 8 units are fetched together

    // Rows of 128 bytes are faster up to 32 tokens, but 32 x 64 and blocks of 32 would spill.
    static constexpr int kTableRowBytes = kUsesMma || (kUnit == 64 && kTokens <= 16 * kTiles) ? 128 : 256;
    static constexpr int kTableBytes = 256 * kTableRowBytes;
    static constexpr int kInputBytes = kTokens * 128;  // of one block of 64
    static constexpr int kRowBytes = 32 * kStageBlocks;
    static constexpr int kCodesBytes = kRows * kRowBytes;
    static constexpr int kScalesBytes = kRows * kStageUnits * 4;
    static constexpr int kStageBytes = kStageBlocks * kInputBytes + kCodesBytes + kScalesBytes;
    static constexpr int kFixedBytes = kTableBytes + 1024 + 512;  // map of nested absmax, barriers
    // A multiple of kGroups, so that a slot belongs to one group: a group that is more than a round ahead of
    // another would take the parity of the round before last for its own.
    static constexpr int kMostStages = (232448 - kFixedBytes) / kStageBytes;
    static constexpr int kStages = (kMostStages < 16 ? kMostStages : 16) / kGroups * kGroups;
    static constexpr int kInput = kTableBytes;
    static constexpr int kCodes = kInput + kStages * kStageBlocks * kInputBytes;
    static constexpr int kScales = kCodes + kStages * kCodesBytes;
    static constexpr int kMap = kScales + kStages * kScalesBytes;
    static constexpr int kFull = kMap + 1024, kEmpty = kFull + 8 * kStages, kSumsReady = kEmpty + 8 * kStages;
    static constexpr int kSumsFree = kSumsReady + 8;
    static constexpr int kSmemBytes = kFixedBytes + kStages * kStageBytes;
    // Behind a tile the place of the input takes kPartials sums of each row tile, while the codes of the next tile come:
    // [token][68 or 72] floats each; 64 + 4 or 8 spreads the banks.
    static constexpr int kPartials = kUsesMma ? 2 * kGroups : kGroups;
    static constexpr int kSumsPitch = (kUsesMma ? 72 : 68) * 4;
    static constexpr int kSumsBytes = kTokens * kSumsPitch;

    static_assert(kStageBlocks == 2 || kStageBlocks == 4, "rows of 64 or 128 bytes");
    static_assert(kStageUnits <= 8, "a panel of scales is a stage or more");
    static_assert(kStages >= 2, "a stage is filled while another is used");
    static_assert(kSumsBytes * kTiles * kPartials <= kCodes - kInput, "the sums fit the place of the input");
    static_assert(kCodes % 1024 == 0, "swizzle patterns repeat on absolute addresses");
};

// Named barriers.
constexpr int kRingFree = 1;  // those that multiply
constexpr int kMapReady = 2;  // the warps of scales: the map of nested absmax

/// Stages [begin, end) of this CTA: whole panels, so that scales come in aligned vectors.
struct Part {
    int rank, size, begin, end;
    template <typename S>
    static __device__ __forceinline__ Part of(const Gemm4bitMidParams& p, S) {
        const int rank = cluster_rank(), size = cluster_size();
        const int num_stages = (p.o.k + S::kStageK - 1) / S::kStageK;
        const int num_panels = (num_stages + S::kPanelStages - 1) / S::kPanelStages;
        return {rank, size, num_panels * rank / size * S::kPanelStages,
                min(num_panels * (rank + 1) / size * S::kPanelStages, num_stages)};
    }
};

/// First rows of the tiles of this CTA: from first_row() on, row_step() apart. More than one only where a cluster is
/// one CTA. Not kept: registers are short.
__device__ __forceinline__ int first_row(const Gemm4bitMidParams& p) {
    return int(blockIdx.x) / cluster_size() * p.rows_per_tile;
}
__device__ __forceinline__ int row_step(const Gemm4bitMidParams& p) {
    return int(gridDim.x) / cluster_size() * p.rows_per_tile;
}

/// The copying thread.
template <typename S>
__device__ __forceinline__ void copy(const Gemm4bitMidParams& p, const Part& part, uint32_t base,
                                     int first_token) {
    Ring<S::kStages> ring;
    uint32_t sums_parity = 0;
    for (int row = first_row(p); row < p.o.n; row += row_step(p)) {
        const auto load_codes = [&](int stage, const Ring<S::kStages>& at) {
            const uint32_t full = base + S::kFull + 8 * at.slot;
            barrier_wait(base + S::kEmpty + 8 * at.slot, at.parity ^ 1);
            const int row_bytes = S::kRowBytes + (p.scales_by_copy ? S::kStageUnits * 4 : 0);
            barrier_expect(full, S::kStageBlocks * S::kInputBytes + p.rows_per_tile * row_bytes);
            if (p.scales_by_copy)
                tma_load(base + S::kScales + at.slot * S::kScalesBytes, &p.absmax, stage * S::kStageUnits,
                         row, full);
            tma_load(base + S::kCodes + at.slot * S::kCodesBytes, &p.packed, stage * S::kRowBytes, row, full);
        };
        // Codes that are asked for before the kernels before this one, or this one's tile before, have finished.
        int early = part.begin;
        if (row > first_row(p) || p.o.weights_ready)
            for (auto at = ring; early < part.end && early < part.begin + S::kStages; ++early, at.advance())
                load_codes(early, at);
        if (row == first_row(p)) {
            wait_for_earlier_kernels();
        } else {
            barrier_wait(base + S::kSumsFree, sums_parity);
            sums_parity ^= 1;
        }
        for (int stage = part.begin; stage < part.end; ++stage) {
            if (stage >= early) load_codes(stage, ring);
            tma_load(base + S::kInput + ring.slot * S::kStageBlocks * S::kInputBytes, &p.input, 0,
                     first_token, stage * S::kStageBlocks, base + S::kFull + 8 * ring.slot);
            ring.advance();
        }
    }
}

/// The warps of scales: two lanes a row, each four units of a panel of eight.
template <typename S>
__device__ __forceinline__ void bring_scales(const Gemm4bitMidParams& p, const Part& part, uint32_t base) {
    const uint32_t full = base + S::kFull, empty = base + S::kEmpty;
    const int lane = threadIdx.x % 32, half = lane % 2;
    const int lane_row =
        (threadIdx.x / 32 - S::kConsumers / 32 - 1) * 16 + lane / 2;  // the first of this lane's
    constexpr int kStep = 16 * S::kScaleWarps, kPasses = S::kRows / kStep;
    const RowScales<S::kUnit, kPasses> scales(p.o, base + S::kMap);
    // A panel takes the latency of memory, 0.9 us under load. Of 64 rows, kAhead of them are under way beside the
    // one in use; one of 128 rows lasts long enough.
    uint4 v[kPasses], ahead[S::kAhead + 1][kPasses];
    Ring<S::kStages> ring;
    for (int row = first_row(p); row < p.o.n; row += row_step(p)) {
        const auto load = [&](uint4(&to)[kPasses], int panel) {
            scales.load(to, row + lane_row, kStep, panel * S::kStageUnits + 4 * half);
        };
        load(v, part.begin);
        #pragma unroll
        for (int i = 0; i < S::kAhead; ++i) load(ahead[i], part.begin + (i + 1) * S::kPanelStages);
        for (int panel = part.begin; panel < part.end; panel += S::kPanelStages) {
            scales.decode(v);
            #pragma unroll
            for (int i = 0; i < S::kPanelStages; ++i) {
                if (panel + i >= part.end) break;
                barrier_wait(empty + 8 * ring.slot, ring.parity ^ 1);
                const uint32_t at =
                    base + S::kScales + ring.slot * S::kScalesBytes + lane_row * S::kStageUnits * 4;
                #pragma unroll
                for (int j = 0; j < kPasses; ++j) {
                    const uint32_t to = at + j * kStep * S::kStageUnits * 4;
                    if (S::kStageUnits == 8) store_shared_16(to + 16 * half, v[j]);
                    if (S::kStageUnits == 4 && half == i) store_shared_16(to, v[j]);
                    if (S::kStageUnits == 2 && half == i / 2)
                        store_shared_8(to, i % 2 ? make_uint2(v[j].z, v[j].w) : make_uint2(v[j].x, v[j].y));
                }
                barrier_arrive(full + 8 * ring.slot);
                ring.advance();
            }
            if constexpr (S::kAhead == 0) {
                load(v, panel + S::kPanelStages);
                scales.prefetch(row + lane_row, kStep,
                                (panel + 2 * S::kPanelStages) * S::kStageUnits + 4 * half);
            } else {
                #pragma unroll
                for (int j = 0; j < kPasses; ++j) {
                    v[j] = ahead[0][j];
                    #pragma unroll
                    for (int i = 1; i < S::kAhead; ++i) ahead[i - 1][j] = ahead[i][j];
                }
                load(ahead[S::kAhead - 1], panel + (S::kAhead + 1) * S::kPanelStages);
            }
        }
    }
}

}  // namespace mid
