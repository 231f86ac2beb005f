// gemm_4bit for 129 tokens and more on sm_90a.
//
// Launch: gemm_4bit_large_{tokens}k{parts}_{dtype}, dtype of the input; block_size 32: 256k1_unit32, 128k2_unit32
//     may run  capability 9.0, float16 or bfloat16, k % 64 == 0, k > 0, packed and input on 16 bytes, m, n, k in 31
//              bits, n * k / 32 in 31 bits, tiles in 31 bits
//     threads  tokens == 128 ? 512 : 384; cluster {parts, 1, 1}; dependent launch allowed
//     shared   230656 bytes
//     input    {64, m, k / 64} of T, strides {2, 2 k, 128} bytes, box {64, tokens, 1}, 128 B swizzle
//     packed   {k / 2, n} bytes, strides {1, k / 2}, box {64, 32}, 64 B swizzle
//     output   {n, m} of T, strides {2, 2 n}, box {64, tokens / parts}, 128 B swizzle, if output_by_tma: n % 8 == 0
//              and the output on 16 bytes; else anything
//     tiles    num_row_tiles * num_token_tiles; num_row_tiles = ceil_div(n, 128), num_token_tiles =
//              ceil_div(m, tokens), raster_tokens = min(8, num_token_tiles)
//     choice   k2 where 2 * tiles <= num_sms (128k2 before 256k2 if its tiles fit), else 256k1; 128k1 never won
//     grid     parts == 1: min(tiles, num_sms); parts == 2: 2 * tiles, which must be at most num_sms
//
// Measured on an H200, us, NF4, block 64, bfloat16, cold weights, dependent launches, one run, interleaved with cuBLAS
// on a dequantized weight (in brackets). From 1024 tokens on power limits both.
//     n x k          4096 x 4096    14336 x 4096   8192 x 8192    28672 x 8192
//     m = 256        25.5 (15.8)    60.4 (44.9)    62.9 (50.1)    229 (187)
//     m = 512        34.7 (24.5)    112 (90)       125 (99)       456 (314)
//     m = 1024       60.4 (48.2)    230 (157)      233 (185)      789 (634)
//     m = 4096       255 (204)      881 (696)      990 (801)      3450 (2725)
// Another day, 1024 tokens: 50 (44), 220 (158), 225 (192), 791 (681). Dequantizing first and cuBLAS, through the op, take
// 1.27 to 1.30 times cuBLAS at 1024 tokens and 1.08 to 1.18 times at 4096: that path is faster somewhere between.
#include "gemm_4bit_large.cuh"

#define GEMM_4BIT_LARGE(name, T, ...)                                                    \
    extern "C" __global__ void __launch_bounds__(large::Shape<__VA_ARGS__>::kThreads, 1) \
        gemm_4bit_large_##name(const __grid_constant__ Gemm4bitLargeParams p) {          \
        gemm_4bit_large<T, large::Shape<__VA_ARGS__>>(p);                                \
    }
#define GEMM_4BIT_LARGE_OF(T)                        \
    GEMM_4BIT_LARGE(256k1_##T, T, 256, 1)            \
    GEMM_4BIT_LARGE(256k2_##T, T, 256, 2)            \
    GEMM_4BIT_LARGE(128k1_##T, T, 128, 1)            \
    GEMM_4BIT_LARGE(128k2_##T, T, 128, 2)            \
    GEMM_4BIT_LARGE(256k1_unit32_##T, T, 256, 1, 32) \
    GEMM_4BIT_LARGE(128k2_unit32_##T, T, 128, 2, 32)
GEMM_4BIT_LARGE_OF(bfloat16)
GEMM_4BIT_LARGE_OF(float16)
