// gemm_4bit_transposed for few tokens on sm_90a: what gemm_4bit_transposed.cu does, through TMA.
// Codes in place, two to a byte, absmax per block: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
#pragma once
#include "gemm_4bit_transposed.cuh"
#include "gemm_4bit_wgmma.cuh"

/// Arguments of both kernels; mirrored by `ops::gemm_4bit_transposed::sm90::TransposedSm90Params`.
struct Gemm4bitTransposedSm90Params {
    TensorMap packed_map;              // packed as uint8 [n, k / 2], box [128, 128], 128-byte swizzle
    TensorMap absmax_map;              // absmax as [n, k / block], box [128, 16 bytes], no swizzle
    TensorMap input_map;               // input as [m, n], box [tokens, 64], 128-byte swizzle
    Gemm4bitTransposedParams problem;  // input, packed and absmax are not read through it
    uint32_t zero;  // 0, which the compiler does not know: `& zero` makes an order a dependency
};
static_assert(sizeof(Gemm4bitTransposedSm90Params) == 512, "keep in step with the Rust mirror");

namespace transposed_sm90 {

constexpr int kSlab = 256;       // columns of a CTA
constexpr int kStageRows = 128;  // of the weight: eight groups of 16, which a warp multiplies at once
constexpr int kGroups = 8;

template <bool kNested_, int kTokenTiles_, int kUnits_>
struct Shape {
    static constexpr bool kNested = kNested_;
    static constexpr int kTokenTiles = kTokenTiles_;  // of 8 tokens
    static constexpr int kUnits = kUnits_;            // blocks of 64 columns of a warp
    static constexpr int kStages = 6;
    static constexpr int kTokens = 8 * kTokenTiles;
    static constexpr int kWarps = kGroups * 4 / kUnits, kConsumers = 32 * kWarps;  // that multiply
    // Eight warps have 255 registers a lane, which a ninth would make 168: warp 0 then fills the ring, too.
    static constexpr bool kHasProducer = kWarps > 8;
    static constexpr int kThreads = kConsumers + (kHasProducer ? 32 : 0);
    static constexpr int kInput = kStageRows * kSlab / 2, kAbsmax = kInput + kTokens * 256;
    static constexpr int kStageBytes = kAbsmax + kStageRows * 16;
    // Shared memory: table of pairs, ring, scales and map of nested absmax, barriers. The sums of the warps take the
    // ring's place at the end.
    static constexpr int kRing = wgmma::kPairTableBytes, kScales = kRing + kStages * kStageBytes;
    static constexpr int kMap = kScales + kWarps * kUnits * 64, kBarriers = kMap + 1024;
    static constexpr int kSharedBytes = kBarriers + 16 * kStages;
    static_assert(kUnits == 2 || kUnits == 4, "half of the slab, or all");
    static_assert(kStageBytes % 1024 == 0, "the swizzle counts from there");
    static_assert(kGroups * kTokens * kSlab * 4 <= kStages * kStageBytes, "the sums must fit the ring");
    static_assert(kSharedBytes <= 227 * 1024, "must fit a CTA");
};

/// The slab, the rows and the tokens of this CTA. Neighbours share rows, whose memory is neighbouring too.
struct Share {
    int first_column, first_row, end_row, first_token, split;

    __device__ __forceinline__ Share(const Gemm4bitTransposedParams& p, int tokens) {
        const int num_slabs = (int(p.k) + kSlab - 1) / kSlab, part = blockIdx.x / num_slabs;
        first_column = blockIdx.x % num_slabs * kSlab;
        split = part % p.num_splits;
        first_token = part / p.num_splits * tokens;
        first_row = split * int(p.rows_per_split);
        end_row = min(first_row + int(p.rows_per_split), int(p.n));
    }
};

/// Two weights times a pair of scales, each given as its rounding to float16 and the rest: rounded once, to within the
/// square of the precision.
__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, uint32_t scale, uint32_t rest) {
    const auto half2 = [](const uint32_t& v) { return *reinterpret_cast<const __half2*>(&v); };
    const __half2 scaled = __hfma2(half2(pair), half2(scale), __hmul2(half2(pair), half2(rest)));
    return *reinterpret_cast<const uint32_t*>(&scaled);
}
/// What rounding to T has taken from two values; finite, so that what overflows does not become a NaN.
template <typename T>
__device__ __forceinline__ uint32_t rest_of(uint32_t rounded, float low, float high) {
    if constexpr (std::is_same_v<T, float16>) {
        const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&rounded));
        return pack_pair<T>(fmaxf(low - v.x, -1e4f), fmaxf(high - v.y, -1e4f));
    } else {
        return pack_pair<T>(fmaxf(low - __uint_as_float(rounded << 16), -1e38f),
                            fmaxf(high - __uint_as_float(rounded & 0xffff0000u), -1e38f));
    }
}

}  // namespace transposed_sm90

/// A warp multiplies 16 rows of kUnits blocks of 64 columns of each stage. Rows of the weight are the dimension that
/// is summed, so a register of the [16, 16] operand holds one column of two rows: the nibbles of a column are brought
/// together from two rows' words, and the pair is looked up as a byte's is elsewhere.
///
/// The scale differs from row to row. With bfloat16 it goes to the input, as two terms, and a warp multiplies twice:
/// one term alone has 1.06 times the error of decoded weights. float16, whose small gradients that would push out of
/// its range, pays for scaling the weights instead.
template <typename T, typename S>
__device__ __forceinline__ void gemm_4bit_transposed_columns(const Gemm4bitTransposedSm90Params& q) {
    using namespace transposed_sm90;
    using Stored = std::conditional_t<S::kNested, uint8_t, float>;
    constexpr bool kNested = S::kNested, kScalesInput = std::is_same_v<T, bfloat16>;
    constexpr int kUnits = S::kUnits, kTokenTiles = S::kTokenTiles, kStages = S::kStages;
    constexpr int kCopyScales = 16 / sizeof(Stored);  // a box begins on 16 bytes of a row
    const Gemm4bitTransposedParams& p = q.problem;
    const uint32_t base = shared_start(), ring = base + S::kRing, full = base + S::kBarriers,
                   empty = full + 8 * kStages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Share share(p, S::kTokens);
    const int num_stages = (share.end_row - share.first_row + kStageRows - 1) / kStageRows;
    const int first_block = share.first_column >> p.block_shift;

    if (threadIdx.x == (S::kHasProducer ? S::kConsumers : 0)) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, S::kWarps);
        }
        fence_barrier_init();
    }
    __syncthreads();
    const auto fill = [&](int i, int slot) {
        const uint32_t stage = ring + slot * S::kStageBytes, barrier = full + 8 * slot;
        const int row = share.first_row + i * kStageRows;
        barrier_expect(barrier, S::kStageBytes);
        tma_load(stage, &q.packed_map, share.first_column / 2, row, barrier);
        tma_load(stage + S::kAbsmax, &q.absmax_map, first_block & -kCopyScales, row, barrier);
        tma_load(stage + S::kInput, &q.input_map, row, share.first_token, barrier);
        tma_load(stage + S::kInput + S::kTokens * 128, &q.input_map, row + 64, share.first_token, barrier);
    };
    if (S::kHasProducer && warp == S::kWarps) {
        if (lane > 0) return;
        Ring<kStages> at;
        #pragma unroll 1
        for (int i = 0; i < num_stages; ++i, at.advance()) {
            barrier_wait(empty + 8 * at.slot, at.parity ^ 1);
            fill(i, at.slot);
        }
        return;
    }
    if (!S::kHasProducer && threadIdx.x == 0)
        for (int i = 0; i < min(kStages, num_stages); ++i) fill(i, i);

    wgmma::fill_pair_table<T, S::kConsumers>(p.codebook, base, threadIdx.x);
    if constexpr (kNested) {
        const float* const from = p.absmax_codebook ? p.absmax_codebook : kDynamicMap.value;
        if (threadIdx.x < 256)
            store_shared_4(base + S::kMap + 4 * threadIdx.x, __float_as_uint(from[threadIdx.x]));
    }
    named_barrier(1, S::kConsumers);

    // Rows 2 t, 2 t + 1 and eight further on of the warp's 16; under the swizzle, piece i of 16 bytes of a row is
    // piece i ^ row % 8.
    const int g = lane / 4, t = lane % 4, group = warp % kGroups;
    const int first_unit = kUnits == 4 ? 0 : warp / kGroups * kUnits;
    uint32_t even_rows =
        ring + group * 2048 + 2 * t * 128 + ((2 * first_unit + g / 4) ^ 2 * t) * 16 + g % 4 * 4;
    uint32_t odd_rows = (even_rows ^ 16) + 128;
    uint32_t lane_input =
        ring + S::kInput + group / 4 * (S::kTokens * 128) + g * 128 + ((2 * (group % 4)) ^ g) * 16 + 4 * t;
    const auto scale_offset = [&](int u) {
        return ((first_unit + u) * 64 >> p.block_shift) * int(sizeof(Stored));
    };
    const uint32_t area = base + S::kScales + warp * (kUnits * 64);
    const int own_row =
        lane / 4 % 4 * 2 + (lane & 1) + (lane & 2) * 4;  // in the order that a quad reads them
    // Plain: of row 2 t; nested: of the lane's own row, of the first of two blocks.
    uint32_t lane_scales = ring + S::kAbsmax + (group * 16 + (kNested ? own_row : 2 * t)) * 16 +
                           first_block % kCopyScales * sizeof(Stored);
    uint32_t lane_table = 4 * lane | base & 0xff000000u, zero = q.zero;
    keep_in_register(even_rows);
    keep_in_register(odd_rows);
    keep_in_register(lane_input);
    keep_in_register(lane_scales);
    keep_in_register(lane_table);
    keep_in_register(zero);
    // Nested: scales of 256 blocks, of the next stage; lanes 0 .. 15 have one block of 64 columns, the others the next.
    const int row_blocks = int(p.k) >> p.block_shift;
    const float absmax_offset = kNested ? *p.absmax_offset : 0.0f;
    float group_scale[kNested ? kUnits / 2 : 1] = {};
    const auto load_groups = [&](int i) {
        #pragma unroll
        for (int j = 0; j < kUnits / 2; ++j) {
            const int row = share.first_row + i * kStageRows + group * 16 + own_row;
            const int block = first_block + scale_offset(2 * j + lane / 16);  // a scale is a byte
            if (row < share.end_row && block < row_blocks)
                group_scale[j] = __ldg(p.absmax_scale + ((int64_t(row) * row_blocks + block) >> 8));
        }
    };
    if constexpr (kNested) load_groups(0);

    float sum[kUnits][4][kTokenTiles][4] = {};
    Ring<kStages> at;
    #pragma unroll 1
    for (int i = 0; i < num_stages; ++i) {
        const uint32_t stage = at.slot * S::kStageBytes;
        if (!S::kHasProducer && threadIdx.x == 0 && i > 0 && i - 1 + kStages < num_stages) {
            const int slot = at.slot == 0 ? kStages - 1 : at.slot - 1;  // of the stage before
            barrier_wait(empty + 8 * slot, at.slot == 0 ? at.parity ^ 1 : at.parity);
            fill(i - 1 + kStages, slot);
        }
        barrier_wait(full + 8 * at.slot, at.parity);
        if constexpr (kNested) {
            #pragma unroll
            for (int j = 0; j < kUnits / 2; ++j) {
                const uint32_t code = load_shared_1(lane_scales + stage + scale_offset(2 * j + lane / 16));
                const float value = __uint_as_float(load_shared_4(base + S::kMap + 4 * code));
                store_shared_4(area + (32 * j + lane) * 4,
                               __float_as_uint(__fadd_rn(__fmul_rn(value, group_scale[j]), absmax_offset)));
            }
            __syncwarp();
            load_groups(i + 1);
        }
        float scale[kUnits][4];
        uint32_t input[kTokenTiles][2], words[kUnits][4];
        #pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
            input[j][0] = load_shared_4(lane_input + stage + j * 1024);
            input[j][1] = load_shared_4((lane_input ^ 16) + stage + j * 1024);
        }
        const auto load_unit = [&](int u) {
            words[u][0] = load_shared_4((even_rows ^ u * 32) + stage);
            words[u][1] = load_shared_4((odd_rows ^ u * 32) + stage);
            words[u][2] = load_shared_4<1024>((even_rows ^ u * 32) + stage);
            words[u][3] = load_shared_4<1024>((odd_rows ^ u * 32) + stage);
            if constexpr (kNested) {
                const uint4 v = load_shared_16(area + (u * 16 + t * 4) * 4);
                scale[u][0] = __uint_as_float(v.x), scale[u][1] = __uint_as_float(v.y);
                scale[u][2] = __uint_as_float(v.z), scale[u][3] = __uint_as_float(v.w);
            } else {
                const uint32_t from = lane_scales + stage + scale_offset(u);
                scale[u][0] = __uint_as_float(load_shared_4(from));
                scale[u][1] = __uint_as_float(load_shared_4<16>(from));
                scale[u][2] = __uint_as_float(load_shared_4<128>(from));
                scale[u][3] = __uint_as_float(load_shared_4<144>(from));
            }
        };
        load_unit(0);
        #pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            if (u + 1 < kUnits) load_unit(u + 1);
            if (u + 2 == kUnits) {
                // An arrival may overtake loads of shared memory in flight: its address depends on the last.
                const uint32_t seen =
                    (words[u + 1][2] | words[u + 1][3] | __float_as_uint(scale[u + 1][3])) & zero;
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + 8 * at.slot + seen);
                at.advance();
            }
            // Of the input, or of the scales: rounded, and the rest.
            uint32_t terms[2][kTokenTiles][2], scales[2][2], bytes[2][2];
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float s0 = scale[u][2 * h], s1 = scale[u][2 * h + 1];
                #pragma unroll
                for (int j = 0; j < kTokenTiles; ++j)
                    if constexpr (kScalesInput) {
                        const float x0 = __fmul_rn(__uint_as_float(input[j][h] << 16), s0);
                        const float x1 = __fmul_rn(__uint_as_float(input[j][h] & 0xffff0000u), s1);
                        terms[0][j][h] = pack_pair<T>(x0, x1);
                        terms[1][j][h] = rest_of<T>(terms[0][j][h], x0, x1);
                    } else {
                        terms[0][j][h] = input[j][h];
                    }
                if constexpr (!kScalesInput) {
                    scales[0][h] = pack_pair<T>(s0, s1);
                    scales[1][h] = rest_of<T>(scales[0][h], s0, s1);
                }
                // Of an even or an odd column: high nibble from one row, low nibble from the next.
                const uint32_t a = words[u][2 * h], b = words[u][2 * h + 1];
                bytes[h][0] = (a & 0xf0f0f0f0u) | (b >> 4 & 0x0f0f0f0fu);
                bytes[h][1] = (a << 4 & 0xf0f0f0f0u) | (b & 0x0f0f0f0fu);
            }
            const auto multiply = [&]<int kByte>() {
                uint32_t weights[4];
                #pragma unroll
                for (int h = 0; h < 2; ++h)
                    #pragma unroll
                    for (int odd = 0; odd < 2; ++odd) {
                        uint32_t pair = wgmma::look_up_pair<kByte>(bytes[h][odd], lane_table);
                        if constexpr (!kScalesInput) pair = scale_pair(pair, scales[0][h], scales[1][h]);
                        weights[2 * h + odd] = pair;
                    }
                #pragma unroll
                for (int j = 0; j < kTokenTiles; ++j)
                    #pragma unroll
                    for (int term = 0; term < (kScalesInput ? 2 : 1); ++term)
                        mma_m16n8k16<kScalesInput>(sum[u][kByte][j], weights, terms[term][j][0],
                                                   terms[term][j][1]);
            };
            multiply.template operator()<0>();
            multiply.template operator()<1>();
            multiply.template operator()<2>();
            multiply.template operator()<3>();
        }
    }

    // The groups' sums, [group][token][column], in the ring's place; added in their order.
    const float factor = inverse_factor<T>(p.codebook);
    const int num_tokens = min(int(p.m) - share.first_token, S::kTokens);
    named_barrier(1, S::kConsumers);
    #pragma unroll
    for (int j = 0; j < kTokenTiles; ++j)
        #pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int token = 8 * j + 2 * t + c;
            if (token >= num_tokens) continue;
            const uint32_t to = ring + ((group * S::kTokens + token) * kSlab + first_unit * 64 + 8 * g) * 4;
            #pragma unroll
            for (int u = 0; u < kUnits; ++u)
                #pragma unroll
                for (int b = 0; b < 4; b += 2)
                    store_shared_16(
                        to + u * 256 + b * 8,
                        make_uint4(__float_as_uint(sum[u][b][j][c]), __float_as_uint(sum[u][b][j][2 + c]),
                                   __float_as_uint(sum[u][b + 1][j][c]),
                                   __float_as_uint(sum[u][b + 1][j][2 + c])));
        }
    dependency_launch();
    named_barrier(1, S::kConsumers);
    const int num_columns = min(int(p.k) - share.first_column, kSlab);
    for (int o = threadIdx.x * 4; o < num_tokens * kSlab; o += S::kConsumers * 4) {
        if (o % kSlab >= num_columns) continue;
        float v[4] = {};
        #pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const uint4 part = load_shared_16(ring + (i * S::kTokens * kSlab + o) * 4);
            v[0] += __uint_as_float(part.x), v[1] += __uint_as_float(part.y);
            v[2] += __uint_as_float(part.z), v[3] += __uint_as_float(part.w);
        }
        const int64_t row = int64_t(share.split) * p.m + share.first_token + o / kSlab;
        *reinterpret_cast<float4*>(p.partial + row * p.k + share.first_column + o % kSlab) =
            make_float4(v[0] * factor, v[1] * factor, v[2] * factor, v[3] * factor);
    }
}

/// Adds the parts in their order and rounds once; four columns a thread.
template <typename T>
__device__ __forceinline__ void gemm_4bit_transposed_columns_sum(const Gemm4bitTransposedSm90Params& q) {
    const Gemm4bitTransposedParams& p = q.problem;
    const int64_t num = p.m * p.k, i = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * 4;
    wait_for_earlier_kernels();
    if (i >= num) return;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    #pragma unroll 4
    for (int split = 0; split < p.num_splits; ++split) {
        const float4 part = *reinterpret_cast<const float4*>(p.partial + split * num + i);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    reinterpret_cast<uint2*>(p.output)[i / 4] =
        make_uint2(pack_pair<T>(sum.x, sum.y), pack_pair<T>(sum.z, sum.w));
}
