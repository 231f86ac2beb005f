// gemm_4bit for few tokens: output[m, n] = input[m, k] * dequantize(weight)[n, k]^T + bias, any m by passes
// over the weight. Codes in place, two to a byte, absmax per block: Dettmers et al., QLoRA, arXiv:2305.14314,
// section 3.
//
// Launch: the first of these kernels that may run; m, n > 0. {nested_}: nested absmax; {dtype}: of the input.
//
// gemm_4bit_skinny_rows{R}_{nested_}{dtype}_{tokens}; block_size 32: .._rows32_block32_{nested_}{dtype}_4
//     may run  capability >= 8.0, float16 or bfloat16, k % 64 == 0, k <= 2^24, packed and input on 16 bytes
//     threads  256 if num_tiles > 4 num_sms or (num_sms < num_tiles <= 2 num_sms and k <= 4096), else 512
//     R        32 if block_size == 32 or num_tiles <= 2 slots, else 64; tokens: 4 if m <= 4, else 8
//     grid     min(num_tiles, ceil_div(num_tiles, slots * R / 16) * slots)
//     shared   33792 + threads * R bytes
//     where num_tiles = ceil_div(n, 16), slots = num_sms * (512 / threads): the CTAs that are resident;
//     tiles_per_cta = num_tiles / grid, num_larger_ctas = num_tiles % grid
// gemm_4bit_skinny_words_{nested_}{dtype}_{tokens}
//     may run  k % 8 == 0, packed on 4 bytes, input on 16
//     grid     ceil_div(n, 8); threads 256; no dynamic shared memory; tokens: 1 if m == 1, else 4
// gemm_4bit_skinny_general_{nested_}{dtype}_{tokens}: always; launched as the one before
//
// absmax, absmax_scale, absmax_offset, absmax_codebook, bias and output are aligned to their elements.
#include "gemm_4bit_skinny_mma.cuh"
#include "gemm_4bit_skinny_simt.cuh"

#define GEMM_4BIT_SKINNY_MMA(name, T, kNested, kTiles, kTokenTiles, kBlocks)      \
    extern "C" __global__ void __launch_bounds__(skinny::kMaxThreads, 1)          \
        gemm_4bit_skinny_##name(const __grid_constant__ Gemm4bitSkinnyParams p) { \
        gemm_4bit_skinny_mma<T, kNested, kTiles, kTokenTiles, kBlocks>(p);        \
    }
#define GEMM_4BIT_SKINNY_MMA_OF(T, name, kNested)                \
    GEMM_4BIT_SKINNY_MMA(rows32_##name##_4, T, kNested, 2, 1, 2) \
    GEMM_4BIT_SKINNY_MMA(rows32_##name##_8, T, kNested, 2, 2, 2) \
    GEMM_4BIT_SKINNY_MMA(rows64_##name##_4, T, kNested, 4, 1, 2) \
    GEMM_4BIT_SKINNY_MMA(rows64_##name##_8, T, kNested, 4, 2, 2) \
    GEMM_4BIT_SKINNY_MMA(rows32_block32_##name##_4, T, kNested, 2, 2, 4)
GEMM_4BIT_SKINNY_MMA_OF(bfloat16, bfloat16, false)
GEMM_4BIT_SKINNY_MMA_OF(bfloat16, nested_bfloat16, true)
GEMM_4BIT_SKINNY_MMA_OF(float16, float16, false)
GEMM_4BIT_SKINNY_MMA_OF(float16, nested_float16, true)

#define GEMM_4BIT_SKINNY_SIMT(name, T, kNested, kTokens, kAligned)                      \
    extern "C" __global__ void __launch_bounds__(skinny_simt::kThreads,                 \
                                                 kAligned ? (kTokens == 1 ? 3 : 2) : 1) \
        gemm_4bit_skinny_##name(const __grid_constant__ Gemm4bitSkinnyParams p) {       \
        gemm_4bit_skinny_simt<T, kNested, kTokens, kAligned>(p);                        \
    }
#define GEMM_4BIT_SKINNY_SIMT_OF(T, name, kNested)                  \
    GEMM_4BIT_SKINNY_SIMT(words_##name##_1, T, kNested, 1, true)    \
    GEMM_4BIT_SKINNY_SIMT(words_##name##_4, T, kNested, 4, true)    \
    GEMM_4BIT_SKINNY_SIMT(general_##name##_1, T, kNested, 1, false) \
    GEMM_4BIT_SKINNY_SIMT(general_##name##_4, T, kNested, 4, false)
GEMM_4BIT_SKINNY_SIMT_OF(float, float32, false)
GEMM_4BIT_SKINNY_SIMT_OF(float, nested_float32, true)
GEMM_4BIT_SKINNY_SIMT_OF(float16, float16, false)
GEMM_4BIT_SKINNY_SIMT_OF(float16, nested_float16, true)
GEMM_4BIT_SKINNY_SIMT_OF(bfloat16, bfloat16, false)
GEMM_4BIT_SKINNY_SIMT_OF(bfloat16, nested_bfloat16, true)
