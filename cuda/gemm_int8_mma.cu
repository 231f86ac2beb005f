// gemm_int8 and gemm_int8_outliers by mma.sync, from compute capability 8.0 on.
// Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, arXiv:2208.07339, section 2.
//
// Launch: 256 threads, 65536 bytes of dynamic shared memory, one CTA for each tile of the output; m, n > 0, k <= 131071
// and a multiple of 16, input and weight on 16 bytes.
//   gemm_int8_mma_{float32,float16,bfloat16,int32}_{32,128}   tiles of 32 x 32 or 128 x 128
//   gemm_int8_outliers_mma_{float16,bfloat16}_{32,128}        with the columns that gemm_int8_list_columns leaves
#include "gemm_int8_mma.cuh"

static_assert(gemm_int8::LargeTile::kSharedBytes == 65536 && gemm_int8::SmallTile::kSharedBytes == 65536,
              "keep in step with the plan");

#define GEMM_INT8_MMA(name, T, Tile, kOutliers)                                                \
    extern "C" __global__ void __launch_bounds__(gemm_int8::Tile::kThreads, kOutliers ? 1 : 2) \
        gemm_int8_##name(const __grid_constant__ GemmInt8Params p) {                           \
        gemm_int8::mma<T, gemm_int8::Tile, kOutliers>(p);                                      \
    }
#define GEMM_INT8_MMA_OF(T, name)                       \
    GEMM_INT8_MMA(mma_##name##_32, T, SmallTile, false) \
    GEMM_INT8_MMA(mma_##name##_128, T, LargeTile, false)
GEMM_INT8_MMA_OF(float32, float32)
GEMM_INT8_MMA_OF(float16, float16)
GEMM_INT8_MMA_OF(bfloat16, bfloat16)
GEMM_INT8_MMA_OF(int32_t, int32)

#define GEMM_INT8_OUTLIERS_MMA_OF(T)                         \
    GEMM_INT8_MMA(outliers_mma_##T##_32, T, SmallTile, true) \
    GEMM_INT8_MMA(outliers_mma_##T##_128, T, LargeTile, true)
GEMM_INT8_OUTLIERS_MMA_OF(float16)
GEMM_INT8_OUTLIERS_MMA_OF(bfloat16)
