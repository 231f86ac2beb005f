// Skinny 4-bit GEMM on tensor cores: weights are the [16, 16] operand, tokens the eight columns.
// Codes in place, two to a byte, absmax per block: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
#pragma once
#include "gemm_4bit_skinny.cuh"

namespace skinny {

constexpr int kMaxThreads = 512;       // a CTA has these or half of them
constexpr int kChunk = 128;            // columns that a warp multiplies at once: 16 bytes of a lane and row
constexpr int kTableWords = 256 * 32;  // at the start of shared memory; then the map of nested absmax ..
constexpr int kMapWords = 256;         // .. and an area for each warp

__device__ __forceinline__ uint32_t bits_of(bfloat16 v) { return __bfloat16_as_ushort(v); }
__device__ __forceinline__ uint32_t bits_of(float16 v) { return __half_as_ushort(v); }

/// Line b of the table gets the pair of values of byte b, high nibble first, once for each lane's bank: 32
/// lanes look up 32 different bytes without a conflict.
template <typename T>
__device__ __forceinline__ void fill_pair_table(const Gemm4bitSkinnyParams& p, float* table) {
    const uint32_t byte = threadIdx.x % 256;
    const uint32_t pair = with_codebook(p.codebook, [&]<typename Codebook>(Codebook) {
        const auto value = [](uint32_t code) {
            return bits_of(T(__fmul_rn(select_value<Codebook>(code), kFactor<T, Codebook>)));
        };
        return value(byte >> 4) | value(byte & 15) << 16;
    });
    for (int i = threadIdx.x / 256; i < 8; i += blockDim.x / 256)
        reinterpret_cast<uint4*>(table)[byte * 8 + (i + byte) % 8] = make_uint4(pair, pair, pair, pair);
}

/// product[i] = a chunk of 16 rows times token tile i. One decoded pair is one look-up: a byte times 128, the
/// line's length, plus the lane's column.
template <typename T, int kTokenTiles>
__device__ __forceinline__ void multiply_chunk(float (&product)[kTokenTiles][4], const uint4 (&codes)[2],
                                               const uint4 (&x)[kTokenTiles][4], uint32_t lane_table) {
    const uint32_t top[4] = {codes[0].x, codes[0].y, codes[0].z, codes[0].w};  // row g
    const uint32_t bottom[4] = {codes[1].x, codes[1].y, codes[1].z, codes[1].w};
    const auto look_up = [=](uint32_t word, int byte) {
        return load_shared(__dp4a(word, 128u << 8 * byte, lane_table));
    };
    #pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int word = j / 2, byte = j % 2 * 2;
        const uint32_t weights[4] = {look_up(top[word], byte), look_up(bottom[word], byte),
                                     look_up(top[word], byte + 1), look_up(bottom[word], byte + 1)};
        #pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
            const uint4& v = x[i][word];
            mma_m16n8k16<std::is_same_v<T, bfloat16>>(product[i], weights, byte ? v.z : v.x,
                                                      byte ? v.w : v.y);
        }
    }
}

/// Adds the warps' sums [tile][token][row] in their order, and the bias.
template <typename T, int kTiles, int kTokens>
__device__ __forceinline__ void store_sums(const Gemm4bitSkinnyParams& p, const float* areas,
                                           int64_t first_row, int num_rows, int64_t first_token) {
    const float factor = inverse_factor<T>(p.codebook);
    const int num_warps = blockDim.x / 32;
    for (int i = threadIdx.x; i < kTiles * 16 * kTokens; i += blockDim.x) {
        const int row = i % (kTiles * 16), token = i / (kTiles * 16);
        if (row >= num_rows || first_token + token >= p.m) continue;
        float sum = 0.0f;
        for (int warp = 0; warp < num_warps; ++warp)
            sum += areas[warp * (kTiles * 128) + row / 16 * 128 + token * 16 + row % 16];
        static_cast<T*>(p.output)[(first_token + token) * p.n + first_row + row] =
            T(fmaf(sum, factor, load_bias(p, first_row + row)));
    }
}

}  // namespace skinny

/// One CTA computes up to kTiles tiles of 16 rows. Its warps divide K into runs of chunks; each keeps partial
/// sums of all rows, which are added at the end in the order of the warps.
///
/// Lane (g, t) of a warp holds 16 bytes of codes of rows g and g + 8: columns 32 t .. of a chunk, so the
/// lanes of a quad may lie in different blocks. One product of 16 columns then mixes kBlocks blocks; they are
/// kept apart by the tokens' operand: its column token * kBlocks + b is the token's input in the lanes of
/// block b and zero in the others.
///
/// Offsets from the CTA's first row are 32-bit: K <= 2^24.
///
/// Reads limit it on an H200: at 8192 x 8192, M = 1, it takes 14.9 us, without look-ups and products 15.4. A
/// read is 64 bytes of a row, and an SM behaves as if it kept about 256 reads in flight, whatever their size.
/// Lines of 128 bytes, shared out between lanes by shuffles, are read in 12.2 us; the whole kernel then took
/// 16.2, since both halves of a line leave their registers at once and nothing is in flight meanwhile.
template <typename T, bool kNested, int kTiles, int kTokenTiles, int kBlocks>
__device__ __forceinline__ void gemm_4bit_skinny_mma(const Gemm4bitSkinnyParams& p) {
    using namespace skinny;
    using Scales = BlockScales<kNested>;
    static_assert(kTiles == 2 || kTiles == 4, "four tiles of codes are in flight");
    static_assert(kBlocks == 2 || kBlocks == 4, "blocks of 64 columns or more, or of 32");
    constexpr int kTokensPerTile = 8 / kBlocks, kTokens = kTokenTiles * kTokensPerTile;
    constexpr int kAhead = 4 / kTiles;        // chunks whose codes are in flight
    constexpr int kPanel = 8 / kBlocks;       // chunks whose scales are staged at once: 8 per row
    constexpr int kAreaWords = kTiles * 128;  // scales [tile][row][8], later sums [tile][token][row]
    // The next chunk's input is loaded behind the last use of this one's. Where a panel ends it would have to
    // stay in registers beside the scales in decoding, for which two token tiles leave no room.
    constexpr bool kInputBesideScales = kTokenTiles == 1 || !kNested;

    float* const table = dynamic_shared();
    float* const map = table + kTableWords;
    float* const areas = map + kMapWords;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int cta = blockIdx.x, k = int(p.k);
    const int log2_warps = blockDim.x == kMaxThreads ? 4 : 3;
    const int64_t first_row = 16 * (int64_t(cta) * p.tiles_per_cta + min(cta, p.num_larger_ctas));
    const int num_tiles = p.tiles_per_cta + (cta < p.num_larger_ctas);
    const int num_rows = int(min(p.n - first_row, int64_t(16 * num_tiles)));

    const int num_chunks = (k + kChunk - 1) / kChunk;
    const int chunk_begin = num_chunks * warp >> log2_warps;
    const int chunk_end = num_chunks * (warp + 1) >> log2_warps;
    const int lane_end = min(chunk_end, (k - 32 * t + kChunk - 1) / kChunk);  // of this lane's columns

    const uint8_t* codes = p.packed + (first_row + g) * (k / 2) + 16 * t;
    keep_in_register(codes);
    uint4 ring[kAhead][kTiles][2] = {};
    const auto load_codes = [&](uint4(&v)[2], int tile, int chunk) {
        const int lane_rows = chunk < lane_end ? num_rows - g : 0;
        #pragma unroll
        for (int i = 0; i < 2; ++i)
            if ((2 * tile + i) * 8 < lane_rows)
                v[i] = load_streaming(reinterpret_cast<const uint4*>(
                    codes + uint32_t((2 * tile + i) * 4 * k + chunk * (kChunk / 2))));
    };
    // This lane fetches the scales of column lane % 8, 128 / kBlocks elements wide, of rows lane / 8 + 4 i.
    // Bit 2 of the row swaps columns, so that eight rows are read without a bank conflict.
    const Scales scales(p, first_row * k, map);
    typename Scales::Raw raw[kTiles * 4];
    uint32_t lane_element = lane / 8 * k + lane % 8 * (kChunk / kBlocks);
    keep_in_register(lane_element);
    const auto lane_rows_of = [&](int panel) {  // for which this lane has a scale to fetch
        const int column = panel * kChunk + lane % 8 * (kChunk / kBlocks);
        return column < min(chunk_end * kChunk, k) ? num_rows - lane / 8 : 0;
    };
    const auto load_scales = [&](int panel) {
        const int lane_rows = lane_rows_of(panel);
        #pragma unroll
        for (int i = 0; i < kTiles * 4; ++i) {
            raw[i] = 0;
            if (4 * i < lane_rows) raw[i] = scales.load(lane_element + uint32_t(panel * kChunk + 4 * i * k));
        }
    };
    float* const area = areas + warp * kAreaWords;
    const auto store_scales = [&](int panel) {
        const int lane_rows = lane_rows_of(panel);
        __syncwarp();
        #pragma unroll
        for (int i = 0; i < kTiles * 4; ++i) {
            float scale = 0.0f;
            if (4 * i < lane_rows)
                scale = scales.decode(raw[i], lane_element + uint32_t(panel * kChunk + 4 * i * k));
            area[i * 32 + (lane ^ i % 2 * kBlocks)] = scale;
        }
        __syncwarp();
    };

    uint32_t lane_table = shared_address(table + lane);
    const float* lane_scales = area + g * 8;
    keep_in_register(lane_scales);
    const bool owns_block = g % kBlocks == t * kBlocks / 4;

    for (int64_t first_token = 0; first_token < p.m; first_token += kTokens) {
        #pragma unroll
        for (int a = 0; a < kAhead; ++a)
            #pragma unroll
            for (int i = 0; i < kTiles; ++i) load_codes(ring[a][i], i, chunk_begin + a);
        const T* input = static_cast<const T*>(p.input) + (first_token + g / kBlocks) * k + 32 * t;
        keep_in_register(input);
        // This lane's column of operand i is token g / kBlocks + kTokensPerTile * i, in its own block only.
        const int lane_tokens = owns_block ? int(min(p.m - first_token, int64_t(kTokens))) - g / kBlocks : 0;
        uint4 x[kTokenTiles][4] = {};
        const auto load_input = [&](int chunk) {
            #pragma unroll
            for (int i = 0; i < kTokenTiles; ++i)
                if (i * kTokensPerTile < lane_tokens && chunk < lane_end) {
                    const T* const from = input + uint32_t(i * kTokensPerTile * k + chunk * kChunk);
                    #pragma unroll
                    for (int j = 0; j < 4; ++j) x[i][j] = __ldg(reinterpret_cast<const uint4*>(from) + j);
                }
        };
        if constexpr (kInputBesideScales) load_input(chunk_begin);
        float sum[kTiles][kTokenTiles][2] = {};  // rows g and g + 8; token 2 t / kBlocks of a token tile
        int panel = chunk_begin;
        #pragma unroll 1
        do {
            load_scales(panel);
            if (first_token == 0 && panel == chunk_begin) {
                fill_pair_table<T>(p, table);
                __syncthreads();
            }
            keep_in_register(lane_table);
            store_scales(panel);
            if constexpr (!kInputBesideScales) load_input(panel);
            #pragma unroll 1
            for (int ring_begin = 0; ring_begin < kPanel; ring_begin += kAhead)
                #pragma unroll
                for (int a = 0; a < kAhead; ++a) {
                    const int chunk = panel + ring_begin + a;
                    if (chunk >= chunk_end) break;
                    const int pair = (ring_begin + a) * (kBlocks / 2) + (kBlocks == 4 ? t % 2 : 0);
                    const float* const chunk_scales = lane_scales + (pair ^ g / 4 * (kBlocks / 2)) * 2;
                    #pragma unroll
                    for (int tile = 0; tile < kTiles; ++tile) {
                        if (tile >= num_tiles) break;
                        float product[kTokenTiles][4] = {};
                        multiply_chunk<T>(product, ring[a][tile], x, lane_table);
                        load_codes(ring[a][tile], tile, chunk + kAhead);
                        const float2 s0 = *reinterpret_cast<const float2*>(chunk_scales + tile * 128);
                        const float2 s1 = *reinterpret_cast<const float2*>(chunk_scales + tile * 128 + 64);
                        #pragma unroll
                        for (int i = 0; i < kTokenTiles; ++i) {
                            sum[tile][i][0] =
                                fmaf(s0.x, product[i][0], fmaf(s0.y, product[i][1], sum[tile][i][0]));
                            sum[tile][i][1] =
                                fmaf(s1.x, product[i][2], fmaf(s1.y, product[i][3], sum[tile][i][1]));
                        }
                    }
                    if (kInputBesideScales || ring_begin + a + 1 < kPanel) load_input(chunk + 1);
                }
            panel += kPanel;
        } while (panel < chunk_end);

        __syncwarp();
        #pragma unroll
        for (int i = 0; i < kTiles * kTokenTiles * 2; ++i) {
            const int tile = i / (kTokenTiles * 2), token_tile = i / 2 % kTokenTiles, half = i % 2;
            float v = sum[tile][token_tile][half];
            if constexpr (kBlocks == 4) v += __shfl_xor_sync(0xffffffffu, v, 1);
            area[tile * 128 + (token_tile * kTokensPerTile + 2 * t / kBlocks) * 16 + half * 8 + g] = v;
        }
        __syncthreads();
        store_sums<T, kTiles, kTokens>(p, areas, first_row, num_rows, first_token);
        __syncthreads();
    }
}
