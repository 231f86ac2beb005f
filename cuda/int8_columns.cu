// int8 codes with one scale per column or for the whole tensor; plain, transposed, or both with one read.
// Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.
//
// Launch: any alignment, any sizes; no dynamic shared memory; `grid` at most 2^31 - 1. A span is 32 vectors of 16 bytes.
//
//   entry point                            threads  a CTA covers          grid
//   clear_maxima                               256  4096 words            ceil_div(max(rows, columns), 4096)
//   find_column_maxima_T                       256  256 rows x 1 span     ceil_div(rows, 256) * spans
//   find_row_and_column_maxima_T               256  256 rows x 1 span     ceil_div(rows, 256) * spans
//   quantize_columnwise_T                      256  64 rows x 1 span      ceil_div(rows, 64) * spans
//   quantize_global_T                          256  1024 vectors          ceil_div(n, elements of 1024 vectors)
//   quantize_columnwise_and_transpose_T        256  128 rows x 64 columns ceil_div(rows, 128) * ceil_div(columns, 64)
//   quantize_global_transpose_T                256  the same
//   quantize_dual_rowwise_T                    256  the same
//   quantize_dual_global_T                     256  the same
//
// Scales of columns (and rows): clear_maxima, find_..._maxima, then codes, with the same parameters; the scales hold bits
// of maxima until the last kernel makes scales of them. That is idempotent, so its CTAs may read either. One scale for
// the tensor: tensorwise's quantize_absmax_of_T, then codes; each CTA takes the maximum of the partial ones.
#include "int8.cuh"
#include "tile.cuh"

/// Arguments of all kernels of this file.
struct QuantizeInt8Params {
    const void* input;               // [rows, columns]  T
    int8_t* codes;                   // [rows, columns]  null for transposed codes alone
    int8_t* transposed;              // [columns, rows]  null for codes alone
    float* row_scales;               // [rows]           null but for dual codes with row scales
    float* column_scales;            // [columns], [1] for the whole tensor
    const uint32_t* partial_absmax;  // [num_partials]   of the whole tensor
    int64_t rows;                    //
    int64_t columns;                 //
    int32_t num_partials;            //
};
static_assert(sizeof(QuantizeInt8Params) == 72, "keep in step with the Rust mirror");

/// Bits of a maximum, of which another CTA may make a scale meanwhile.
__device__ __forceinline__ uint32_t load_maximum(const float* scales, int64_t i) {
    return *reinterpret_cast<const volatile uint32_t*>(scales + i);
}

extern "C" __global__ __launch_bounds__(256) void clear_maxima(const __grid_constant__ QuantizeInt8Params p) {
    wait_for_earlier_kernels();
    const int64_t first = int64_t(blockIdx.x) * 4096;
    for (int64_t i = first + threadIdx.x; i < first + 4096; i += 256) {
        if (i < p.columns) p.column_scales[i] = 0.0f;
        if (p.row_scales && i < p.rows) p.row_scales[i] = 0.0f;
    }
}

/// Largest magnitude of eight rows, found together: row `lane % 8` of them in the first eight lanes.
template <typename T>
__device__ __forceinline__ uint32_t row_maxima(const uint4 (&raw)[8], int lane) {
    uint32_t m[8];
    #pragma unroll
    for (int r = 0; r < 8; ++r) m[r] = Magnitude<T>::of(raw[r]);
    // Halving the number of maxima at each of the first three steps costs 7 shuffles instead of 24.
    #pragma unroll
    for (int d = 1; d < 8; d *= 2) {
        const bool odd = lane & d;
        #pragma unroll
        for (int i = 0; i < 8; i += 2 * d) {
            const uint32_t keep = odd ? m[i + d] : m[i], send = odd ? m[i] : m[i + d];
            m[i] = Magnitude<T>::max(keep, __shfl_xor_sync(0xffffffffu, send, d));
        }
    }
    #pragma unroll
    for (int d = 8; d < 32; d *= 2) m[0] = Magnitude<T>::max(m[0], __shfl_xor_sync(0xffffffffu, m[0], d));
    return Magnitude<T>::to_float_bits(m[0]);
}

/// Maxima of 256 rows of one span, 32 rows to a warp, as float bits, which order as integers do: the order of
/// the atomics does not matter.
template <typename T, bool kRows, bool kAligned>
__device__ __forceinline__ void find_maxima_of(const QuantizeInt8Params& p) {
    constexpr int kVector = kPerVector<T>, kSpan = 32 * kVector;
    constexpr int kBatch = 8;     // rows in flight
    constexpr int kPerWarp = 32;  // rows
    constexpr uint32_t kMagnitudes = sizeof(T) == 2 ? 0x7fff7fffu : 0x7fffffffu;
    __shared__ uint32_t column_max[kSpan];
    const int lane = threadIdx.x % 32;
    const int64_t spans = (p.columns + kSpan - 1) / kSpan, block = blockIdx.x / spans;
    const int64_t first_row = block * (8 * kPerWarp) + warp_in_cta() * kPerWarp;
    const int64_t first_column = (blockIdx.x - block * spans) * kSpan, column = first_column + lane * kVector;
    for (int i = threadIdx.x; i < kSpan; i += 256) column_max[i] = 0;
    __syncthreads();
    uint32_t m[4] = {};  // of this lane's columns
    for (int batch = 0; batch < kPerWarp; batch += kBatch) {
        uint4 raw[kBatch];
        #pragma unroll
        for (int r = 0; r < kBatch; ++r) {
            const int64_t row = first_row + batch + r;
            raw[r] = make_uint4(0, 0, 0, 0);
            if (row < p.rows && column < p.columns)
                raw[r] = load_vector<kAligned>(static_cast<const T*>(p.input) + row * p.columns, column,
                                               p.columns);
        }
        #pragma unroll
        for (int r = 0; r < kBatch; ++r) {
            m[0] = Magnitude<T>::max(m[0], raw[r].x & kMagnitudes);
            m[1] = Magnitude<T>::max(m[1], raw[r].y & kMagnitudes);
            m[2] = Magnitude<T>::max(m[2], raw[r].z & kMagnitudes);
            m[3] = Magnitude<T>::max(m[3], raw[r].w & kMagnitudes);
        }
        if constexpr (kRows) {
            const uint32_t maximum = row_maxima<T>(raw, lane);
            const int64_t row = first_row + batch + lane;
            if (lane < kBatch && row < p.rows)
                atomicMax(reinterpret_cast<uint32_t*>(p.row_scales) + row, maximum);
        }
    }
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (kVector == 8) {  // to_float_bits takes the larger of two, here one at a time
            atomicMax(column_max + lane * 8 + 2 * i, Magnitude<T>::to_float_bits(m[i] & 0xffffu));
            atomicMax(column_max + lane * 8 + 2 * i + 1, Magnitude<T>::to_float_bits(m[i] & 0xffff0000u));
        } else {
            atomicMax(column_max + lane * 4 + i, m[i]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kSpan; i += 256)
        if (first_column + i < p.columns)
            atomicMax(reinterpret_cast<uint32_t*>(p.column_scales) + first_column + i, column_max[i]);
}

template <typename T, bool kRows>
__device__ __forceinline__ void find_maxima(const QuantizeInt8Params& p) {
    wait_for_earlier_kernels();
    if (vectors_are_aligned<T>(p.input, nullptr, p.columns))
        find_maxima_of<T, kRows, true>(p);
    else
        find_maxima_of<T, kRows, false>(p);
}

/// Codes by the scales of columns: 64 rows of one span, eight rows to a warp, from the end of the tensor, where the
/// search for maxima has left it in L2.
template <typename T, bool kAligned>
__device__ __forceinline__ void quantize_columnwise_part(const QuantizeInt8Params& p) {
    constexpr int kVector = kPerVector<T>, kSpan = 32 * kVector, kRows = 8;
    const int64_t spans = (p.columns + kSpan - 1) / kSpan;
    const int64_t index = int64_t(gridDim.x) - 1 - blockIdx.x, block = index / spans;
    const int64_t first_row = (block * 8 + warp_in_cta()) * kRows;
    const int64_t column = (index - block * spans) * kSpan + int(threadIdx.x % 32) * kVector;
    if (column >= p.columns) return;
    uint4 raw[kRows];
    #pragma unroll
    for (int r = 0; r < kRows; ++r) {
        raw[r] = make_uint4(0, 0, 0, 0);
        if (first_row + r < p.rows)
            raw[r] = load_vector<kAligned>(static_cast<const T*>(p.input) + (first_row + r) * p.columns,
                                           column, p.columns);
    }
    float inverse[kVector];
    #pragma unroll
    for (int j = 0; j < kVector; ++j) {
        const bool inside = kAligned || column + j < p.columns;
        const Scale scale = scale_of<127>(inside ? load_maximum(p.column_scales, column + j) : 0);
        inverse[j] = scale.inverse;
        if (first_row == 0 && inside) p.column_scales[column + j] = scale.absmax;
    }
    #pragma unroll
    for (int r = 0; r < kRows; ++r) {
        float x[kVector];
        unpack<T>(raw[r], x);
        uint32_t word[kVector / 4];
        #pragma unroll
        for (int q = 0; q < kVector / 4; ++q) {
            uint32_t code[4];
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float scale = inverse[4 * q + i];
                code[i] = scale == 0.0f ? 0u : rounded_to_low_byte(x[4 * q + i], scale);
            }
            word[q] = gather_bytes<0>(code[0], code[1], code[2], code[3]);
        }
        if (first_row + r < p.rows)
            store_codes<kAligned, kVector>(
                reinterpret_cast<uint8_t*>(p.codes) + (first_row + r) * p.columns + column,
                p.columns - column, word);
    }
}

template <typename T>
__device__ __forceinline__ void quantize_columnwise(const QuantizeInt8Params& p) {
    wait_for_earlier_kernels();
    if (vectors_are_aligned<T>(p.input, p.codes, p.columns))
        quantize_columnwise_part<T, true>(p);
    else
        quantize_columnwise_part<T, false>(p);
}

/// Codes by one scale, 1024 vectors of the flat tensor from `first` on. kFull promises alignment and that all are there.
template <typename T, bool kFull>
__device__ __forceinline__ void quantize_global_part(const QuantizeInt8Params& p, int64_t first, int64_t n,
                                                     uint32_t* shared) {
    constexpr int kVector = kPerVector<T>, kVectors = 4;
    const auto place = [&](int v) { return first + (v * 256 + int(threadIdx.x)) * kVector; };
    uint4 raw[kVectors];
    #pragma unroll
    for (int v = 0; v < kVectors; ++v)
        raw[v] = load_vector<kFull>(static_cast<const T*>(p.input), place(v), n);
    const Scale scale = scale_of<127>(max_of_partials<256>(p.partial_absmax, p.num_partials, shared));
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.column_scales = scale.absmax;
    #pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        uint32_t word[kVector / 4];
        quantize_vector<T>(raw[v], scale.inverse, word);
        store_codes<kFull, kVector>(reinterpret_cast<uint8_t*>(p.codes) + place(v), n - place(v), word);
    }
}

/// From the end of the tensor, where the search for the maximum has left it in L2.
template <typename T>
__device__ __forceinline__ void quantize_global(const QuantizeInt8Params& p) {
    wait_for_earlier_kernels();
    __shared__ uint32_t shared[8];
    constexpr int kElements = 1024 * kPerVector<T>;
    const int64_t n = p.rows * p.columns, first = (int64_t(gridDim.x) - 1 - blockIdx.x) * kElements;
    if (vectors_are_aligned<T>(p.input, p.codes, 0) && first + kElements <= n)
        quantize_global_part<T, true>(p, first, n, shared);
    else
        quantize_global_part<T, false>(p, first, n, shared);
}

/// What the threads of a CTA share while they transpose a tile. Words are four codes of a column; the sixteen-byte chunks
/// of a column are permuted by the column, so that neither side has bank conflicts.
struct TransposedTile {
    static constexpr int kRows = 128, kColumns = 64;
    __align__(128) uint32_t word[kColumns][kRows / 4];
    float row_inverse[kRows], column_inverse[kColumns];
    uint32_t warp_max[8];

    __device__ __forceinline__ uint32_t& at(int column, int quad) {
        return word[column][quad ^ (4 * (column / 8 % 8))];
    }
};

/// One CTA, one tile, from the end of the tensor, where the search for maxima has left it in L2. A thread quantizes four
/// rows of one vector, so that four codes of a column make a word; the words cross shared memory.
template <typename T, bool kDual, bool kGlobal>
__device__ __forceinline__ void quantize_transpose(const QuantizeInt8Params& p) {
    wait_for_earlier_kernels();
    using Tile = TransposedTile;
    constexpr int kVector = kPerVector<T>;
    constexpr int kAcross = Tile::kColumns / kVector;  // threads across a tile
    constexpr int kPass = 256 / kAcross * 4;           // rows quantized at once
    constexpr int kPasses = Tile::kRows / kPass;
    static_assert(Tile::kRows % kPass == 0, "threads cover the tile evenly");
    __shared__ Tile tile;
    // of an empty tensor one, whose CTA writes the scale
    const int64_t tiles_across = ::max((p.columns + Tile::kColumns - 1) / Tile::kColumns, int64_t(1));
    const int64_t index = int64_t(gridDim.x) - 1 - blockIdx.x, down = index / tiles_across;
    const int64_t first_row = down * Tile::kRows,
                  first_column = (index - down * tiles_across) * Tile::kColumns;
    const int across = threadIdx.x % kAcross, row_in_pass = threadIdx.x / kAcross * 4;
    const int64_t column = first_column + across * kVector;
    const bool input_is_aligned = vectors_are_aligned<T>(p.input, kDual ? p.codes : nullptr, p.columns);
    const bool output_is_aligned = reinterpret_cast<uintptr_t>(p.transposed) % 16 == 0 && p.rows % 16 == 0;

    uint4 raw[kPasses][4];
    const auto load = [&]<bool kAligned>() {
        #pragma unroll
        for (int pass = 0; pass < kPasses; ++pass)
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t row = first_row + pass * kPass + row_in_pass + i;
                raw[pass][i] = make_uint4(0, 0, 0, 0);
                if (row < p.rows && column < p.columns)
                    raw[pass][i] = load_vector<kAligned>(static_cast<const T*>(p.input) + row * p.columns,
                                                         column, p.columns);
            }
    };
    if (input_is_aligned)
        load.template operator()<true>();
    else
        load.template operator()<false>();

    float inverse_of_all = 0.0f;
    if constexpr (kGlobal) {
        const Scale scale =
            scale_of<127>(max_of_partials<256>(p.partial_absmax, p.num_partials, tile.warp_max));
        inverse_of_all = scale.inverse;
        if (blockIdx.x == 0 && threadIdx.x == 0) *p.column_scales = scale.absmax;
    } else {
        for (int i = threadIdx.x; i < Tile::kColumns; i += 256) {
            const int64_t at = first_column + i;
            const Scale scale = scale_of<127>(at < p.columns ? load_maximum(p.column_scales, at) : 0);
            tile.column_inverse[i] = scale.inverse;
            if (first_row == 0 && at < p.columns) p.column_scales[at] = scale.absmax;
        }
        if constexpr (kDual)
            for (int i = threadIdx.x; i < Tile::kRows; i += 256) {
                const int64_t at = first_row + i;
                const Scale scale = scale_of<127>(at < p.rows ? load_maximum(p.row_scales, at) : 0);
                tile.row_inverse[i] = scale.inverse;
                if (first_column == 0 && at < p.rows) p.row_scales[at] = scale.absmax;
            }
        __syncthreads();
    }

    #pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const int quad = (pass * kPass + row_in_pass) / 4;
        float x[4][kVector];
        #pragma unroll
        for (int i = 0; i < 4; ++i) unpack<T>(raw[pass][i], x[i]);
        #pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const int c = across * kVector + j;
            tile.at(c, quad) = quantize_int8(x[0][j], x[1][j], x[2][j], x[3][j],
                                             kGlobal ? inverse_of_all : tile.column_inverse[c]);
        }
        if constexpr (kDual)
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t row = first_row + quad * 4 + i;
                if (row >= p.rows || column >= p.columns) continue;
                uint32_t word[kVector / 4];
                quantize_vector<T>(raw[pass][i], kGlobal ? inverse_of_all : tile.row_inverse[quad * 4 + i],
                                   word);
                uint8_t* const codes = reinterpret_cast<uint8_t*>(p.codes) + row * p.columns + column;
                if (input_is_aligned)
                    store_codes<true, kVector>(codes, p.columns - column, word);
                else
                    store_codes<false, kVector>(codes, p.columns - column, word);
            }
    }
    __syncthreads();

    #pragma unroll
    for (int c = threadIdx.x / 8; c < Tile::kColumns; c += 32) {
        const int chunk = threadIdx.x % 8;
        const int64_t row = first_row + chunk * 16;
        if (first_column + c >= p.columns || row >= p.rows) continue;
        const uint4 v = *reinterpret_cast<const uint4*>(&tile.at(c, chunk * 4));
        int8_t* const out = p.transposed + (first_column + c) * p.rows + row;
        if (output_is_aligned) {
            *reinterpret_cast<uint4*>(out) = v;
        } else {
            const uint32_t w[4] = {v.x, v.y, v.z, v.w};
            #pragma unroll
            for (int j = 0; j < 16; ++j)
                if (row + j < p.rows) out[j] = int8_t(w[j / 4] >> (8 * (j % 4)));
        }
    }
}

#define ENTRY_POINT(name, ...)                                                                             \
    extern "C" __global__ __launch_bounds__(256) void name(const __grid_constant__ QuantizeInt8Params p) { \
        __VA_ARGS__(p);                                                                                    \
    }

#define ENTRY_POINTS(dtype)                                                                         \
    ENTRY_POINT(find_column_maxima_##dtype, find_maxima<dtype, false>)                              \
    ENTRY_POINT(find_row_and_column_maxima_##dtype, find_maxima<dtype, true>)                       \
    ENTRY_POINT(quantize_columnwise_##dtype, quantize_columnwise<dtype>)                            \
    ENTRY_POINT(quantize_global_##dtype, quantize_global<dtype>)                                    \
    ENTRY_POINT(quantize_columnwise_and_transpose_##dtype, quantize_transpose<dtype, false, false>) \
    ENTRY_POINT(quantize_global_transpose_##dtype, quantize_transpose<dtype, false, true>)          \
    ENTRY_POINT(quantize_dual_rowwise_##dtype, quantize_transpose<dtype, true, false>)              \
    ENTRY_POINT(quantize_dual_global_##dtype, quantize_transpose<dtype, true, true>)

ENTRY_POINTS(float32)
ENTRY_POINTS(float16)
ENTRY_POINTS(bfloat16)
