// gemm_int8 for few tokens on sm_90a.
//
// Launch: gemm_int8_skinny_{tokens}x{columns}k{parts}_{dtype}, dtype of the output; int32: raw sums
//     may run  as gemm_int8_sm90.cu; ceil_div(m, tokens) <= 65535
//     threads  2 * columns + 32; cluster {parts, 1, 1}; dependent launch allowed
//     shared   stages * (tokens + columns) * 128 + (parts - 1) / parts * tokens * columns * 4 + 4 * tokens + 16 * stages + 8
//              bytes; stages: 16x128 5, 16x64 10, 64x64 6, 128x128 5
//     input    {k, m} of codes, strides {1, k} bytes, box {128, tokens}, 128 B swizzle; weight likewise: {k, n}, {128,
//              columns}
//     choice   m <= 16: 16x128k1 from n = 16384 on, else 16x64, m <= 64: 64x64; k1 from 200 tiles of 64 columns on, k2 from
//              40 on, else k4. More: 128x128, k2 where 2 * tiles <= num_sms
//     grid     {ceil_div(n, columns) * parts, ceil_div(m, tokens), 1}
//
// Measured on an H200 with the kernels that these come from (parts summed element by element behind a barrier of the
// cluster), us, cold weights, dependent launches, and the share of 4.4 TB/s on all bytes:
//     n x k      4096 x 4096    14336 x 4096    4096 x 14336    8192 x 8192    28672 x 8192    5120 x 1280    1280 x 5120
//     m = 16     6.7 (57 %)     16.9 (80 %)     17.5 (77 %)     18.4 (83 %)    60.0 (89 %)     3.7 (42 %)     4.3 (36 %)
//     m = 64     9.6 (41 %)     20.6 (67 %)     20.7 (66 %)     22.0 (71 %)    69.9 (78 %)     6.5 (25 %)     6.8 (24 %)
//     m = 128    14.8                                           27.0
#include "gemm_int8_skinny_sm90.cuh"

#define GEMM_INT8_SKINNY(name, ...)                                                             \
    extern "C" __global__ void __launch_bounds__(gemm_int8::SkinnyShape<__VA_ARGS__>::kThreads) \
        gemm_int8_skinny_##name(const __grid_constant__ GemmInt8SkinnyParams p) {               \
        gemm_int8_skinny_sm90<gemm_int8::SkinnyShape<__VA_ARGS__>>(p);                          \
    }
#define GEMM_INT8_SKINNY_OF(Output, dtype)                              \
    GEMM_INT8_SKINNY(16x128k1_##dtype, int8_t, Output, 16, 128, 5, 1)   \
    GEMM_INT8_SKINNY(16x64k1_##dtype, int8_t, Output, 16, 64, 10, 1)    \
    GEMM_INT8_SKINNY(16x64k2_##dtype, int8_t, Output, 16, 64, 10, 2)    \
    GEMM_INT8_SKINNY(16x64k4_##dtype, int8_t, Output, 16, 64, 10, 4)    \
    GEMM_INT8_SKINNY(64x64k1_##dtype, int8_t, Output, 64, 64, 6, 1)     \
    GEMM_INT8_SKINNY(64x64k2_##dtype, int8_t, Output, 64, 64, 6, 2)     \
    GEMM_INT8_SKINNY(64x64k4_##dtype, int8_t, Output, 64, 64, 6, 4)     \
    GEMM_INT8_SKINNY(128x128k1_##dtype, int8_t, Output, 128, 128, 5, 1) \
    GEMM_INT8_SKINNY(128x128k2_##dtype, int8_t, Output, 128, 128, 5, 2)
GEMM_INT8_SKINNY_OF(float32, float32)
GEMM_INT8_SKINNY_OF(float16, float16)
GEMM_INT8_SKINNY_OF(bfloat16, bfloat16)
GEMM_INT8_SKINNY_OF(int32_t, int32)
