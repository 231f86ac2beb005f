// gemm_4bit for 9 to 128 tokens on sm_90a: output[m, n] = input[m, k] * dequantize(weight)[n, k]^T + bias, any m by
// passes over the weight. Codes in place, two to a byte, absmax per block: Dettmers et al., QLoRA,
// arXiv:2305.14314, section 3.
//
// Launch: capability 9.0, float16 or bfloat16, k % 64 == 0, k >= 64, m, n > 0, input and packed on 16 bytes.
//
// gemm_4bit_mid_{T}x{R}_{dtype}; block_size 32: gemm_4bit_mid_{T}x{R}_block32_{dtype}
//     T        tokens of a tile: 16 if m <= 16, 32 if m <= 32, 64 if m <= 64, else 128
//     R        most rows of a tile, by tiles64 = ceil_div(n, 64): 64 if tiles64 <= num_sms (T = 128: num_sms / 2), or if
//              T = 64 and tiles64 > 2 num_sms; else 128
//     cluster  CTAs that divide k, 1 to 8 are right: 2 if tiles64 <= num_sms / 2, or if T = 128 and
//              tiles64 <= num_sms; else 1
//     rows_per_tile  any multiple of 16 up to R is right. R = 64 or T >= 64: R; else
//              ceil_div(n, 16 waves num_sms) * 16 where waves = ceil_div(n, 128 num_sms)
//     grid     x: cluster = 2: 2 tiles, where tiles = ceil_div(n, rows_per_tile); else as many CTAs as share the tiles
//              evenly, each taking every grid-th: ceil_div(tiles, ceil_div(tiles, num_sms)); y: ceil_div(m, T)
//     threads, shared bytes, stage_k: a stage of the ring holds stage_k columns, 128 or 256
//         kernel   threads  shared  stage_k | block32: threads  shared  stage_k
//         16x64      640    173568    256   |            640    181760    256
//         16x128     640    194048    256   |            640    206336    256
//         32x64      640    220672    128   |            640    226816    128
//         32x128     640    173568    256   |            640    214528    256
//         64x64      512    193024    128   |            512    196096    128
//         64x128     384    220672    128   |            384    226816    128
//         128x64     384    216576    128   |            384    218624    128
//         128x128    384    193024    128   |            384    196096    128
//     input    tensor map of T: dimensions {64, m, k / 64}, strides {2 k, 128} bytes, box {64, T, stage_k / 64},
//              swizzle 128 B, elements beyond the edge 0, L2 promotion 256 B
//     packed   tensor map of bytes: dimensions {k / 2, n}, stride {k / 2}, box {stage_k / 2, rows_per_tile},
//              swizzle as wide as the box: stage_k / 2 bytes, L2 promotion 256 B
//     absmax   where scales_by_copy: tensor map of floats: dimensions {k / block, n}, stride {4 k / block}, box
//              {stage_k / block, rows_per_tile}, no swizzle; for blocks of 64, or of 32 in their kernels, not nested,
//              where the stride and the box's rows are multiples of 16 bytes
// The cluster size is a launch attribute; programmatic stream serialization is allowed.
#include "gemm_4bit_mid.cuh"

#define GEMM_4BIT_MID(name, T, ...)                                                    \
    extern "C" __global__ void __launch_bounds__(mid::Shape<__VA_ARGS__>::kThreads, 1) \
        gemm_4bit_mid_##name(const __grid_constant__ Gemm4bitMidParams p) {            \
        gemm_4bit_mid<T, mid::Shape<__VA_ARGS__>>(p);                                  \
    }
// Tokens, tiles of 64 rows, groups, blocks of 64 columns in a stage, least block size, whether to decode ahead.
#define GEMM_4BIT_MID_OF(T, name, kUnit)                      \
    GEMM_4BIT_MID(16x64_##name, T, 16, 1, 4, 4, kUnit)        \
    GEMM_4BIT_MID(16x128_##name, T, 16, 2, 2, 4, kUnit)       \
    GEMM_4BIT_MID(32x64_##name, T, 32, 1, 4, 2, kUnit)        \
    GEMM_4BIT_MID(32x128_##name, T, 32, 2, 2, 4, kUnit)       \
    GEMM_4BIT_MID(64x64_##name, T, 64, 1, 3, 2, kUnit)        \
    GEMM_4BIT_MID(64x128_##name, T, 64, 2, 1, 2, kUnit, true) \
    GEMM_4BIT_MID(128x64_##name, T, 128, 1, 2, 2, kUnit)      \
    GEMM_4BIT_MID(128x128_##name, T, 128, 2, 1, 2, kUnit, true)
GEMM_4BIT_MID_OF(bfloat16, bfloat16, 64)
GEMM_4BIT_MID_OF(bfloat16, block32_bfloat16, 32)
GEMM_4BIT_MID_OF(float16, float16, 64)
GEMM_4BIT_MID_OF(float16, block32_float16, 32)
