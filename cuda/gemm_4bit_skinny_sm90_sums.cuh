// How gemm_4bit_skinny_sm90 ends a tile of rows: one warp adds what the others leave, and stores.
#pragma once
#include "gemm_4bit_skinny_mma.cuh"
#include "ptx_sm90.cuh"

namespace skinny_sm90 {

/// Shared memory of the sums, each of two tiles in turn: [warp][tile of 16 rows][token][row] floats, and what the other
/// CTA of a cluster sends.
template <int kTokens, int kWarps, int kRowTiles, int kCluster>
struct Sums {
    // Of a token's 16 rows: the lanes of a warp that multiplies, which have four tokens, store to all banks.
    static constexpr int kTokenWords = kTokens == 8 ? 20 : kTokens == 4 ? 24 : 16;
    static constexpr int kTileWords = kTokens * kTokenWords, kWarpWords = kRowTiles * kTileWords;
    static constexpr int kWords = kWarps * kWarpWords;
    static constexpr int kExchange = 2 * kWords * 4;
    static constexpr int kExchangeBytes = kCluster > 1 ? 64 * kTokens : 0;  // of one tile of 16 rows
    static constexpr int kBytes = kExchange + 2 * kExchangeBytes;

    uint32_t words;                   // shared address
    uint32_t full, empty, exchanged;  // two barriers each

    /// The warps' sums of four rows of a token, added in the order of the warps.
    __device__ __forceinline__ float4 add(int buffer, int row_tile, int token, int place) const {
        const uint32_t from =
            words + (buffer * kWords + row_tile * kTileWords + token * kTokenWords + place) * 4;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        #pragma unroll 8
        for (int w = 0; w < kWarps; ++w) add(sum, load_shared_16(from + w * (kWarpWords * 4)));
        return sum;
    }
    static __device__ __forceinline__ void add(float4& sum, const uint4& v) {
        sum.x += __uint_as_float(v.x), sum.y += __uint_as_float(v.y);
        sum.z += __uint_as_float(v.z), sum.w += __uint_as_float(v.w);
    }
};

/// Ends all tiles of a CTA; done by one warp, which first calls `before` of each. In a cluster, each CTA ends the 16 rows of its rank of every tile: the
/// other sends its part through distributed shared memory, and the parts are added in one order, since two
/// numbers have but one sum.
template <typename T, typename S>
__device__ __forceinline__ void store_tiles(const Gemm4bitSkinnyParams& p, const typename S::TileSums& sums,
                                            int64_t first_row, int num_tiles, int rank, const auto& before) {
    constexpr int kOwn = S::kCluster > 1 ? 1 : S::kRowTiles;  // tiles of 16 rows that this CTA ends
    const int lane = threadIdx.x % 32, token = lane / 4, place = lane % 4 * 4;  // of four rows
    const bool is_whole = p.n % 4 == 0 && reinterpret_cast<int64_t>(p.output) % 8 == 0;
    const float factor = inverse_factor<T>(p.codebook);
    #pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
        before(tile);
        if (tile == 0) wait_for_earlier_kernels();
        const int buffer = tile % 2;
        const uint32_t parity = tile / 2 % 2;
        const int64_t own_row =
            first_row + tile * (16 * S::kRowTiles) + (S::kCluster > 1 ? rank * 16 : 0) + place;
        float bias[kOwn][4] = {};
        #pragma unroll
        for (int r = 0; r < kOwn; ++r)
            #pragma unroll
            for (int i = 0; i < 4; ++i)
                if (own_row + r * 16 + i < p.n) bias[r][i] = load_bias(p, own_row + r * 16 + i);
        const uint32_t exchanged = sums.exchanged + 8 * buffer,
                       exchange = sums.words + sums.kExchange + buffer * sums.kExchangeBytes + lane * 16;
        barrier_wait(sums.full + 8 * buffer, parity);
        if (token < p.m) {
            if constexpr (S::kCluster > 1) {
                const float4 v = sums.add(buffer, rank ^ 1, token, place);
                store_remote_16(exchange, exchanged, rank ^ 1,
                                make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z),
                                           __float_as_uint(v.w)));
                if (lane == 0) barrier_expect(exchanged, 64 * int(p.m));
            }
            #pragma unroll
            for (int r = 0; r < kOwn; ++r) {
                const int64_t row = own_row + r * 16;
                float4 sum = sums.add(buffer, S::kCluster > 1 ? rank : r, token, place);
                if constexpr (S::kCluster > 1) {
                    barrier_wait(exchanged, parity);
                    sums.add(sum, load_shared_16(exchange));
                }
                const float v[4] = {fmaf(sum.x, factor, bias[r][0]), fmaf(sum.y, factor, bias[r][1]),
                                    fmaf(sum.z, factor, bias[r][2]), fmaf(sum.w, factor, bias[r][3])};
                T* const to = static_cast<T*>(p.output) + token * p.n + row;
                if (is_whole && row < p.n) {
                    *reinterpret_cast<uint2*>(to) =
                        make_uint2(pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]));
                } else {
                    #pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (row + i < p.n) to[i] = T(v[i]);
                }
            }
        }
        barrier_arrive(sums.empty + 8 * buffer);
    }
}

}  // namespace skinny_sm90
