// gemm_int8 for many tokens on sm_90a.
//
// Launch: gemm_int8_tile{tokens}x{columns}_{dtype}, dtype of the output; int32: raw sums
//     may run  capability 9.0, k % 16 == 0, 0 < k <= 131071, input and weight on 16 bytes, m, n in 31 bits with a tile to
//              spare, tiles in 31 bits
//     threads  384; dependent launch allowed
//     shared   256x128: 230544 bytes; 128x128: 230064
//     input    {k, m} of codes, strides {1, k} bytes, box {128, tokens}, 128 B swizzle; weight likewise: {k, n}, {128, 128}
//     output   {n, m}, box {128 bytes, 128 / size}, 128 B swizzle, if output_by_tma: rows on 16 bytes; else anything
//     tiles    num_token_tiles * num_column_tiles; ceil_div(m, tokens), ceil_div(n, 128); raster_tokens = min(8,
//              num_token_tiles): measured flat from 4 to 16
//     choice   128 tokens where 112 * waves(128 tokens) < 200 * waves(256 tokens), waves = ceil_div(tiles, num_sms)
//     grid     min(tiles, num_sms)
//
// Measured on an H200 with the kernels that these come from (another order of the scales, one instruction more for every
// output), us, bfloat16 output with scales and bias, cold operands, beside torch._int_mm without them (in brackets):
//     n x k          4096 x 4096    14336 x 4096    8192 x 8192    5120 x 1280     1280 x 5120
//     m = 1024       25.7 (53.4)    89.1 (175)      91.0 (170)     15.2 (23.8)     22.7 (32.0)
//     m = 4096       89.7 (172)     310 (611)       346 (654)      41.6 (96.3)     54.9 (76.4)
//     m = 16384      384 (796)      1262 (2521)     1541 (2692)    181 (392)       146 (282)
// A block of 128 codes takes its 1024 clocks of wgmma: tensor cores never wait for loads within a tile. What is lost is the
// clock, which power sets, and some 2350 clocks between tiles: scaling and rounding, 224 instructions for 64 sums.
// A store by TMA holds its warp for 250 to 300 clocks, hence the warps that only store. Staging between the products of
// two tiles waits for the stores of all multiprocessors: the rounded pairs wait in registers instead. Clusters that share
// the input were 3 to 8 % slower in short runs and 1 % faster in long ones; clusters of four leave 12 of 132 idle.
#include "gemm_int8_sm90_multiply.cuh"

#define GEMM_INT8(name, ...)                                                                 \
    extern "C" __global__ void __launch_bounds__(gemm_int8::Shape<__VA_ARGS__>::kThreads, 1) \
        gemm_int8_##name(const __grid_constant__ GemmInt8Sm90Params p) {                     \
        gemm_int8_sm90<gemm_int8::Shape<__VA_ARGS__>>(p);                                    \
    }
#define GEMM_INT8_OF(Output, dtype)                           \
    GEMM_INT8(tile256x128_##dtype, int8_t, Output, 256, 2, 4) \
    GEMM_INT8(tile128x128_##dtype, int8_t, Output, 128, 2, 6)
GEMM_INT8_OF(float32, float32)
GEMM_INT8_OF(float16, float16)
GEMM_INT8_OF(bfloat16, bfloat16)
GEMM_INT8_OF(int32_t, int32)
