// gemm_4bit for one to eight tokens on sm_90a: what gemm_4bit_skinny.cu does, through TMA.
//
// Launch, m, n > 0. {nested_}: nested absmax; {dtype}: of the input, float16 or bfloat16.
//
// gemm_4bit_skinny_columns{columns}_{nested_}{dtype}_{tokens}
//     may run  k <= columns, k % 256 == 0; n < 2^31; packed, absmax and input on 16 bytes; block_size 64 .. 512
//              and k % (4 * block_size) == 0; nested: block_size 64 or 128, k % (16 * block_size) == 0, m <= 4
//     columns, tokens, threads, shared bytes
//              m == 1: k <= 8192 ? 8192 : 14336, 1, 320, 108640
//              m == 2: 14336, 2, 320, 109664
//              m <= 4: k <= 8192 ? 8192 : 14336, 4, 320, 111712
//              m <= 8: 8192, 8, 576, 124000
//     grid     min(num_tiles, num_sms), num_tiles = ceil_div(n, 16); dependent launch if weights_ready
//     tiles_per_cta = num_tiles / grid, num_larger_ctas = num_tiles % grid
//
// A CTA takes half of an SM's shared memory, so that the CTA of the next kernel can load its weight meanwhile
// (with one token the registers allow it, too). A ring of nine stages in place of four is 3 to 12 % slower.
#include "gemm_4bit_skinny_sm90.cuh"

#define GEMM_4BIT_SKINNY_COLUMNS(name, T, kNested, ...)                                        \
    extern "C" __global__ void __launch_bounds__(skinny_sm90::Shape<__VA_ARGS__>::kThreads, 1) \
        gemm_4bit_skinny_##name(const __grid_constant__ Gemm4bitSkinnySm90Params q) {          \
        gemm_4bit_skinny_columns<T, kNested, skinny_sm90::Shape<__VA_ARGS__>>(q);              \
    }
#define GEMM_4BIT_SKINNY_COLUMNS_OF(T, name, kNested)                         \
    GEMM_4BIT_SKINNY_COLUMNS(columns8192_##name##_1, T, kNested, 1, 4, 8, 4)  \
    GEMM_4BIT_SKINNY_COLUMNS(columns14336_##name##_1, T, kNested, 1, 7, 8, 4) \
    GEMM_4BIT_SKINNY_COLUMNS(columns14336_##name##_2, T, kNested, 2, 7, 8, 4) \
    GEMM_4BIT_SKINNY_COLUMNS(columns8192_##name##_4, T, kNested, 4, 4, 8, 4)  \
    GEMM_4BIT_SKINNY_COLUMNS(columns14336_##name##_4, T, kNested, 4, 7, 8, 4)
GEMM_4BIT_SKINNY_COLUMNS_OF(bfloat16, bfloat16, false)
GEMM_4BIT_SKINNY_COLUMNS_OF(bfloat16, nested_bfloat16, true)
GEMM_4BIT_SKINNY_COLUMNS_OF(float16, float16, false)
GEMM_4BIT_SKINNY_COLUMNS_OF(float16, nested_float16, true)
// Nested absmax of eight tokens would spill.
GEMM_4BIT_SKINNY_COLUMNS(columns8192_bfloat16_8, bfloat16, false, 8, 4, 16, 4)
GEMM_4BIT_SKINNY_COLUMNS(columns8192_float16_8, float16, false, 8, 4, 16, 4)
