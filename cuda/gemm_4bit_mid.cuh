// 4-bit GEMM for 9 to 128 tokens on sm_90a: decoded weights are the register operand of wgmma.
// Codes in place, two to a byte, absmax per block: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
#pragma once
#include "gemm_4bit_wgmma.cuh"

/// Arguments of gemm_4bit_mid; mirrored by `ops::gemm_4bit::Gemm4bitMidParams`.
struct Gemm4bitMidParams {
    TensorMap input;   // [k / 64, m, 64] T: dimensions {64, m, k / 64}, box {64, kTokens, kStageBlocks}, 128 B swizzle
    TensorMap packed;  // [n, k / 2] bytes, box {32 kStageBlocks, rows_per_tile}, swizzle as wide as the box
    Gemm4bitOperands o;
    int32_t rows_per_tile;  // of a cluster; a multiple of 16, at most 64 kTiles
};
static_assert(sizeof(Gemm4bitMidParams) == 384, "keep in step with the Rust mirror");

namespace mid {

using namespace wgmma;

/// kTiles row tiles of 64 x kGroups groups of warpgroups that take stages in turn; each warpgroup holds the
/// sums of one row tile over its group's stages. kUnit elements share a scale at most.
template <int kTokens_, int kTiles_, int kGroups_, int kStageBlocks_, int kUnit_,
          int kRegisterWords_ = (kTokens_ <= 32)>
struct Shape {
    static constexpr int kTokens = kTokens_, kTiles = kTiles_, kGroups = kGroups_;
    static constexpr int kStageBlocks = kStageBlocks_, kUnit = kUnit_;
    static constexpr int kStageK = 64 * kStageBlocks;
    static constexpr int kRows = 64 * kTiles;
    static constexpr int kWarpgroups = kTiles * kGroups;
    static constexpr int kConsumers = 128 * kWarpgroups;  // threads
    static constexpr int kThreads = kConsumers + 128;     // a warp copies, kScaleWarps bring scales
    static constexpr int kScaleWarps = 2;
    static constexpr int kAhead = kTiles == 1 ? 3 : 1;  // panels of scales
    // ptxas gives all threads what fits a quarter of the SM's registers with the warps that share it; 4 and 1
    // warpgroups, 96 each, or 2 and 1, 168 each. Raising and lowering must keep the sum.
    static constexpr bool kMovesRegisters = true;
    static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 216 : kWarpgroups == 3 ? 144 : 104;
    static constexpr int kProducerRegisters = kWarpgroups == 2 ? 72 : kWarpgroups == 3 ? 80 : 64;
    // Two sets of sums for 128 tokens: while one is added the other is multiplied.
    // Words of four that are decoded in registers, where the look-ups are the limit and registers suffice.
    static constexpr int kRegisterWords = kRegisterWords_;
    static constexpr int kHalves = kTokens == 128 ? 2 : 1, kSums = kTokens / 2 / kHalves;
    // While wgmma works on a block the next one is decoded, where registers suffice for two fragments.
    static constexpr bool kOverlaps = kTokens != 64 || kWarpgroups < 4;
    // .. even that of the next stage; with fewer tokens this only keeps a stage from being filled.
    static constexpr bool kLooksAhead = kTokens == 128;
    static constexpr int kStageUnits = kStageK / kUnit;
    static constexpr int kPanelStages = 8 / kStageUnits;  // the scales of 8 units are fetched together

    static constexpr int kInputBytes = kTokens * 128;  // of one block of 64
    static constexpr int kRowBytes = 32 * kStageBlocks;
    static constexpr int kCodesBytes = kRows * kRowBytes;
    static constexpr int kScalesBytes = kRows * kStageUnits * 4;
    static constexpr int kStageBytes = kStageBlocks * kInputBytes + kCodesBytes + kScalesBytes;
    static constexpr int kFixedBytes = kPairTableBytes + 1024 + 512;  // map of nested absmax, barriers
    // A multiple of kGroups, so that a slot belongs to one group: a group that is more than a round ahead of
    // another would take the parity of the round before last for its own.
    static constexpr int kMostStages = (232448 - kFixedBytes) / kStageBytes;
    static constexpr int kStages = (kMostStages < 16 ? kMostStages : 16) / kGroups * kGroups;
    static constexpr int kInput = kPairTableBytes;
    static constexpr int kCodes = kInput + kStages * kStageBlocks * kInputBytes;
    static constexpr int kScales = kCodes + kStages * kCodesBytes;
    static constexpr int kMap = kScales + kStages * kScalesBytes;
    static constexpr int kFull = kMap + 1024, kEmpty = kFull + 8 * kStages, kSumsReady = kEmpty + 8 * kStages;
    static constexpr int kSmemBytes = kFixedBytes + kStages * kStageBytes;
    // At the end the ring takes the sums of all warpgroups: [token][68] floats each; 64 + 4 spreads the banks.
    static constexpr int kSumsPitch = 68 * 4;
    static constexpr int kSumsBytes = kTokens * kSumsPitch;

    static_assert(kStageBlocks == 2 || kStageBlocks == 4, "rows of 64 or 128 bytes");
    static_assert(kStageUnits <= 8, "a panel of scales is a stage or more");
    static_assert(kStages >= 2, "a stage is filled while another is used");
    static_assert(kSumsBytes * kWarpgroups <= kMap - kInput, "the sums fit the ring");
    static_assert(kCodes % 1024 == 0, "swizzle patterns repeat on absolute addresses");
};

// Named barriers.
constexpr int kReady = 1;     // all threads: mbarriers and pair table
constexpr int kRingFree = 2;  // those that multiply
constexpr int kMapReady = 3;  // the warps of scales: the map of nested absmax

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

/// The multiplying warpgroups. A block of 64 k is sixteen fragment registers, four wgmma into sums that start
/// at zero, and one scaled addition in fp32: the scale is not rounded and the codes hardly are (kFactor).
template <typename T, typename S>
__device__ __forceinline__ void multiply(float (&acc)[S::kTokens / 2], const Part& part, uint32_t base,
                                         int codebook, int rows_per_tile) {
    constexpr int kTokens = S::kTokens;
    // From a shuffle the compiler knows that the warp agrees, and keeps the ring in uniform registers.
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const int tile = warpgroup % S::kTiles, group = warpgroup / S::kTiles;
    const int lane = threadIdx.x % 32;
    const int row = tile * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;  // this lane's rows: row, row + 8
    // PRMT makes the address 256 byte + 4 lane of a pair out of a word of codes and this. The top byte of a
    // shared address is the rank in the cluster.
    const uint32_t pair_lane = opaque((base & 0xff000000) | lane * 4);
    const QuadTranspose transpose(lane);
    const RegisterTable<T> table(codebook);
    // What this lane addresses for load_matrices: row lane % 8 + 8 (lane / 16), piece lane / 8 % 2. The pieces of
    // the other blocks differ in the bits above.
    const uint32_t codes_at = opaque(
        base + S::kCodes +
        swizzled_offset<S::kRowBytes>(row - lane / 4 + lane % 8 + lane / 16 * 8, lane / 8 % 2));
    const uint32_t scales_at = opaque(base + S::kScales + row * S::kStageUnits * 4);
    const uint64_t input = operand_descriptor(base + S::kInput);
    const uint32_t full = base + S::kFull, empty = base + S::kEmpty;

    uint32_t a[S::kOverlaps ? 2 : 1][16];
    if (kTokens < 64 && S::kTiles > 1)
        for (auto& fragments : a)
            for (uint32_t& v : fragments) v = 0;
    // Warps beyond the tile have nothing to decode. (With 64 tokens or more the branch takes registers that lack.)
    const bool is_active = S::kTiles == 1 || kTokens >= 64 || row - lane / 4 < rows_per_tile;
    const auto decode = [&](uint32_t (&to)[16], int slot, int block) {
        if (!is_active) return;
        uint32_t words[4];  // pieces 2 block, 2 block + 1 of rows r, then of rows r + 8
        load_matrices(words, codes_at + slot * S::kCodesBytes ^ block << 5);
        transpose(words);
        #pragma unroll
        for (int i = 0; i < 16; ++i) {  // register i % 4 of k16 step i / 4: row half i % 2, k = 2t or 2t + 8
            const int word = i % 2 * 2 + i / 8, byte = i / 4 % 2 * 2 + i / 2 % 2;
            if (word < 4 - S::kRegisterWords)
                to[i] = load_shared_4<kSmemStart>(permute_bytes(words[word], pair_lane, 0x7604 | byte << 4));
        }
        #pragma unroll
        for (int word = 4 - S::kRegisterWords; word < 4; ++word) {
            uint32_t pairs[4];
            table.decode(pairs, words[word]);
            #pragma unroll
            for (int byte = 0; byte < 4; ++byte)
                to[word % 2 * 8 + word / 2 + byte / 2 * 4 + byte % 2 * 2] = pairs[byte];
        }
    };
    constexpr int kUnits = 64 / S::kUnit, kSteps = S::kUnit / 16;  // units of a block, k16 steps of a unit
    float scale[2][S::kStageUnits], sums[S::kHalves][S::kSums];
    const auto start = [&](const uint32_t (&fragments)[16], int slot, int block, int unit, int half) {
        const uint64_t b = input + (slot * S::kStageBlocks + block) * (S::kInputBytes / 16) +
                           half * (S::kInputBytes / 16 / S::kHalves) + unit * kSteps * 2;
        pin(sums[half]);
        wgmma_fence();
        wgmma_k16<T, kTokens / S::kHalves, false>(sums[half], fragments + 4 * unit * kSteps, b);
        #pragma unroll
        for (int step = 1; step < kSteps; ++step)
            wgmma_k16<T, kTokens / S::kHalves>(sums[half], fragments + 4 * (unit * kSteps + step), b + 2 * step);
        wgmma_commit();
    };
    const auto add = [&](int half, int unit) {
        pin(sums[half]);
        #pragma unroll
        for (int i = 0; i < S::kSums; ++i)
            acc[half * S::kSums + i] = fmaf(scale[i / 2 % 2][unit], sums[half][i], acc[half * S::kSums + i]);
    };

    Ring<S::kStages> ring;
    ring.advance(group);
    int stage = part.begin + group;
    if (S::kLooksAhead && stage < part.end) {
        barrier_wait(full + 8 * ring.slot, ring.parity);
        decode(a[0], ring.slot, 0);
    }
    while (stage < part.end) {
        const int slot = ring.slot;
        if (!S::kLooksAhead) barrier_wait(full + 8 * slot, ring.parity);
        ring.advance(S::kGroups);
        stage += S::kGroups;
        #pragma unroll
        for (int half = 0; half < 2; ++half) {
            #pragma unroll
            for (int i = 0; i < S::kStageUnits; i += 2) {
                const uint2 v = load_shared_8(scales_at + slot * S::kScalesBytes + 8 * half * S::kStageUnits * 4 + 4 * i);
                scale[half][i] = __uint_as_float(v.x), scale[half][i + 1] = __uint_as_float(v.y);
            }
        }
        if (S::kOverlaps && !S::kLooksAhead) decode(a[0], slot, 0);
        #pragma unroll
        for (int block = 0; block < S::kStageBlocks; ++block) {
            uint32_t(&now)[16] = a[S::kOverlaps ? block % 2 : 0];
            if (!S::kOverlaps) decode(now, slot, block);
            #pragma unroll
            for (int unit = 0; unit < kUnits; ++unit) {
                pin(now);
                #pragma unroll
                for (int half = 0; half < S::kHalves; ++half) start(now, slot, block, unit, half);
                if (S::kOverlaps && unit == 0) {
                    uint32_t(&next)[16] = a[(block + 1) % 2];
                    if (block + 1 < S::kStageBlocks) {
                        decode(next, slot, block + 1);
                    } else if (S::kLooksAhead) {  // of the next stage; behind the last one the slot holds what it may
                        if (stage < part.end) barrier_wait(full + 8 * ring.slot, ring.parity);
                        decode(next, ring.slot, 0);
                    }
                }
                #pragma unroll
                for (int half = 0; half < S::kHalves; ++half) {
                    if (half + 1 < S::kHalves) wgmma_wait<1>();
                    else wgmma_wait<0>();
                    if (half + 1 == S::kHalves && block + 1 == S::kStageBlocks && unit + 1 == kUnits && lane == 0)
                        barrier_arrive(empty + 8 * slot);
                    add(half, block * kUnits + unit);
                }
            }
        }
    }
}

/// The copying thread.
template <typename S>
__device__ __forceinline__ void copy(const Gemm4bitMidParams& p, const Part& part, uint32_t base, int first_row,
                                     int first_token) {
    const auto load_codes = [&](int stage, int slot) {
        const uint32_t full = base + S::kFull + 8 * slot;
        barrier_expect(full, S::kStageBlocks * S::kInputBytes + p.rows_per_tile * S::kRowBytes);
        tma_load(base + S::kCodes + slot * S::kCodesBytes, &p.packed, stage * S::kRowBytes, first_row, full);
    };
    int early = part.begin;  // stages whose codes were asked for before the kernels before this one had finished
    if (p.o.weights_ready)
        for (; early < part.end && early < part.begin + S::kStages; ++early)
            load_codes(early, early - part.begin);
    dependency_wait();
    Ring<S::kStages> ring;
    for (int stage = part.begin; stage < part.end; ++stage) {
        if (stage >= early) {
            barrier_wait(base + S::kEmpty + 8 * ring.slot, ring.parity ^ 1);
            load_codes(stage, ring.slot);
        }
        tma_load(base + S::kInput + ring.slot * S::kStageBlocks * S::kInputBytes, &p.input, 0, first_token,
                 stage * S::kStageBlocks, base + S::kFull + 8 * ring.slot);
        ring.advance();
    }
}

/// The warp of scales: two lanes a row, each four units of a panel of eight.
template <typename S>
__device__ __forceinline__ void bring_scales(const Gemm4bitMidParams& p, const Part& part, uint32_t base,
                                             int first_row) {
    const uint32_t full = base + S::kFull, empty = base + S::kEmpty;
    const int lane = threadIdx.x % 32, half = lane % 2;
    const int row = (threadIdx.x / 32 - S::kConsumers / 32 - 1) * 16 + lane / 2;  // the first of this lane's
    constexpr int kStep = 16 * S::kScaleWarps, kPasses = S::kRows / kStep;
    const RowScales<S::kUnit, kPasses> scales(p.o, base + S::kMap);
    // A panel takes the latency of memory, 0.9 us under load, so kAhead of them are under way.
    uint4 ahead[S::kAhead][kPasses], v[kPasses];
    const auto load = [&](uint4 (&to)[kPasses], int panel) {
        scales.load(to, first_row + row, kStep, panel * S::kStageUnits + 4 * half);
    };
    Ring<S::kStages> ring;
    #pragma unroll
    for (int i = 0; i < S::kAhead; ++i) load(ahead[i], part.begin + i * S::kPanelStages);
    named_barrier(kReady, S::kThreads);
    for (int panel = part.begin; panel < part.end; panel += S::kPanelStages) {
        #pragma unroll
        for (int j = 0; j < kPasses; ++j) {
            v[j] = ahead[0][j];
            #pragma unroll
            for (int i = 1; i < S::kAhead; ++i) ahead[i - 1][j] = ahead[i][j];
        }
        scales.decode(v);
        load(ahead[S::kAhead - 1], panel + S::kAhead * S::kPanelStages);
        #pragma unroll
        for (int i = 0; i < S::kPanelStages; ++i) {
            if (panel + i >= part.end) break;
            barrier_wait(empty + 8 * ring.slot, ring.parity ^ 1);
            const uint32_t at = base + S::kScales + ring.slot * S::kScalesBytes + row * S::kStageUnits * 4;
            #pragma unroll
            for (int j = 0; j < kPasses; ++j) {
                const uint32_t to = at + j * kStep * S::kStageUnits * 4;
                if (S::kStageUnits == 8) store_shared_16(to + 16 * half, v[j]);
                if (S::kStageUnits == 4 && half == i) store_shared_16(to, v[j]);
                if (S::kStageUnits == 2 && half == i / 2)
                    store_shared_8(to, i % 2 ? make_uint2(v[j].z, v[j].w) : make_uint2(v[j].x, v[j].y));
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(full + 8 * ring.slot);
            ring.advance();
        }
    }
}

/// Leaves a warpgroup's sums in the ring. acc holds rows r, r + 8 (r = lane / 4 of the warp's sixteen) and
/// tokens 8j + 2 (lane % 4) + {0, 1}.
template <typename S>
__device__ __forceinline__ void leave_sums(const float (&acc)[S::kTokens / 2], uint32_t base) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    const uint32_t at = base + S::kInput + threadIdx.x / 128 * S::kSumsBytes + row * 4 + lane % 4 * 2 * S::kSumsPitch;
    #pragma unroll
    for (int i = 0; i < S::kTokens / 2; ++i)
        store_shared_4(at + (i / 4 * 8 + i % 2) * S::kSumsPitch + i / 2 % 2 * 32, __float_as_uint(acc[i]));
}

/// Adds the sums of all groups of all CTAs of the cluster, in their order, and the bias; each CTA stores an
/// equal part of the tokens. A thread keeps to four rows.
template <typename T, typename S>
__device__ __forceinline__ void store_output(const Gemm4bitMidParams& p, const Part& part, uint32_t base,
                                             int first_row, int first_token) {
    constexpr int kQuads = S::kRows / 4, kStep = S::kConsumers / kQuads;
    const int quad = threadIdx.x % kQuads, row = first_row + 4 * quad;
    if (4 * quad >= p.rows_per_tile || row >= p.o.n) return;
    const float factor = inverse_factor<T>(p.o.codebook);
    float bias[4];
    #pragma unroll
    for (int i = 0; i < 4; ++i) bias[i] = row + i < p.o.n ? load_bias(p.o, row + i) : 0.0f;
    const bool is_vector = p.o.n % 4 == 0 && reinterpret_cast<int64_t>(p.o.output) % 8 == 0;
    const int num_tokens = min(S::kTokens, p.o.m - first_token);
    const int end = num_tokens * (part.rank + 1) / part.size;
    T* const output = static_cast<T*>(p.o.output) + int64_t(first_token) * p.o.n + row;
    const uint32_t sums = base + S::kInput + quad / 16 * S::kSumsBytes + quad % 16 * 16;
    const auto store = [&](int token, const float (&sum)[4]) {
        T* const to = output + int64_t(token) * p.o.n;
        float y[4];
        #pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = fmaf(sum[i], factor, bias[i]);
        if (is_vector) {
            *reinterpret_cast<uint2*>(to) = make_uint2(pack_pair<T>(y[0], y[1]), pack_pair<T>(y[2], y[3]));
        } else {
            #pragma unroll
            for (int i = 0; i < 4; ++i)
                if (row + i < p.o.n) to[i] = T(y[i]);
        }
    };
    constexpr int kAtOnce = S::kTokens >= 4 * kStep ? 4 : S::kTokens > kStep ? S::kTokens / kStep : 1;  // tokens: their loads overlap
    for (int token = num_tokens * part.rank / part.size + threadIdx.x / kQuads; token < end;
         token += kAtOnce * kStep) {
        float sum[kAtOnce][4] = {};
        for (int rank = 0; rank < part.size; ++rank) {
            #pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                #pragma unroll
                for (int group = 0; group < S::kGroups; ++group) {
                    const uint32_t from = sums + min(token + i * kStep, S::kTokens - 1) * S::kSumsPitch +
                                          group * S::kTiles * S::kSumsBytes;
                    const uint4 v = part.size == 1 ? load_shared_16(from) : load_remote_16(from, rank);
                    sum[i][0] += __uint_as_float(v.x), sum[i][1] += __uint_as_float(v.y);
                    sum[i][2] += __uint_as_float(v.z), sum[i][3] += __uint_as_float(v.w);
                }
            }
        }
        #pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (token + i * kStep < end) store(token + i * kStep, sum[i]);
    }
}

}  // namespace mid

/// One cluster computes rows_per_tile rows for kTokens tokens; its CTAs divide K and sum through distributed
/// shared memory. Grid: x = row tiles * cluster size, y = token tiles.
template <typename T, typename S>
__device__ __forceinline__ void gemm_4bit_mid(const Gemm4bitMidParams& p) {
    using namespace mid;
    const uint32_t base = shared_start();
    if ((base & 0xffffff) != kSmemStart) __trap();  // the pair lookup has this address as an immediate
    const Part part = Part::of(p, S());
    const int first_row = blockIdx.x / part.size * p.rows_per_tile, first_token = blockIdx.y * S::kTokens;
    const int warp = threadIdx.x / 32 - S::kConsumers / 32;  // negative for those that multiply
    const bool is_cluster = part.size > 1;
    if (warp < 0) {
        if (is_cluster) cluster_arrive_relaxed();
        if (warp < S::kConsumers / 256 * 8 - S::kConsumers / 32)
            fill_pair_table<T, S::kConsumers / 256 * 256>(p.o.codebook, base, threadIdx.x);
        named_barrier(kReady, S::kThreads);
        dependency_launch();
        raise_registers<S::kConsumerRegisters>();
        float acc[S::kTokens / 2] = {};
        multiply<T, S>(acc, part, base, p.o.codebook, p.rows_per_tile);
        named_barrier(kRingFree, S::kConsumers);
        leave_sums<S>(acc, base);
        dependency_wait();  // the bias may be the kernel's before this one, the output may still be read
        if (is_cluster) {
            cluster_wait();  // the neighbours' barriers are ready
            __syncwarp();
            if (threadIdx.x % 32 < part.size) barrier_arrive_cluster(base + S::kSumsReady, threadIdx.x % 32);
            barrier_wait_cluster(base + S::kSumsReady, 0);
        } else {
            named_barrier(kRingFree, S::kConsumers);
        }
        store_output<T, S>(p, part, base, first_row, first_token);
        __syncwarp();
    } else {
        if (threadIdx.x == S::kConsumers) {
            for (int i = 0; i < S::kStages; ++i) {
                barrier_init(base + S::kFull + 8 * i, 1 + S::kScaleWarps);
                barrier_init(base + S::kEmpty + 8 * i, 4 * S::kTiles);
            }
            barrier_init(base + S::kSumsReady, part.size * S::kConsumers / 32);
            fence_barrier_init();
            fence_async_proxy();
        }
        __syncwarp();
        if (is_cluster) cluster_arrive_relaxed();
        lower_registers<S::kProducerRegisters>();
        if (warp == 0) {
            named_barrier_arrive(kReady, S::kThreads);
            if (threadIdx.x == S::kConsumers) copy<S>(p, part, base, first_row, first_token);
        } else if (warp <= S::kScaleWarps) {
            RowScales<S::kUnit, 1>::fill_map(p.o, base + S::kMap, threadIdx.x - S::kConsumers - 32,
                                             32 * S::kScaleWarps);
            if (p.o.absmax_scale != nullptr) named_barrier(kMapReady, 32 * S::kScaleWarps);
            if (!p.o.weights_ready) dependency_wait();
            bring_scales<S>(p, part, base, first_row);
        } else {
            named_barrier_arrive(kReady, S::kThreads);
        }
        __syncwarp();
        if (is_cluster) cluster_wait();
    }
    // No CTA may leave while a neighbour still reads from it.
    if (is_cluster) {
        cluster_arrive_relaxed();
        cluster_wait();
    }
}
