// How the warps of a grid walk over a tensor that is quantized by blocks, and the scales of the blocks they
// meet.
#pragma once
#include "dtype.cuh"
#include "reduce.cuh"

/// A warp's tile: four rows of 32 vectors. Two rows were 7 % slower and eight 3 % (H200, NF4 from bfloat16).
template <typename T>
struct WarpTile {
    static constexpr int kVector = kPerVector<T>;
    static constexpr int kRows = 4;
    static constexpr int kRowElements = 32 * kVector;
    static constexpr int kElements = kRows * kRowElements;

    uint4 row[kRows];

    /// Requests the tile at `first`; elements from n on read as +0.
    template <bool kFull>
    __device__ __forceinline__ void load(const T* input, int64_t first, int64_t n, int lane) {
        #pragma unroll
        for (int r = 0; r < kRows; ++r)
            row[r] = load_vector<kFull>(input, first + r * kRowElements + lane * kVector, n);
    }
};

/// Index of this warp in its CTA, known to the compiler to be the same in all lanes.
__device__ __forceinline__ int warp_in_cta() { return __shfl_sync(0xffffffffu, int(threadIdx.x / 32), 0); }

/// How blocks of one size lie in warp tiles: the same for all threads of a grid, so that branches on it are
/// uniform.
template <typename T>
struct BlockShape {
    int shift;  // log2 of the block size
    int lanes;  // of one row that share a block, at least 4
    int rows;   // of one tile that share a block: 1, 2 or 4
    int warps;  // of one CTA that share a block: a power of two

    __device__ __forceinline__ explicit BlockShape(int block_shift)
        : shift(block_shift),
          lanes(::min((1 << block_shift) / kPerVector<T>, 32)),
          rows(::min(::max((1 << block_shift) / WarpTile<T>::kRowElements, 1), WarpTile<T>::kRows)),
          warps(::max((1 << block_shift) / WarpTile<T>::kElements, 1)) {}
};

/// Stores the absmax of every block of a tile. Returns the reciprocal for the block of row `lane % 4` in this
/// lane's group of shape.lanes lanes, so that a tile pays for one division: row r is scaled by the value of
/// lane r of its group.
///
/// If blocks span warps, all threads of the CTA must call, with a `warp_max` [kThreads / 32] that no warp
/// still reads.
template <typename T, int kThreads>
__device__ __forceinline__ float block_scales(const WarpTile<T>& tile, const BlockShape<T>& shape,
                                              uint32_t* warp_max, float* absmax, int64_t first, int64_t n,
                                              int lane, int warp) {
    using Tile = WarpTile<T>;
    static_assert(Tile::kRows == 4, "the exchange below is for four maxima");
    static_assert(Tile::kElements * (kThreads / 32) >= 4096, "the largest block must fit into a CTA's tiles");
    uint32_t m[4];
    #pragma unroll
    for (int r = 0; r < 4; ++r) m[r] = Magnitude<T>::of(tile.row[r]);
    if (shape.rows > 1) {
        m[0] = m[1] = Magnitude<T>::max(m[0], m[1]);
        m[2] = m[3] = Magnitude<T>::max(m[2], m[3]);
        if (shape.rows > 2) m[0] = m[1] = m[2] = m[3] = Magnitude<T>::max(m[0], m[2]);
    }

    // Halving the number of maxima at each of the first two steps costs 3 shuffles instead of 8.
    #pragma unroll
    for (int d = 1; d < 4; d *= 2) {
        const bool odd = lane & d;
        #pragma unroll
        for (int i = 0; i < 4; i += 2 * d) {
            const uint32_t keep = odd ? m[i + d] : m[i], send = odd ? m[i] : m[i + d];
            m[i] = Magnitude<T>::max(keep, __shfl_xor_sync(0xffffffffu, send, d));
        }
    }
    #pragma unroll
    for (int d = 4; d < 32; d *= 2)
        if (d < shape.lanes) m[0] = Magnitude<T>::max(m[0], __shfl_xor_sync(0xffffffffu, m[0], d));
    uint32_t bits = Magnitude<T>::to_float_bits(m[0]);

    if (shape.warps > 1) {
        if (lane == 0) warp_max[warp] = bits;
        __syncthreads();
        bits = warp_max[(warp & ~(shape.warps - 1)) | (lane & (shape.warps - 1))];
        #pragma unroll
        for (int d = 1; d < kThreads / 32; d *= 2)
            if (d < shape.warps) bits = ::max(bits, __shfl_xor_sync(0xffffffffu, bits, d));
    }

    const Scale scale = scale_of<1>(bits);
    const int row = lane & (shape.lanes - 1);
    const int64_t start =
        first + row * Tile::kRowElements + (lane - row) * Tile::kVector;  // of this lane's block
    if (row < 4 && (row & (shape.rows - 1)) == 0 && (warp & (shape.warps - 1)) == 0 && start < n)
        absmax[start >> shape.shift] = scale.absmax;
    return scale.inverse;
}
