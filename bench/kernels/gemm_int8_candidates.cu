// Shapes of the kernels for Hopper of gemm_int8 that no plan selects yet: gemm_int8_bench.cu times them beside those that
// plans select, and the emulation tests run them.
#include "gemm_int8_skinny_sm90.cuh"
#include "gemm_int8_sm90_multiply.cuh"

// V(name, tokens, warpgroups that multiply, stages, cluster, split last block). `split`: the last block of a tile is
// multiplied in two halves of its tokens, one of which is rounded under the other; before, ptxas serialised that. 192
// columns: 27 bytes of L2 a clock in place of 36, and 7 tiles instead of 10 at n = 1280. c2: the cluster shares the input.
#define QBITS_TILE_CANDIDATES(V)            \
    V(256x128_split, 256, 2, 4, 1, true)    \
    V(256x128_c2, 256, 2, 4, 2, false)      \
    V(256x128_c2_split, 256, 2, 4, 2, true) \
    V(128x128_split, 128, 2, 6, 1, true)    \
    V(128x128_c2, 128, 2, 6, 2, false)      \
    V(256x192, 256, 3, 3, 1, false)         \
    V(256x192_split, 256, 3, 3, 1, true)    \
    V(256x192_c2, 256, 3, 3, 2, false)      \
    V(256x192_c2_split, 256, 3, 3, 2, true) \
    V(128x192, 128, 3, 4, 1, false)         \
    V(128x192_split, 128, 3, 4, 1, true)

// V(name, tokens, columns, stages, parts of K). Eight tokens: wgmma of the smallest size. s5: two CTAs fit a
// multiprocessor. 192 columns: few tiles at n = 1280.
#define QBITS_SKINNY_CANDIDATES(V) \
    V(8x64k1s10, 8, 64, 10, 1)     \
    V(8x64k2s10, 8, 64, 10, 2)     \
    V(8x64k4s10, 8, 64, 10, 4)     \
    V(8x64k1s20, 8, 64, 20, 1)     \
    V(8x128k1s8, 8, 128, 8, 1)     \
    V(8x128k2s8, 8, 128, 8, 2)     \
    V(16x64k1s18, 16, 64, 18, 1)   \
    V(16x64k2s18, 16, 64, 18, 2)   \
    V(16x128k2s10, 16, 128, 10, 2) \
    V(32x64k1s8, 32, 64, 8, 1)     \
    V(32x64k2s8, 32, 64, 8, 2)     \
    V(32x64k4s8, 32, 64, 8, 4)     \
    V(64x64k1s5, 64, 64, 5, 1)     \
    V(64x64k2s5, 64, 64, 5, 2)     \
    V(64x64k4s5, 64, 64, 5, 4)     \
    V(64x64k1s10, 64, 64, 10, 1)   \
    V(64x64k2s10, 64, 64, 10, 2)   \
    V(64x128k1s8, 64, 128, 8, 1)   \
    V(64x128k2s8, 64, 128, 8, 2)   \
    V(64x128k4s8, 64, 128, 8, 4)   \
    V(128x128k4s5, 128, 128, 5, 4) \
    V(128x192k1s5, 128, 192, 5, 1) \
    V(128x192k2s4, 128, 192, 4, 2) \
    V(128x192k4s3, 128, 192, 3, 4)

#define QBITS_TILE(name, ...)                                                                               \
    extern "C" __global__ void __launch_bounds__(gemm_int8::Shape<int8_t, bfloat16, __VA_ARGS__>::kThreads, \
                                                 1)                                                         \
        gemm_int8_tile##name##_bfloat16(const __grid_constant__ GemmInt8Sm90Params p) {                     \
        gemm_int8_sm90<gemm_int8::Shape<int8_t, bfloat16, __VA_ARGS__>>(p);                                 \
    }
#define QBITS_SKINNY(name, ...)                                                              \
    extern "C" __global__ void __launch_bounds__(                                            \
        gemm_int8::SkinnyShape<int8_t, bfloat16, __VA_ARGS__>::kThreads)                     \
        gemm_int8_skinny_##name##_bfloat16(const __grid_constant__ GemmInt8SkinnyParams p) { \
        gemm_int8_skinny_sm90<gemm_int8::SkinnyShape<int8_t, bfloat16, __VA_ARGS__>>(p);     \
    }
QBITS_TILE_CANDIDATES(QBITS_TILE)
QBITS_SKINNY_CANDIDATES(QBITS_SKINNY)
#undef QBITS_TILE
#undef QBITS_SKINNY
