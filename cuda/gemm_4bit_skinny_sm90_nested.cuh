// Nested absmax of gemm_4bit_skinny_sm90: two warps turn the codes of a stage into the floats that absmax would be.
#pragma once
#include "gemm_4bit_skinny.cuh"
#include "ptx_sm90.cuh"

namespace skinny_sm90 {

/// One of the warps that decode; each takes every second stage. (One warp for all stages made the kernels 10 to 30 %
/// slower, and so did decoding by the warps that multiply.) The floats lie as TMA would have brought them.
template <typename S>
class ScaleDecoder {
 public:
    /// `full`: barriers of the ring's stages; `ready`: those behind which the floats are.
    __device__ __forceinline__ ScaleDecoder(const Gemm4bitSkinnyParams& p, uint32_t base, uint32_t full,
                                            uint32_t ready, int64_t first_row, int num_tiles, int first_panel,
                                            int num_panels, int part)
        : p_(p),
          base_(base),
          full_(full),
          ready_(ready),
          first_row_(first_row),
          num_tiles_(num_tiles),
          first_panel_(first_panel),
          num_panels_(num_panels),
          row_blocks_(int(p.k) >> p.block_shift),
          skip_(part),
          map_(base + S::kMap + part * 1024),
          offset_(*p.absmax_offset) {
        next_groups_ = load_groups(0);
        const float* const from = p.absmax_codebook ? p.absmax_codebook : kDynamicMap.value;
        #pragma unroll
        for (int i = threadIdx.x % 32; i < 256; i += 32)
            store_shared_4(map_ + 4 * i, __float_as_uint(from[i]));
        __syncwarp();
    }
    /// Its stages of a tile; tiles in order.
    __device__ __forceinline__ void decode(int tile) {
        const float groups = next_groups_;
        next_groups_ = load_groups(tile + 1);
        const int in_group = int((first_row_ + tile * S::kRows) * row_blocks_ & 255);
        #pragma unroll 1
        for (int panel = first_panel_; panel < first_panel_ + num_panels_; ++panel) {
            if (skip_ == 0) {
                barrier_wait(full_ + 8 * slot_, parity_);
                decode_stage(groups, in_group, panel * S::kPanel >> p_.block_shift);
                barrier_arrive(ready_ + 8 * slot_);
            }
            skip_ ^= 1;
            if (++slot_ == S::kStages) slot_ = 0, parity_ ^= 1;
        }
    }

 private:
    /// Lane i has the scale of the i-th 256 codes of a tile, of which there are 29 at most.
    __device__ __forceinline__ float load_groups(int tile) const {
        const int64_t group = ((first_row_ + tile * S::kRows) * row_blocks_ >> 8) + int(threadIdx.x % 32);
        const bool exists = tile < num_tiles_ && group < (p_.n * row_blocks_ + 255) >> 8;
        return exists ? __ldg(p_.absmax_scale + group) : 0.0f;
    }
    __device__ __forceinline__ void decode_stage(float groups, int in_group, int first_block) const {
        constexpr int kMost = S::kRows * S::kPanel / 64 / 4 / 32;  // words of a lane, four codes each
        const int log2_words = (S::kPanel == 2048 ? 11 : 10) - 2 - p_.block_shift, lane = threadIdx.x % 32;
        const int row_bytes = max(4 << log2_words, 16), row_scale_bytes = 16 << log2_words;
        const uint32_t scales = base_ + S::kRing + slot_ * S::kStageBytes + S::kCodeBytes;
        const uint32_t codes = scales + S::kScaleBytes + (row_bytes > 4 << log2_words ? first_block % 16 : 0);
        uint32_t code[kMost];
        float group[kMost], scale[kMost][4];
        #pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const int at = i * 32 + lane, row = at >> log2_words, word = at & (1 << log2_words) - 1;
            code[i] = row < S::kRows ? load_shared_4(codes + row * row_bytes + word * 4) : 0;
            group[i] = __shfl_sync(~0u, groups, (in_group + row * row_blocks_ + first_block + 4 * word) >> 8);
        }
        #pragma unroll
        for (int i = 0; i < kMost; ++i)
            #pragma unroll
            for (int j = 0; j < 4; ++j) {
                const uint32_t value = load_shared_4(map_ + 4 * (code[i] >> 8 * j & 255));
                scale[i][j] = __fadd_rn(__fmul_rn(__uint_as_float(value), group[i]), offset_);
            }
        #pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const int piece = i * 32 + lane, at = piece * 16;
            if (at < S::kRows * row_scale_bytes)
                store_shared_16(scales + (at ^ (at >> 7 & (row_scale_bytes / 16 - 1)) << 4),
                                make_uint4(__float_as_uint(scale[i][0]), __float_as_uint(scale[i][1]),
                                           __float_as_uint(scale[i][2]), __float_as_uint(scale[i][3])));
        }
    }

    const Gemm4bitSkinnyParams& p_;
    uint32_t base_, full_, ready_;
    int64_t first_row_;
    int num_tiles_, first_panel_, num_panels_, row_blocks_, skip_;
    uint32_t map_;
    int slot_ = 0;
    uint32_t parity_ = 0;
    float offset_, next_groups_;
};

}  // namespace skinny_sm90
