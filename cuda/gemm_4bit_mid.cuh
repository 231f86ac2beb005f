// 4-bit GEMM for 9 to 128 tokens on sm_90a: decoded weights are the register operand of wgmma, or of mma.sync.
// Codes in place, two to a byte, absmax per block: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
#pragma once
#include "gemm_4bit_mid_mma.cuh"

namespace mid {

/// The multiplying warpgroups. A block of 64 k is sixteen fragment registers, four wgmma into sums that start
/// at zero, and one scaled addition in fp32: the scale is not rounded and the codes hardly are (kFactor).
template <typename T, typename S>
__device__ __forceinline__ void multiply(float (&acc)[S::kTokens / 2], uint32_t base, int num_stages,
                                         Ring<S::kStages>& ring, int& stage, int rows_per_tile) {
    constexpr int kTokens = S::kTokens;
    // From a shuffle the compiler knows that the warp agrees, and keeps the ring in uniform registers.
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const int tile = warpgroup % S::kTiles;
    const int lane = threadIdx.x % 32;
    const int row = tile * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;  // this lane's rows: row, row + 8
    const uint32_t table = lane_of_table<S::kTableRowBytes>(base, lane);
    const QuadTranspose<S::kIsLean> transpose(lane);
    // What this lane addresses for load_matrices: row lane % 8 + 8 (lane / 16), piece lane / 8 % 2. The pieces of
    // the other blocks differ in the bits above.
    const uint32_t codes_at =
        opaque(base + S::kCodes +
               swizzled_offset<S::kRowBytes>(row - lane / 4 + lane % 8 + lane / 16 * 8, lane / 8 % 2));
    const uint32_t scales_at = base + S::kScales + row * S::kStageUnits * 4;
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
        // Register i % 4 of k16 step i / 4: row half i % 2, k = 2t or 2t + 8.
        #pragma unroll
        for (int i = 0; i < 16; i += 8) {
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t word = words[half * 2 + i / 8];
                to[i + half] = look_up_pair<0, S::kTableRowBytes>(word, table);
                to[i + half + 2] = look_up_pair<1, S::kTableRowBytes>(word, table);
                to[i + half + 4] = look_up_pair<2, S::kTableRowBytes>(word, table);
                to[i + half + 6] = look_up_pair<3, S::kTableRowBytes>(word, table);
            }
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
            wgmma_k16<T, kTokens / S::kHalves>(sums[half], fragments + 4 * (unit * kSteps + step),
                                               b + 2 * step);
        wgmma_commit();
    };
    const auto add = [&](int half, int unit) {
        pin(sums[half]);
        #pragma unroll
        for (int i = 0; i < S::kSums; ++i)
            acc[half * S::kSums + i] = fmaf(scale[i / 2 % 2][unit], sums[half][i], acc[half * S::kSums + i]);
    };

    if (S::kLooksAhead && stage < num_stages) {
        barrier_wait(full + 8 * ring.slot, ring.parity);
        decode(a[0], ring.slot, 0);
    }
    while (stage < num_stages) {
        const int slot = ring.slot;
        if (!S::kLooksAhead) barrier_wait(full + 8 * slot, ring.parity);
        ring.advance(S::kGroups);
        stage += S::kGroups;
        #pragma unroll
        for (int half = 0; half < 2; ++half) {
            #pragma unroll
            for (int i = 0; i < S::kStageUnits; i += 2) {
                const uint2 v =
                    load_shared_8(scales_at + slot * S::kScalesBytes + 8 * half * S::kStageUnits * 4 + 4 * i);
                scale[half][i] = __uint_as_float(v.x), scale[half][i + 1] = __uint_as_float(v.y);
            }
        }
        if (S::kOverlaps && !S::kLooksAhead) decode(a[0], slot, 0);
        #pragma unroll
        for (int block = 0; block < S::kStageBlocks; ++block) {
            uint32_t (&now)[16] = a[S::kOverlaps ? block % 2 : 0];
            if (!S::kOverlaps) decode(now, slot, block);
            #pragma unroll
            for (int unit = 0; unit < kUnits; ++unit) {
                pin(now);
                #pragma unroll
                for (int half = 0; half < S::kHalves; ++half) start(now, slot, block, unit, half);
                if (S::kOverlaps && unit == 0) {
                    uint32_t (&next)[16] = a[(block + 1) % 2];
                    if (block + 1 < S::kStageBlocks) {
                        decode(next, slot, block + 1);
                    } else if (
                        S::kLooksAhead) {  // of the next stage; behind the last one the slot holds what it may
                        if (stage < num_stages) barrier_wait(full + 8 * ring.slot, ring.parity);
                        decode(next, ring.slot, 0);
                    }
                }
                #pragma unroll
                for (int half = 0; half < S::kHalves; ++half) {
                    if (half + 1 < S::kHalves)
                        wgmma_wait<1>();
                    else
                        wgmma_wait<0>();
                    if (half + 1 == S::kHalves && block + 1 == S::kStageBlocks && unit + 1 == kUnits)
                        barrier_arrive(empty + 8 * slot);
                    add(half, block * kUnits + unit);
                }
            }
        }
    }
    stage -= num_stages;
}

/// Leaves a warpgroup's sums in the ring, as those of stages first_stage, first_stage + kGroups, ..: so the order of
/// addition does not depend on how many tiles the CTA had before. acc holds rows r, r + 8 (r = lane / 4 of the
/// warp's sixteen) and tokens 8j + 2 (lane % 4) + {0, 1}.
template <typename S>
__device__ __forceinline__ void leave_sums(const float (&acc)[S::kTokens / 2], uint32_t base,
                                           int first_stage) {
    uint32_t thread = threadIdx.x;
    keep_in_register(thread);  // so that nothing below takes registers of the loop over tiles
    const int lane = thread % 32, row = thread % 128 / 32 * 16 + lane / 4;
    const uint32_t at = base + S::kInput +
                        (thread / 128 % S::kTiles + first_stage * S::kTiles) * S::kSumsBytes + row * 4 +
                        lane % 4 * 2 * S::kSumsPitch;
    #pragma unroll
    for (int i = 0; i < S::kTokens / 2; ++i)
        store_shared_4(at + (i / 4 * 8 + i % 2) * S::kSumsPitch + i / 2 % 2 * 32, __float_as_uint(acc[i]));
}

/// Adds the sums of all groups of all CTAs of the cluster, in their order, and the bias; each CTA stores an
/// equal part of the tokens. A thread keeps to four rows.
template <typename T, typename S>
__device__ __forceinline__ void store_output(const Gemm4bitMidParams& p, const Part& part, uint32_t base,
                                             int first_row, int first_token) {
    uint32_t thread = threadIdx.x;
    keep_in_register(thread);
    constexpr int kQuads = S::kRows / 4, kStep = S::kConsumers / kQuads;
    const int quad = thread % kQuads, row = first_row + 4 * quad;
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
    constexpr int kAtOnce = S::kTokens >= 4 * kStep ? 4
                            : S::kTokens > kStep    ? S::kTokens / kStep
                                                    : 1;  // tokens: their loads overlap
    for (int token = num_tokens * part.rank / part.size + thread / kQuads; token < end;
         token += kAtOnce * kStep) {
        float sum[kAtOnce][4] = {};
        for (int rank = 0; rank < part.size; ++rank) {
            #pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                #pragma unroll
                for (int group = 0; group < S::kPartials; ++group) {
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

/// A cluster computes tiles of rows_per_tile rows for kTokens tokens; its CTAs divide K and sum through distributed
/// shared memory. Grid: x = clusters * cluster size, y = token tiles; as many clusters as tiles unless a cluster is
/// one CTA.
template <typename T, typename S>
__device__ __forceinline__ void gemm_4bit_mid(const Gemm4bitMidParams& p) {
    using namespace mid;
    const uint32_t base = shared_start();
    if ((base & 0xffffff) != kSmemStart) __trap();  // look_up_pair has this address as an immediate
    const Part part = Part::of(p, S());
    const int first_token = blockIdx.y * S::kTokens;
    const int warp = threadIdx.x / 32 - S::kConsumers / 32;  // negative for those that multiply
    const bool is_cluster = part.size > 1;
    if (threadIdx.x == S::kConsumers) {
        prefetch_map(&p.packed);
        prefetch_map(&p.input);
        if (p.scales_by_copy) prefetch_map(&p.absmax);
        // All lanes arrive: racecheck follows only lanes that do, and one that is elected takes as long.
        for (int i = 0; i < S::kStages; ++i) {
            barrier_init(base + S::kFull + 8 * i, p.scales_by_copy ? 1 : 1 + 32 * S::kScaleWarps);
            barrier_init(base + S::kEmpty + 8 * i, 128 * S::kTiles);
        }
        barrier_init(base + S::kSumsReady, part.size * S::kConsumers);
        barrier_init(base + S::kSumsFree, S::kConsumers);
        fence_barrier_init();
        fence_async_proxy();
    }
    __syncthreads();
    if (is_cluster) cluster_arrive_relaxed();
    if (warp < 0) {
        if (warp < S::kConsumers / 256 * 8 - S::kConsumers / 32)
            fill_pair_table<T, S::kConsumers / 256 * 256, S::kTableRowBytes>(p.o.codebook, base, threadIdx.x);
        named_barrier(kRingFree, S::kConsumers);  // the table is ready
        dependency_launch();
        raise_registers<S::kConsumerRegisters>();
        Ring<S::kStages> ring;
        int stage = __shfl_sync(~0u, threadIdx.x / (128 * S::kTiles), 0);
        ring.advance(stage);
        for (int row = first_row(p); row < p.o.n; row += row_step(p)) {
            const int first_stage = stage;
            if constexpr (S::kUsesMma) {
                float acc[4][S::kTokens / 8][4] = {};
                multiply_mma<T, S>(acc, base, part.end - part.begin, ring, stage, p.rows_per_tile);
                named_barrier(kRingFree, S::kConsumers);
                leave_sums_mma<S>(acc, base, first_stage);
            } else {
                float acc[S::kTokens / 2] = {};
                multiply<T, S>(acc, base, part.end - part.begin, ring, stage, p.rows_per_tile);
                named_barrier(kRingFree, S::kConsumers);
                leave_sums<S>(acc, base, first_stage);
            }
            // The bias may be the kernel's before this one, the output may still be read.
            if (row == first_row(p)) wait_for_earlier_kernels();
            if (is_cluster) {
                cluster_wait();  // the neighbours' barriers are ready
                for (int rank = 0; rank < cluster_size(); ++rank)
                    barrier_arrive_cluster(base + S::kSumsReady, rank);
                barrier_wait_cluster(base + S::kSumsReady, 0);
            } else {
                named_barrier(kRingFree, S::kConsumers);
            }
            store_output<T, S>(p, Part::of(p, S()), base, row, first_token);
            fence_async_proxy();  // the next input may overwrite the sums
            barrier_arrive(base + S::kSumsFree);
        }
        __syncwarp();
    } else {
        lower_registers<S::kProducerRegisters>();
        if (warp == 0) {
            if (threadIdx.x == S::kConsumers) copy<S>(p, part, base, first_token);
        } else if (warp <= S::kScaleWarps && !p.scales_by_copy) {
            if (!p.o.weights_ready) wait_for_earlier_kernels();
            RowScales<S::kUnit, 1>::fill_map(p.o, base + S::kMap, threadIdx.x - S::kConsumers - 32,
                                             32 * S::kScaleWarps);
            __syncwarp();
            if (p.o.absmax_scale != nullptr) named_barrier(kMapReady, 32 * S::kScaleWarps);
            bring_scales<S>(p, part, base);
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
