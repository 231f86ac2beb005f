// int8 codes with one scale per row, with or without outlier columns, and the decoders of rows and columns.
// Dettmers et al., LLM.int8(), arXiv:2208.07339, section 2 and 3.
//
// Launch: any alignment, any sizes; no dynamic shared memory; vectors are 16 bytes of a row, `grid` at most 2^31 - 1.
//
//   entry point                            threads             rows/CTA    grid
//   quantize_rowwise_T_{64,128}                256                    8    ceil_div(rows, 8)
//   quantize_rowwise_T_256                     256                    4    ceil_div(rows, 4)
//   quantize_rowwise_T_512                     256                    2    ceil_div(rows, 2)
//   quantize_rowwise_T_{1024,2048,4096}  256, 512, 1024               1    rows
//   quantize_rowwise_long_T                    512                    1    rows
//   quantize_rowwise_outliers...           as those without outliers
//   clear_outlier_mask                         256      4096 columns      ceil_div(columns, 4096)
//   zero_outlier_columns                       256      at least 16        ceil_div(rows, 16), at most 4 * num_sms
//   dequantize_{rowwise,columnwise}_T          256      8 warp tiles of 64 vectors   ceil_div(tiles, 8)
//
// The number is the most vectors in a row. With outliers: clear_outlier_mask, quantize, zero_outlier_columns; with one row
// quantize alone.
#include "int8.cuh"
#include "tile.cuh"

/// Arguments of quantize_rowwise.
struct QuantizeRowwiseParams {
    const void* input;      // [rows, columns]  T
    int8_t* codes;          // [rows, columns]
    float* scales;          // [rows]
    uint8_t* outlier_mask;  // [columns]        1 for columns with outliers; of one row written, else 0 before
    int64_t rows;           //
    int64_t columns;        //
    float threshold;        // elements of at least this magnitude are outliers
};
static_assert(sizeof(QuantizeRowwiseParams) == 56, "keep in step with the Rust mirror");

/// Replaces outliers by +0 and marks their columns. A single row writes the whole mask.
template <typename T>
__device__ __forceinline__ void remove_outliers(uint4& raw, const QuantizeRowwiseParams& p, int64_t column) {
    constexpr int kVector = kPerVector<T>;
    float x[kVector];
    unpack<T>(raw, x);
    uint32_t hits = 0;
    #pragma unroll
    for (int i = 0; i < kVector; ++i) hits |= uint32_t(fabsf(x[i]) >= p.threshold) << i;
    if (p.rows == 1) {
        #pragma unroll
        for (int i = 0; i < kVector; ++i)
            if (column + i < p.columns) p.outlier_mask[column + i] = hits >> i & 1;
    }
    if (hits == 0) return;
    #pragma unroll
    for (int i = 0; i < kVector; ++i) {
        if (!(hits >> i & 1)) continue;
        p.outlier_mask[column + i] = 1;
        x[i] = 0.0f;
    }
    raw = pack<T>(x);
}

/// The part of a row that one thread holds.
template <typename T, int kRowThreads, int kVectors, bool kOutliers, bool kAligned>
struct RowPart {
    static constexpr int kVector = kPerVector<T>;
    uint4 raw[kVectors];

    static __device__ __forceinline__ int64_t column_of(int v) {
        return int64_t(v * kRowThreads + int(threadIdx.x % kRowThreads)) * kVector;
    }

    /// Its largest magnitude, outliers apart.
    __device__ __forceinline__ uint32_t load(const QuantizeRowwiseParams& p, int64_t row) {
        const T* const input = static_cast<const T*>(p.input) + row * p.columns;
        #pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            raw[v] = make_uint4(0, 0, 0, 0);
            if (row < p.rows && column_of(v) < p.columns)
                raw[v] = load_vector<kAligned>(input, column_of(v), p.columns);
        }
        uint32_t m = 0;
        #pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if constexpr (kOutliers)
                if (row < p.rows && column_of(v) < p.columns) remove_outliers<T>(raw[v], p, column_of(v));
            m = Magnitude<T>::max(m, Magnitude<T>::of(raw[v]));
        }
        return Magnitude<T>::to_float_bits(m);
    }

    __device__ __forceinline__ void store(const QuantizeRowwiseParams& p, int64_t row, float inverse) const {
        int8_t* const codes = p.codes + row * p.columns;
        #pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int64_t column = column_of(v);
            if (column >= p.columns) continue;
            uint32_t word[kVector / 4];
            quantize_vector<T>(raw[v], inverse, word);
            store_codes<kAligned, kVector>(reinterpret_cast<uint8_t*>(codes + column), p.columns - column,
                                           word);
        }
    }
};

/// Rows that live in the registers of kRowThreads threads, kVectors vectors each: each is read once.
template <typename T, int kRowThreads, int kVectors, bool kOutliers, bool kAligned>
__device__ __forceinline__ void quantize_rows(const QuantizeRowwiseParams& p) {
    constexpr int kThreads = kRowThreads < 256 ? 256 : kRowThreads;
    constexpr int kWarps = kRowThreads / 32, kRows = kThreads / kRowThreads;
    static_assert(kRowThreads % 32 == 0, "whole warps own a row");
    __shared__ uint32_t warp_max[kThreads / 32];
    for (int64_t first = int64_t(blockIdx.x) * kRows; first < p.rows; first += int64_t(gridDim.x) * kRows) {
        const int64_t row = first + threadIdx.x / kRowThreads;
        RowPart<T, kRowThreads, kVectors, kOutliers, kAligned> part;
        uint32_t m = max_over_warp(part.load(p, row));
        if constexpr (kWarps > 1) {
            if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = m;
            __syncthreads();
            const int first_warp = threadIdx.x / kRowThreads * kWarps;
            m = max_over_warp(warp_max[first_warp + threadIdx.x % kWarps]);
        }
        const Scale scale = scale_of<127>(m);
        if (row < p.rows) {
            if (threadIdx.x % kRowThreads == 0) p.scales[row] = scale.absmax;
            part.store(p, row, scale.inverse);
        }
        if constexpr (kWarps > 1) __syncthreads();  // the next rows' maxima take the place of these
    }
}

/// Rows too long for registers: a CTA reads its row twice, the second time from L2.
template <typename T, bool kOutliers, bool kAligned>
__device__ __forceinline__ void quantize_long_rows(const QuantizeRowwiseParams& p) {
    constexpr int kThreads = 512, kVector = kPerVector<T>;
    __shared__ uint32_t warp_max[kThreads / 32];
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const T* const input = static_cast<const T*>(p.input) + row * p.columns;
        int8_t* const codes = p.codes + row * p.columns;
        const auto load = [&](int64_t column) {
            uint4 raw = load_vector<kAligned>(input, column, p.columns);
            if constexpr (kOutliers) remove_outliers<T>(raw, p, column);
            return raw;
        };
        uint32_t m = 0;
        for (int64_t i = threadIdx.x * kVector; i < p.columns; i += kThreads * kVector)
            m = Magnitude<T>::max(m, Magnitude<T>::of(load(i)));
        const Scale scale = scale_of<127>(max_over_cta<kThreads>(Magnitude<T>::to_float_bits(m), warp_max));
        if (threadIdx.x == 0) p.scales[row] = scale.absmax;
        for (int64_t i = threadIdx.x * kVector; i < p.columns; i += kThreads * kVector) {
            uint32_t word[kVector / 4];
            quantize_vector<T>(load(i), scale.inverse, word);
            store_codes<kAligned, kVector>(reinterpret_cast<uint8_t*>(codes + i), p.columns - i, word);
        }
        __syncthreads();  // the next row's maxima take the place of these
    }
}

/// Arguments of clear_outlier_mask and zero_outlier_columns.
struct OutlierColumnsParams {
    uint8_t* outlier_mask;  // [columns]
    int8_t* codes;          // [rows, columns]
    int64_t rows;           //
    int64_t columns;        //
};
static_assert(sizeof(OutlierColumnsParams) == 32, "keep in step with the Rust mirror");

extern "C" __global__ __launch_bounds__(256) void clear_outlier_mask(
    const __grid_constant__ OutlierColumnsParams p) {
    wait_for_earlier_kernels();
    constexpr int kColumns = 4096;
    for (int64_t first = int64_t(blockIdx.x) * kColumns; first < p.columns;
         first += int64_t(gridDim.x) * kColumns)
        for (int64_t i = first + threadIdx.x; i < first + kColumns && i < p.columns; i += 256)
            p.outlier_mask[i] = 0;
}

/// Zeroes the marked columns. A CTA lists the marks of 4096 columns at a time, in any order, then its threads share the
/// codes of its rows.
extern "C" __global__ __launch_bounds__(256) void zero_outlier_columns(
    const __grid_constant__ OutlierColumnsParams p) {
    wait_for_earlier_kernels();
    constexpr int kColumns = 4096;
    __shared__ uint16_t list[kColumns];
    __shared__ int num;
    const int64_t first_row = p.rows * blockIdx.x / gridDim.x;
    const int64_t num_rows = p.rows * (blockIdx.x + 1) / gridDim.x - first_row;
    for (int64_t first = 0; first < p.columns; first += kColumns) {
        if (threadIdx.x == 0) num = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < kColumns && first + i < p.columns; i += 256)
            if (p.outlier_mask[first + i]) list[atomicAdd(&num, 1)] = uint16_t(i);
        __syncthreads();
        if (num > 0)
            for (int64_t i = threadIdx.x; i < num_rows * num; i += 256)
                p.codes[(first_row + i / num) * p.columns + first + list[i % num]] = 0;
        __syncthreads();  // the list is overwritten
    }
}

/// Arguments of the decoders.
struct DequantizeInt8Params {
    const int8_t* codes;  // [rows, columns]
    const float* scales;  // [rows] or [columns]
    void* output;         // [rows, columns]  T
    int64_t rows;         //
    int64_t columns;      //
};
static_assert(sizeof(DequantizeInt8Params) == 40, "keep in step with the Rust mirror");

constexpr int kDecodedVectors = 2;  // of a lane

/// Decodes 64 vectors of one row by one warp, from column `first` on.
template <typename T, bool kColumns, bool kAligned>
__device__ __forceinline__ void dequantize_part(const DequantizeInt8Params& p, int64_t row, int64_t first) {
    constexpr int kVector = kPerVector<T>;
    const uint8_t* const codes = reinterpret_cast<const uint8_t*>(p.codes) + row * p.columns;
    const auto column_of = [&](int v) { return first + (v * 32 + int(threadIdx.x % 32)) * kVector; };
    uint32_t word[kDecodedVectors][kVector / 4] = {};
    #pragma unroll
    for (int v = 0; v < kDecodedVectors; ++v) {
        const int64_t column = column_of(v);
        if constexpr (kAligned && kVector == 8) {
            if (column < p.columns) {
                const uint2 w = load_streaming(reinterpret_cast<const uint2*>(codes + column));
                word[v][0] = w.x;
                word[v][kVector / 4 - 1] = w.y;
            }
        } else if constexpr (kAligned) {
            if (column < p.columns)
                word[v][0] = load_streaming(reinterpret_cast<const uint32_t*>(codes + column));
        } else {
            #pragma unroll
            for (int j = 0; j < kVector; ++j)
                if (column + j < p.columns) word[v][j / 4] |= uint32_t(codes[column + j]) << (8 * (j % 4));
        }
    }
    const float row_scale = kColumns ? 0.0f : __ldg(p.scales + row);
    #pragma unroll
    for (int v = 0; v < kDecodedVectors; ++v) {
        const int64_t column = column_of(v);
        if (column >= p.columns) continue;
        float x[kVector];
        #pragma unroll
        for (int i = 0; i < kVector; ++i) {
            float scale = row_scale;
            if constexpr (kColumns)
                scale = kAligned || column + i < p.columns ? __ldg(p.scales + column + i) : 0;
            x[i] = __fmul_rn(__fmul_rn(float(int8_t(word[v][i / 4] >> (8 * (i % 4)))), scale),
                             __uint_as_float(0x3c010204u));  // RN(1 / 127)
        }
        store_vector<kAligned>(static_cast<T*>(p.output) + row * p.columns, column, p.columns, pack<T>(x));
    }
}

template <typename T, bool kColumns>
__device__ __forceinline__ void dequantize(const DequantizeInt8Params& p) {
    wait_for_earlier_kernels();
    constexpr int kSpan = kDecodedVectors * 32 * kPerVector<T>;
    const bool aligned = vectors_are_aligned<T>(p.output, p.codes, p.columns);
    const int64_t spans = (p.columns + kSpan - 1) / kSpan;
    for (int64_t tile = int64_t(blockIdx.x) * 8 + warp_in_cta(); tile < p.rows * spans;
         tile += int64_t(gridDim.x) * 8) {
        const int64_t row = tile / spans, first = (tile - row * spans) * kSpan;
        if (aligned)
            dequantize_part<T, kColumns, true>(p, row, first);
        else
            dequantize_part<T, kColumns, false>(p, row, first);
    }
}

template <typename T, int kRowThreads, int kVectors, bool kOutliers>
__device__ __forceinline__ void quantize_rowwise(const QuantizeRowwiseParams& p) {
    wait_for_earlier_kernels();
    if (vectors_are_aligned<T>(p.input, p.codes, p.columns))
        quantize_rows<T, kRowThreads, kVectors, kOutliers, true>(p);
    else
        quantize_rows<T, kRowThreads, kVectors, kOutliers, false>(p);
}

template <typename T, bool kOutliers>
__device__ __forceinline__ void quantize_rowwise_long(const QuantizeRowwiseParams& p) {
    wait_for_earlier_kernels();
    if (vectors_are_aligned<T>(p.input, p.codes, p.columns))
        quantize_long_rows<T, kOutliers, true>(p);
    else
        quantize_long_rows<T, kOutliers, false>(p);
}

#define QUANTIZE_ROWWISE(family, outliers, dtype, vectors, row_threads, row_vectors, threads)           \
    extern "C" __global__ __launch_bounds__(threads) void quantize_rowwise_##family##dtype##_##vectors( \
        const __grid_constant__ QuantizeRowwiseParams p) {                                              \
        static_assert(vectors == row_threads * row_vectors, "the name says how long a row may be");     \
        quantize_rowwise<dtype, row_threads, row_vectors, outliers>(p);                                 \
    }

#define QUANTIZE_ROWS(family, outliers, dtype)                                               \
    QUANTIZE_ROWWISE(family, outliers, dtype, 64, 32, 2, 256)                                \
    QUANTIZE_ROWWISE(family, outliers, dtype, 128, 32, 4, 256)                               \
    QUANTIZE_ROWWISE(family, outliers, dtype, 256, 64, 4, 256)                               \
    QUANTIZE_ROWWISE(family, outliers, dtype, 512, 128, 4, 256)                              \
    QUANTIZE_ROWWISE(family, outliers, dtype, 1024, 256, 4, 256)                             \
    QUANTIZE_ROWWISE(family, outliers, dtype, 2048, 512, 4, 512)                             \
    QUANTIZE_ROWWISE(family, outliers, dtype, 4096, 1024, 4, 1024)                           \
    extern "C" __global__ __launch_bounds__(512) void quantize_rowwise_long_##family##dtype( \
        const __grid_constant__ QuantizeRowwiseParams p) {                                   \
        quantize_rowwise_long<dtype, outliers>(p);                                           \
    }

#define ENTRY_POINTS(dtype)                                                          \
    QUANTIZE_ROWS(, false, dtype)                                                    \
    QUANTIZE_ROWS(outliers_, true, dtype)                                            \
    extern "C" __global__ __launch_bounds__(256) void dequantize_rowwise_##dtype(    \
        const __grid_constant__ DequantizeInt8Params p) {                            \
        dequantize<dtype, false>(p);                                                 \
    }                                                                                \
    extern "C" __global__ __launch_bounds__(256) void dequantize_columnwise_##dtype( \
        const __grid_constant__ DequantizeInt8Params p) {                            \
        dequantize<dtype, true>(p);                                                  \
    }

ENTRY_POINTS(float32)
ENTRY_POINTS(float16)
ENTRY_POINTS(bfloat16)
