// One warp tile of 8-bit codes, in both directions: what blockwise, tensorwise and nested kernels share.
#pragma once
#include "dtype.cuh"
#include "map_encoder.cuh"
#include "tile.cuh"

/// Codes of a tile whose rows are scaled by the value of lane r of each group of `lanes` lanes
/// (block_scales). refill(r) may fill row r, which is no longer needed, with the next tile's.
template <bool kFull, typename T, typename Encoder, typename Refill>
__device__ __forceinline__ void encode_tile(WarpTile<T>& tile, const Encoder& encoder, float inverse,
                                            const BlockLane<T>& self, uint8_t* codes, int64_t left,
                                            const Refill& refill) {
    using Tile = WarpTile<T>;
    constexpr int kVector = Tile::kVector, kWords = kVector / 4;
    if (__any_sync(0xffffffffu, inverse == 0.0f)) {  // a NaN or an Inf has no code: y is 0
        #pragma unroll
        for (int r = 0; r < Tile::kRows; ++r)
            if (__shfl_sync(0xffffffffu, inverse, r, self.lanes) == 0.0f)
                tile.row[r] = make_uint4(0, 0, 0, 0);
    }
    #pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
        const float scale = __shfl_sync(0xffffffffu, inverse, r, self.lanes);
        const uint32_t w[4] = {tile.row[r].x, tile.row[r].y, tile.row[r].z, tile.row[r].w};
        float x[kVector];
        unpack<T>(tile.row[r], x);
        uint32_t word[kWords];
        #pragma unroll
        for (int q = 0; q < kWords; ++q) {
            const float y[4] = {__fmul_rn(x[4 * q], scale), __fmul_rn(x[4 * q + 1], scale),
                                __fmul_rn(x[4 * q + 2], scale), __fmul_rn(x[4 * q + 3], scale)};
            const uint32_t signs = kVector == 8 ? sign_mask(w[2 * q % 4], w[(2 * q + 1) % 4])
                                                : sign_mask(w[0], w[1], w[2], w[3]);
            word[q] = encoder(y, signs);
        }
        refill(r);
        store_codes<kFull, kVector>(codes + r * Tile::kRowElements + self.lane * kVector,
                                    left - r * Tile::kRowElements - self.lane * kVector, word);
    }
}

/// Arguments of the kernels that decode 8-bit codes.
struct Dequantize8bitParams {
    const uint8_t* codes;   // [n]
    const float* absmax;    // [ceil_div(n, block_size)]  null: 1
    const float* codebook;  // [256]
    void* output;           // [n]                        T
    int64_t n;              //
    int32_t block_shift;    // log2 of the block size; 63 for one block that holds everything
};
static_assert(sizeof(Dequantize8bitParams) == 48, "keep in step with the Rust mirror");

/// Codes and block scales of kRows rows of 32 vectors.
template <typename T, int kRows>
struct EncodedTile {
    static constexpr int kVector = kPerVector<T>;
    static constexpr int kWords = kVector / 4;
    static constexpr int kElements = kRows * 32 * kVector;
    uint32_t codes[kRows][kWords];
    float absmax[kRows];

    template <bool kFull>
    __device__ __forceinline__ void load(const Dequantize8bitParams& p, int64_t first, int lane) {
        #pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int64_t i = first + (r * 32 + lane) * kVector;
            if constexpr (kFull && kVector == 8) {
                const uint2 v = load_streaming(reinterpret_cast<const uint2*>(p.codes + i));
                codes[r][0] = v.x;
                codes[r][kWords - 1] = v.y;
            } else if constexpr (kFull) {
                codes[r][0] = load_streaming(reinterpret_cast<const uint32_t*>(p.codes + i));
            } else {
                #pragma unroll
                for (int j = 0; j < kVector; ++j) {
                    if (j % 4 == 0) codes[r][j / 4] = 0;
                    if (i + j < p.n) codes[r][j / 4] |= uint32_t(p.codes[i + j]) << (8 * (j % 4));
                }
            }
            absmax[r] = p.absmax ? __ldg(p.absmax + (kFull || i < p.n ? i >> p.block_shift : 0)) : 1.0f;
        }
    }

    template <bool kFull>
    __device__ __forceinline__ void store(const Dequantize8bitParams& p, const float* map, int64_t first,
                                          int lane) const {
        #pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float x[kVector];
            #pragma unroll
            for (int i = 0; i < kVector; ++i)
                x[i] = __fmul_rn(map[(codes[r][i / 4] >> (8 * (i % 4))) & 255], absmax[r]);
            store_vector<kFull>(static_cast<T*>(p.output), first + (r * 32 + lane) * kVector, p.n,
                                pack<T>(x));
        }
    }
};

/// One copy of the map in shared memory: the bank conflicts of random codes cost less than filling a copy per
/// lane in every CTA would. A warp's first tile is requested before the map. Full speed needs codes on 8 and
/// output on 16 bytes.
template <typename T, int kRows, int kThreads>
__device__ __forceinline__ void dequantize_8bit(const Dequantize8bitParams& p) {
    wait_for_earlier_kernels();
    using Tile = EncodedTile<T, kRows>;
    constexpr int64_t kCtaElements = int64_t(Tile::kElements) * (kThreads / 32);
    __shared__ float map[256];
    const int lane = threadIdx.x % 32;
    const bool aligned =
        (reinterpret_cast<uintptr_t>(p.output) | reinterpret_cast<uintptr_t>(p.codes) << 1) % 16 == 0;
    const auto is_full = [&](int64_t at) { return aligned && at + Tile::kElements <= p.n; };
    int64_t first = blockIdx.x * kCtaElements + warp_in_cta() * Tile::kElements;
    Tile tile;
    const auto load = [&](int64_t at) {
        if (is_full(at))
            tile.template load<true>(p, at, lane);
        else if (at < p.n)
            tile.template load<false>(p, at, lane);
    };
    load(first);
    for (int i = threadIdx.x; i < 256; i += kThreads) map[i] = __ldg(p.codebook + i);
    __syncthreads();
    while (first < p.n) {
        if (is_full(first))
            tile.template store<true>(p, map, first, lane);
        else
            tile.template store<false>(p, map, first, lane);
        first += gridDim.x * kCtaElements;
        load(first);
    }
}
