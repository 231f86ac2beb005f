// Blockwise 8-bit codes of a 256-entry map: quantize and dequantize.
// Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2.
//
// Launch: grid = min(ceil_div(n, elements per CTA), 2^31 - 1); any alignment, any n > 0; no dynamic shared
// memory.
//
//   entry point                              threads  elements/warp  elements/CTA  static shared
//   quantize_blockwise_{float16,bfloat16}        256       3 x 1024     3 x 8192        18.8 KB
//   quantize_blockwise_float32                   256       3 x  512     3 x 4096        18.8 KB
//   dequantize_blockwise_{float16,bfloat16}      256            512         4096           1 KB
//   dequantize_blockwise_float32                 256            256         2048           1 KB
//
// Three tiles for each warp of quantize_blockwise, since the next is requested before the last is encoded: with
// one or two the signed dynamic map takes 5 % longer or 1 % less, but other maps, whose tables are made in every
// CTA, take 10 to 15 % longer with two (H200).
#include "blockwise_8bit.cuh"

/// Arguments of quantize_blockwise.
struct QuantizeBlockwiseParams {
    const void* input;      // [n]                        T
    const float* codebook;  // [256]                      ascending
    uint8_t* codes;         // [n]
    float* absmax;          // [ceil_div(n, block_size)]
    int64_t n;              //
    int32_t block_shift;    // log2 of the block size, 6 to 12
};
static_assert(sizeof(QuantizeBlockwiseParams) == 48, "keep in step with the Rust mirror");

template <typename T>
constexpr int64_t kCtaElements = int64_t(WarpTile<T>::kElements) * (kEncoderThreads / 32);

/// Whether the tiles of the CTA at `base` lie within the tensor, on addresses for vectors.
template <typename T>
__device__ __forceinline__ bool is_full(const QuantizeBlockwiseParams& p, int64_t base) {
    const bool aligned =
        (reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.codes) << 1) % 16 == 0;
    return aligned && base + kCtaElements<T> <= p.n;
}

template <typename T>
__device__ __forceinline__ void load_tile(const QuantizeBlockwiseParams& p, WarpTile<T>& tile, int64_t base,
                                          int lane, int warp) {
    const T* const input = static_cast<const T*>(p.input);
    if (is_full<T>(p, base))
        tile.template load<true>(input, base + warp * WarpTile<T>::kElements, p.n, lane);
    else
        tile.template load<false>(input, base + warp * WarpTile<T>::kElements, p.n, lane);
}

template <bool kFull, typename T, typename Encoder>
__device__ __forceinline__ void quantize_tile(const QuantizeBlockwiseParams& p, const WarpTile<T>& tile,
                                              const Encoder& encoder, const BlockLane<T>& self,
                                              uint32_t* warp_max, int64_t first) {
    const float inverse = block_scales<kFull, kEncoderThreads>(tile, self, warp_max, p.absmax, first, p.n);
    encode_tile<kFull>(tile, encoder, inverse, self, p.codes, first, p.n);
}

/// Encodes the tile in hand, which begins at this CTA's first element, and all that follow; the next is
/// requested before the last is encoded.
template <typename T, typename Encoder>
__device__ __forceinline__ void quantize_tiles(const QuantizeBlockwiseParams& p, WarpTile<T> tile,
                                               const Encoder& encoder, int lane, int warp) {
    __shared__ uint32_t
        warp_max[2][kEncoderThreads / 32];  // taken in turn: a warp is at most one barrier ahead
    const BlockLane<T> self(p.block_shift, lane, warp);
    int turn = 0;
    for (int64_t base = blockIdx.x * kCtaElements<T>; base < p.n; turn ^= 1) {
        const int64_t here = base, first = base + warp * WarpTile<T>::kElements;
        base += gridDim.x * kCtaElements<T>;
        WarpTile<T> next;
        if (base < p.n) load_tile(p, next, base, lane, warp);
        if (is_full<T>(p, here))
            quantize_tile<true>(p, tile, encoder, self, warp_max[turn], first);
        else
            quantize_tile<false>(p, tile, encoder, self, warp_max[turn], first);
        tile = next;
    }
}

/// A CTA asks for its first tile, then for the map; which encoder the map takes is found out in every CTA, so
/// that the host need not know the map. Full speed needs the input on 16 and the codes on 8 bytes.
template <typename T>
__device__ __forceinline__ void quantize_blockwise(const QuantizeBlockwiseParams& p) {
    __shared__ MapTables tables;
    const int lane = threadIdx.x % 32, warp = warp_in_cta();
    WarpTile<T> tile;
    load_tile(p, tile, blockIdx.x * kCtaElements<T>, lane, warp);
    if (fill_dynamic_table(tables, p.codebook))
        return quantize_tiles(p, tile, DynamicEncoder{tables.entry}, lane, warp);
    const BucketEncoder buckets = fill_bucket_table<true>(tables, p.codebook);
    if (buckets.usable) return quantize_tiles(p, tile, buckets, lane, warp);
    quantize_tiles(p, tile, SearchEncoder{tables.threshold, buckets.zero_code}, lane, warp);
}

/// CTAs of quantize_blockwise that must fit on a multiprocessor, without a spill: two tiles in registers take
/// 64 to 80.
#if __CUDA_ARCH__ >= 1000
constexpr int kQuantize8bitCtas = 3;
#else
constexpr int kQuantize8bitCtas = 4;
#endif

#define ENTRY_POINTS(dtype)                                                             \
    extern "C" __global__ __launch_bounds__(kEncoderThreads, kQuantize8bitCtas) void    \
        quantize_blockwise_##dtype(const __grid_constant__ QuantizeBlockwiseParams p) { \
        quantize_blockwise<dtype>(p);                                                   \
    }                                                                                   \
    extern "C" __global__ __launch_bounds__(256) void dequantize_blockwise_##dtype(     \
        const __grid_constant__ Dequantize8bitParams p) {                               \
        dequantize_8bit<dtype, 2, 256>(p);                                              \
    }

ENTRY_POINTS(float32)
ENTRY_POINTS(float16)
ENTRY_POINTS(bfloat16)
