// gemm_4bit for few tokens: output[m, n] = input[m, k] * dequantize(weight)[n, k]^T + bias, any m by passes
// over the weight. Codes in place, two to a byte, absmax per block: Dettmers et al., QLoRA, arXiv:2305.14314,
// section 3.
//
// Launch: ceil_div is that of integers; num_sms is the device's.
//
// | kernel                                     | may run when                                   | grid |
// threads | dynamic shared |
// |--------------------------------------------|------------------------------------------------|-------------------|---------|----------------|
// | gemm_4bit_skinny_rows{R}_{dtype}_{tokens}  | capability >= 8.0, float16 or bfloat16, K % 64 | see below
// | W * 32  | 66560          | |                                            | == 0, block_size >= 64 (32:
// _block32_), packed |                   |         |                | | | and input 16-byte aligned | | | |
// | gemm_4bit_skinny_words_{dtype}_{tokens}    | K % 8 == 0, packed 4-byte, input 16-byte       | ceil_div(n,
// 8)    | 256     | 0              | |                                            | aligned | |         | |
// | gemm_4bit_skinny_general_{dtype}_{tokens}  | always                                         | ceil_div(n,
// 8)    | 256     | 0              |
//
// The first of the table that may run is taken; m, n > 0. absmax, absmax_scale, absmax_offset,
// absmax_codebook, bias and output need the alignment of their element.
#include "gemm_4bit_skinny_mma.cuh"
#include "gemm_4bit_skinny_simt.cuh"

#define GEMM_4BIT_SKINNY_MMA(name, T, kNested, kTiles, kTokenTiles, kBlocks)                          \
    extern "C" __global__ void __launch_bounds__(skinny::kMaxThreads, 1)                              \
        gemm_4bit_skinny_##name(const __grid_constant__ Gemm4bitSkinnyParams p) {                     \
        gemm_4bit_skinny_mma<T, kNested, kTiles, kTokenTiles, kBlocks>(p);                            \
    }
#define GEMM_4BIT_SKINNY_MMA_OF(T, name, kNested)                       \
    GEMM_4BIT_SKINNY_MMA(rows32_##name##_4, T, kNested, 2, 1, 2)         \
    GEMM_4BIT_SKINNY_MMA(rows32_##name##_8, T, kNested, 2, 2, 2)         \
    GEMM_4BIT_SKINNY_MMA(rows64_##name##_4, T, kNested, 4, 1, 2)         \
    GEMM_4BIT_SKINNY_MMA(rows64_##name##_8, T, kNested, 4, 2, 2)         \
    GEMM_4BIT_SKINNY_MMA(rows32_block32_##name##_4, T, kNested, 2, 2, 4) \
    GEMM_4BIT_SKINNY_MMA(rows64_block32_##name##_4, T, kNested, 4, 2, 4)
GEMM_4BIT_SKINNY_MMA_OF(bfloat16, bfloat16, false)
GEMM_4BIT_SKINNY_MMA_OF(bfloat16, nested_bfloat16, true)
GEMM_4BIT_SKINNY_MMA_OF(float16, float16, false)
GEMM_4BIT_SKINNY_MMA_OF(float16, nested_float16, true)

#define GEMM_4BIT_SKINNY_SIMT(name, T, kNested, kTokens, kAligned)                                    \
    extern "C" __global__ void __launch_bounds__(skinny_simt::kThreads, kAligned ? (kTokens == 1 ? 3 : 2) : 1)         \
        gemm_4bit_skinny_##name(const __grid_constant__ Gemm4bitSkinnyParams p) {                     \
        gemm_4bit_skinny_simt<T, kNested, kTokens, kAligned>(p);                                      \
    }
#define GEMM_4BIT_SKINNY_SIMT_OF(T, name, kNested)                \
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
