// gemm_4bit_transposed for up to 32 tokens on sm_90a: what gemm_4bit_transposed.cu does, through TMA.
//
// Launch: first gemm_4bit_transposed_columns_{nested_}{dtype}_{tokens}, then gemm_4bit_transposed_columns_sum_{dtype},
// which may be a dependent launch; m, n, k > 0. {nested_}: nested absmax; {dtype}: of the input, float16 or bfloat16.
//
//   may run  n % 8 == 0, k % 64 == 0; n, k < 2^31; packed, absmax and input on 16 bytes, output on 8; block_size >= 64;
//            k % (4 * block_size) == 0; nested: k % (16 * block_size) == 0
//   tokens, threads, shared bytes
//            m <= 8: 8, 544, 191584
//            else:  16, 256, 203872
//   grid     ceil_div(k, 256) * splits * ceil_div(m, tokens); rows_per_split: a multiple of 128
//   the sum  256 threads, grid ceil_div(m * k, 1024)
//
// Weights are the codebook's values, rounded, times the scale; they are not rounded a second time.
#include "gemm_4bit_transposed_sm90.cuh"

#define GEMM_4BIT_TRANSPOSED_COLUMNS(name, T, ...)                                                    \
    extern "C" __global__ void __launch_bounds__(transposed_sm90::Shape<__VA_ARGS__>::kThreads, 1)    \
        gemm_4bit_transposed_columns_##name(const __grid_constant__ Gemm4bitTransposedSm90Params q) { \
        gemm_4bit_transposed_columns<T, transposed_sm90::Shape<__VA_ARGS__>>(q);                      \
    }
#define GEMM_4BIT_TRANSPOSED_COLUMNS_OF(T, name, kNested)    \
    GEMM_4BIT_TRANSPOSED_COLUMNS(name##_8, T, kNested, 1, 2) \
    GEMM_4BIT_TRANSPOSED_COLUMNS(name##_16, T, kNested, 2, 4)
#define GEMM_4BIT_TRANSPOSED_COLUMNS_SUM(T, name)                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                     \
        gemm_4bit_transposed_columns_sum_##name(const __grid_constant__ Gemm4bitTransposedSm90Params q) { \
        gemm_4bit_transposed_columns_sum<T>(q);                                                           \
    }
GEMM_4BIT_TRANSPOSED_COLUMNS_OF(bfloat16, bfloat16, false)
GEMM_4BIT_TRANSPOSED_COLUMNS_OF(bfloat16, nested_bfloat16, true)
GEMM_4BIT_TRANSPOSED_COLUMNS_OF(float16, float16, false)
GEMM_4BIT_TRANSPOSED_COLUMNS_OF(float16, nested_float16, true)
GEMM_4BIT_TRANSPOSED_COLUMNS_SUM(bfloat16, bfloat16)
GEMM_4BIT_TRANSPOSED_COLUMNS_SUM(float16, float16)
