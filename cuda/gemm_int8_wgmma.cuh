// What the kernels of gemm_int8 for sm_90a share: the operands beside the tensor maps. Weight rows are the 64 rows of
// wgmma and input rows, "tokens", its columns: the kernels compute output^T, so that a thread owns two columns of the
// output, whose scales and bias stay in registers.
#pragma once
#include "bias.cuh"
#include "gemm_int8_scales.cuh"
#include "ptx_sm90.cuh"
#include "ring.cuh"

/// Operands that need no tensor map; mirrored by `ops::gemm_int8::sm90::Operands`.
struct GemmInt8Operands {
    const float* input_scales;   // [m]         null: rows are not scaled
    const float* weight_scales;  // [n] or [1]; null: columns are not scaled
    const void* bias;            // [n]      bias_dtype, or null
    void* output;                // [m, n]   float32, float16, bfloat16, or int32: raw sums
    int32_t m;
    int32_t n;
    int32_t k;                    // a multiple of 16, at most 131071: sums fit 32 bits
    int32_t weight_scale_stride;  // 1, or 0 for one scale of all columns
    int32_t bias_dtype;           // 0 float32, 1 float16, 2 bfloat16
    int32_t weights_ready;        // no kernel in flight writes the weight: it may be read before the wait
};
static_assert(sizeof(GemmInt8Operands) == 56, "keep in step with the Rust mirror");

/// Scale and bias of the two columns whose sums a thread of a wgmma holds: `column` and the eighth after it.
struct ColumnScales {
    float scale[2] = {1.0f, 1.0f}, bias[2] = {0.0f, 0.0f};

    __device__ __forceinline__ ColumnScales(const GemmInt8Operands& o, int column) {
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (column + 8 * i >= o.n) break;
            if (o.weight_scales != nullptr)
                scale[i] = __ldg(o.weight_scales + (column + 8 * i) * o.weight_scale_stride);
            bias[i] = load_bias(o, column + 8 * i);
        }
    }
};

constexpr int kCodeBlock = 128;  // columns of K in a stage: a row of it is one span of the swizzle
