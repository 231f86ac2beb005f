// 8-bit codes of a 256-entry map with one absmax for the whole tensor, or none.
// Dettmers, 8-bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561, section 2.
//
// Launch: any alignment, any n > 0; no dynamic shared memory. `grid` below is at most 2^31 - 1; num_sms is
// the device's.
//
//   entry point                    threads  elements/CTA  static shared  grid
//   quantize_absmax_of_{16 bit}        256          8192           32 B  min(ceil_div(n, 8192), 1024)
//   quantize_absmax_of_float32         256          4096           32 B  min(ceil_div(n, 4096), 1024)
//   quantize_{float16,bfloat16}        256          8192        18.6 KB  min(ceil_div(n, 8192), 4 * num_sms)
//   quantize_float32                   256          4096        18.6 KB  min(ceil_div(n, 4096), 4 * num_sms)
//   dequantize_{float16,bfloat16}      256          4096           1 KB  ceil_div(n, 4096)
//   dequantize_float32                 256          2048           1 KB  ceil_div(n, 2048)
//
// op quantize: quantize_absmax_of_T, then quantize_T; num_partials is the grid of the first. op quantize_no_absmax: quantize_T alone, with absmax, partial_absmax null. op dequantize:
// dequantize_T with block_shift 63; op dequantize_no_absmax: absmax null too.
#include "blockwise_8bit.cuh"

/// Arguments of quantize_absmax_of.
struct AbsmaxParams {
    const void* input;         // [n]          T
    uint32_t* partial_absmax;  // [gridDim.x]  bits of the largest magnitude that each CTA has met
    int64_t n;
};
static_assert(sizeof(AbsmaxParams) == 24, "keep in step with the Rust mirror");

/// Arguments of quantize.
struct QuantizeParams {
    const void* input;               // [n]             T
    const float* codebook;           // [256]           ascending
    uint8_t* codes;                  // [n]
    float* absmax;                   // [1]             null: elements are encoded as they are
    const uint32_t* partial_absmax;  // [num_partials]  from quantize_absmax_of
    int64_t n;                       //
    int32_t num_partials;            // 1 to 1024
};
static_assert(sizeof(QuantizeParams) == 56, "keep in step with the Rust mirror");

constexpr int kWarps = kEncoderThreads / 32;

/// Calls f(tile, first, full) for every tile of this warp.
template <typename T, typename F>
__device__ __forceinline__ void for_each_tile(const void* data, const uint8_t* codes, int64_t n, F&& f) {
    using Tile = WarpTile<T>;
    constexpr int64_t kCtaElements = int64_t(Tile::kElements) * kWarps;
    const T* const input = static_cast<const T*>(data);
    const int lane = threadIdx.x % 32;
    const bool aligned =
        (reinterpret_cast<uintptr_t>(input) | reinterpret_cast<uintptr_t>(codes) << 1) % 16 == 0;
    for (int64_t first = blockIdx.x * kCtaElements + warp_in_cta() * Tile::kElements; first < n;
         first += gridDim.x * kCtaElements) {
        Tile tile;
        const bool full = aligned && first + Tile::kElements <= n;
        if (full)
            tile.template load<true>(input, first, n, lane);
        else
            tile.template load<false>(input, first, n, lane);
        f(tile, first, full);
    }
}

template <typename T>
__device__ __forceinline__ void partial_absmax(const AbsmaxParams& p) {
    wait_for_earlier_kernels();
    __shared__ uint32_t warp_max[kWarps];
    uint32_t m = 0;
    for_each_tile<T>(p.input, nullptr, p.n, [&](const WarpTile<T>& tile, int64_t, bool) {
        #pragma unroll
        for (int r = 0; r < WarpTile<T>::kRows; ++r) m = Magnitude<T>::max(m, Magnitude<T>::of(tile.row[r]));
    });
    m = max_over_cta<kEncoderThreads>(Magnitude<T>::to_float_bits(m), warp_max);
    if (threadIdx.x == 0) p.partial_absmax[blockIdx.x] = m;
}

/// Correctly rounded quotients by one divisor. Two corrections by an exact remainder do it as long as nothing
/// underflows; elsewhere, and for a NaN as the divisor, the division of the language does.
struct Divider {
    static constexpr float kSmallest = 0x1p-60f, kLargest = 0x1p60f;
    float divisor, reciprocal;

    template <int kNum>
    __device__ __forceinline__ void operator()(float (&x)[kNum]) const {
        bool is_safe = divisor >= kSmallest && divisor <= kLargest;
        #pragma unroll
        for (int i = 0; i < kNum; ++i) is_safe &= fabsf(x[i]) >= kSmallest || x[i] == 0.0f;
        #pragma unroll
        for (int i = 0; i < kNum; ++i) {
            if (is_safe) {
                const float q = __fmul_rn(x[i], reciprocal);
                const float r = __fmaf_rn(__fmaf_rn(-q, divisor, x[i]), reciprocal, q);
                x[i] = __fmaf_rn(__fmaf_rn(-r, divisor, x[i]), reciprocal, r);
            } else {
                x[i] = __fdiv_rn(x[i], divisor);
            }
        }
    }
};

/// Encodes every tile of this warp; `scale` makes y of the elements of a vector. NaN takes the code of 0, and
/// what lies outside the map's tables saturates.
template <typename T, typename Encoder, typename Scale>
__device__ __forceinline__ void encode_tiles(const QuantizeParams& p, const Encoder& encoder, float limit,
                                             const Scale& scale) {
    using Tile = WarpTile<T>;
    constexpr int kVector = Tile::kVector;
    for_each_tile<T>(p.input, p.codes, p.n, [&](const Tile& tile, int64_t first, bool full) {
        #pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
            float x[kVector];
            unpack<T>(tile.row[r], x);
            scale(x);
            uint32_t word[kVector / 4];
            #pragma unroll
            for (int q = 0; q < kVector / 4; ++q) {
                float y[4];
                #pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float v = x[4 * q + i];
                    y[i] = v == v ? fminf(fmaxf(v, -limit), limit) : 0.0f;
                }
                word[q] = encoder(y, 0);
            }
            const int64_t i = first + r * Tile::kRowElements + int(threadIdx.x % 32) * kVector;
            if (full)
                store_codes<true, kVector>(p.codes + i, p.n - i, word);
            else
                store_codes<false, kVector>(p.codes + i, p.n - i, word);
        }
    });
}

template <typename T, typename Encoder>
__device__ __forceinline__ void encode(const QuantizeParams& p, const Encoder& encoder, float limit,
                                       const Divider& divider) {
    if (p.absmax)
        encode_tiles<T>(p, encoder, limit, divider);
    else
        encode_tiles<T>(p, encoder, limit, [](float (&)[kPerVector<T>]) {});
}

template <typename T>
__device__ __forceinline__ void quantize(const QuantizeParams& p) {
    __shared__ MapTables tables;
    __shared__ uint32_t warp_max[kWarps];
    const BucketEncoder buckets = fill_bucket_table<false>(tables, p.codebook);
    Divider divider{1.0f, 1.0f};
    if (p.absmax) {
        uint32_t bits = 0;
        for (int i = threadIdx.x; i < p.num_partials; i += kEncoderThreads)
            bits = ::max(bits, p.partial_absmax[i]);
        const Scale scale = scale_of<1>(max_over_cta<kEncoderThreads>(bits, warp_max));
        if (blockIdx.x == 0 && threadIdx.x == 0) *p.absmax = scale.absmax;
        divider = {scale.inverse != 0.0f ? scale.absmax : __uint_as_float(kNanBits), scale.inverse};
    }
    const float limit = __uint_as_float(buckets.limit);
    if (buckets.usable)
        encode<T>(p, buckets, limit, divider);
    else
        encode<T>(p, SearchEncoder{tables.threshold}, limit, divider);
}

#define ENTRY_POINTS(dtype)                                                                   \
    extern "C" __global__ __launch_bounds__(kEncoderThreads) void quantize_absmax_of_##dtype( \
        const __grid_constant__ AbsmaxParams p) {                                             \
        partial_absmax<dtype>(p);                                                             \
    }                                                                                         \
    extern "C" __global__ __launch_bounds__(                                                  \
        kEncoderThreads, 4) void quantize_##dtype(const __grid_constant__ QuantizeParams p) { \
        quantize<dtype>(p);                                                                   \
    }                                                                                         \
    extern "C" __global__ __launch_bounds__(256) void dequantize_##dtype(                     \
        const __grid_constant__ Dequantize8bitParams p) {                                     \
        dequantize_8bit<dtype, 2, 256>(p);                                                    \
    }

ENTRY_POINTS(float32)
ENTRY_POINTS(float16)
ENTRY_POINTS(bfloat16)
