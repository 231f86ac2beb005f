// gemm_4bit for one to eight tokens on sm_90a: what gemm_4bit_skinny.cu does, through TMA.
//
// Launch, m, n > 0. {nested_}: nested absmax; {dtype}: of the input, float16 or bfloat16.
//
// gemm_4bit_skinny_columns{columns}_{nested_}{dtype}_{tokens}
//     may run  k <= columns, k % 256 == 0; n < 2^31; packed, absmax and input on 16 bytes; block_size 64 .. 512
//              (256 where two CTAs divide the columns) and k % (4 * block_size) == 0; nested: block_size 64 or 128,
//              k % (16 * block_size) == 0
//     columns  k <= 8192 ? 8192 : 14336
//     tokens, threads, shared bytes; nested: 32 threads and 6144 bytes more
//              m == 1: 1, 320, 107664
//              m == 2: 2, 320, 108688
//              m <= 4: 4, k <= 8192 ? 320, 112784 : 576, 118928
//              m <= 8: 8, 576, k <= 8192 ? 127120 : 148624, and the latter in clusters of two
//     grid     min(num_tiles, num_sms), num_tiles = ceil_div(n, 16); dependent launch if weights_ready;
//              clusters: min(ceil_div(n, 32), num_sms / 2) of them
//     tiles_per_cta = num_tiles / grid, num_larger_ctas = num_tiles % grid, of clusters where there are
//
// A CTA takes half of an SM's shared memory, so that the CTA of the next kernel can load its weight meanwhile
// (with one token the registers allow it, too). A ring of nine stages in place of four is 3 to 12 % slower.
#include "gemm_4bit_skinny_sm90.cuh"

#define GEMM_4BIT_SKINNY_COLUMNS(name, T, ...)                                                 \
    extern "C" __global__ void __launch_bounds__(skinny_sm90::Shape<__VA_ARGS__>::kThreads, 1) \
        gemm_4bit_skinny_##name(const __grid_constant__ Gemm4bitSkinnySm90Params q) {          \
        gemm_4bit_skinny_columns<T, skinny_sm90::Shape<__VA_ARGS__>>(q);                       \
    }
#define GEMM_4BIT_SKINNY_COLUMNS_OF(T, name, kNested)                       \
    GEMM_4BIT_SKINNY_COLUMNS(columns8192_##name##_1, T, kNested, 1, 4, 8)   \
    GEMM_4BIT_SKINNY_COLUMNS(columns14336_##name##_1, T, kNested, 1, 7, 8)  \
    GEMM_4BIT_SKINNY_COLUMNS(columns8192_##name##_2, T, kNested, 2, 4, 8)   \
    GEMM_4BIT_SKINNY_COLUMNS(columns14336_##name##_2, T, kNested, 2, 7, 8)  \
    GEMM_4BIT_SKINNY_COLUMNS(columns8192_##name##_4, T, kNested, 4, 4, 8)   \
    GEMM_4BIT_SKINNY_COLUMNS(columns14336_##name##_4, T, kNested, 4, 7, 16) \
    GEMM_4BIT_SKINNY_COLUMNS(columns8192_##name##_8, T, kNested, 8, 4, 16)  \
    GEMM_4BIT_SKINNY_COLUMNS(columns14336_##name##_8, T, kNested, 8, 7, 16, 1024, 2, 2)
GEMM_4BIT_SKINNY_COLUMNS_OF(bfloat16, bfloat16, false)
GEMM_4BIT_SKINNY_COLUMNS_OF(bfloat16, nested_bfloat16, true)
GEMM_4BIT_SKINNY_COLUMNS_OF(float16, float16, false)
GEMM_4BIT_SKINNY_COLUMNS_OF(float16, nested_float16, true)
