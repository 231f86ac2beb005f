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

/// How blocks of one size lie in warp tiles, and what one lane has to do with them; the same for every tile
/// of a walk.
template <typename T>
struct BlockLane {
    int shift;  // log2 of the block size
    int lanes;  // of one row that share a block: 4 to 32
    int rows;   // of one tile that share a block: 1, 2 or 4
    int warps;  // of one CTA that share a block: a power of two
    int lane, warp;
    int start;      // first element, from the tile's first, of the block of row `lane % lanes`
    bool is_first;  // of the lanes that know that block

    __device__ __forceinline__ BlockLane(int block_shift, int lane, int warp)
        : shift(block_shift),
          lanes(::min(1 << (block_shift - kVectorShift), 32)),
          rows(::min(1 << ::max(block_shift - kRowShift, 0), WarpTile<T>::kRows)),
          warps(1 << ::max(block_shift - kTileShift, 0)),
          lane(lane),
          warp(warp) {
        const int row = lane & (lanes - 1);
        start = row * WarpTile<T>::kRowElements + (lane - row) * WarpTile<T>::kVector;
        is_first = row < 4 && ((row & (rows - 1)) | (warp & (warps - 1))) == 0;
    }

 private:
    static constexpr int kVectorShift = sizeof(T) == 2 ? 3 : 2, kRowShift = kVectorShift + 5,
                         kTileShift = kRowShift + 2;
};

/// Bits of the absmax of the block of row `lane % 4` in this lane's group of self.lanes lanes.
///
/// If blocks span warps, all threads of the CTA must call, with a `warp_max` [kThreads / 32] that no warp
/// still reads.
template <int kThreads, typename T>
__device__ __forceinline__ uint32_t block_absmax(const WarpTile<T>& tile, const BlockLane<T>& self,
                                                 uint32_t* warp_max) {
    using Tile = WarpTile<T>;
    static_assert(Tile::kRows == 4, "the exchange below is for four maxima");
    static_assert(Tile::kElements * (kThreads / 32) >= 4096, "the largest block must fit into a CTA's tiles");
    uint32_t m[4];
    #pragma unroll
    for (int r = 0; r < 4; ++r) m[r] = Magnitude<T>::of(tile.row[r]);
    if (self.rows > 1) {
        m[0] = m[1] = Magnitude<T>::max(m[0], m[1]);
        m[2] = m[3] = Magnitude<T>::max(m[2], m[3]);
        if (self.rows > 2) m[0] = m[1] = m[2] = m[3] = Magnitude<T>::max(m[0], m[2]);
    }

    // Halving the number of maxima at each of the first two steps costs 3 shuffles instead of 8.
    #pragma unroll
    for (int d = 1; d < 4; d *= 2) {
        const bool odd = self.lane & d;
        #pragma unroll
        for (int i = 0; i < 4; i += 2 * d) {
            const uint32_t keep = odd ? m[i + d] : m[i], send = odd ? m[i] : m[i + d];
            m[i] = Magnitude<T>::max(keep, __shfl_xor_sync(0xffffffffu, send, d));
        }
    }
    #pragma unroll
    for (int d = 4; d < 32; d *= 2)
        if (d < self.lanes) m[0] = Magnitude<T>::max(m[0], __shfl_xor_sync(0xffffffffu, m[0], d));
    uint32_t bits = Magnitude<T>::to_float_bits(m[0]);

    if (self.warps > 1) {
        if (self.lane == 0) warp_max[self.warp] = bits;
        __syncthreads();
        bits = warp_max[(self.warp & ~(self.warps - 1)) | (self.lane & (self.warps - 1))];
        #pragma unroll
        for (int d = 1; d < kThreads / 32; d *= 2)
            if (d < self.warps) bits = ::max(bits, __shfl_xor_sync(0xffffffffu, bits, d));
    }
    return bits;
}

/// Stores the absmax of every block of a tile. Returns the reciprocal (0 for a block that is zero or holds a
/// NaN or an Inf) for the block of this lane (block_absmax), so that a tile pays for one division: row r is
/// scaled by the value of lane r of its group.
template <bool kFull, int kThreads, typename T>
__device__ __forceinline__ float block_scales(const WarpTile<T>& tile, const BlockLane<T>& self,
                                              uint32_t* warp_max, float* absmax, int64_t first, int64_t n) {
    const Scale scale = scale_of<1>(block_absmax<kThreads>(tile, self, warp_max));
    if (self.is_first && (kFull || first + self.start < n))
        absmax[(first >> self.shift) + (self.start >> self.shift)] = scale.absmax;
    return scale.inverse;
}
