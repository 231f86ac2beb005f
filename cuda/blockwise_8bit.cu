// Blockwise 8-bit codes of a 256-entry map: quantize and dequantize.
// Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2.
//
// Launch: grid = min(ceil_div(n, elements per CTA), 2^31 - 1); any alignment, any n > 0; no dynamic shared
// memory.
//
//   entry point                              threads  elements/warp  elements/CTA  static shared
//   quantize_blockwise_{float16,bfloat16}        256       4 x 1024     4 x 8192        18.6 KB
//   quantize_blockwise_float32                   256       4 x  512     4 x 4096        18.6 KB
//   dequantize_blockwise_{float16,bfloat16}      256            512         4096           1 KB
//   dequantize_blockwise_float32                 256            256         2048           1 KB
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

/// The tiles of one CTA. Two are in registers: the next is requested before the last is encoded.
template <typename T, bool kPrefetch>
struct QuantizeWalk {
    using Tile = WarpTile<T>;
    static constexpr int64_t kCtaElements = int64_t(Tile::kElements) * (kEncoderThreads / 32);

    const QuantizeBlockwiseParams& p;
    const T* input;
    uint32_t (*warp_max)[kEncoderThreads / 32];  // [2] shared memory
    int lane, warp;
    bool aligned;

    __device__ __forceinline__ bool is_full(int64_t first) const {
        return aligned && first + Tile::kElements <= p.n;
    }
    __device__ __forceinline__ void load(Tile& tile, int64_t base) const {
        const int64_t first = base + warp * Tile::kElements;
        if (is_full(first))
            tile.template load<true>(input, first, p.n, lane);
        else
            tile.template load<false>(input, first, p.n, lane);
    }

    /// Encodes the tile in hand, which begins at this CTA's first element, and all that follow.
    template <typename Encoder>
    __device__ __forceinline__ void run(Tile tile, const Encoder& encoder) const {
        const BlockShape<T> shape(p.block_shift);
        int turn = 0;
        for (int64_t base = blockIdx.x * kCtaElements; base < p.n; turn ^= 1) {
            const int64_t first = base + warp * Tile::kElements;
            base += gridDim.x * kCtaElements;
            Tile next;
            if (kPrefetch && base < p.n) load(next, base);
            const float inverse = block_scales<T, kEncoderThreads>(tile, shape, warp_max[turn], p.absmax,
                                                                   first, p.n, lane, warp);
            if (is_full(first))
                encode_tile<T, true>(tile, encoder, inverse, shape.lanes, p.codes, first, p.n, lane);
            else
                encode_tile<T, false>(tile, encoder, inverse, shape.lanes, p.codes, first, p.n, lane);
            if (!kPrefetch && base < p.n) load(next, base);
            tile = next;
        }
    }
};

/// A CTA asks for its first tile, then for the map; which encoder the map takes is found out in every CTA, so
/// that the host need not know the map. Full speed needs the input on 16 and the codes on 8 bytes.
template <typename T, bool kPrefetch>
__device__ __forceinline__ void quantize_blockwise(const QuantizeBlockwiseParams& p) {
    __shared__ MapTables tables;
    __shared__ uint32_t warp_max[2][kEncoderThreads / 32];
    const T* const input = static_cast<const T*>(p.input);
    const QuantizeWalk<T, kPrefetch> walk{
        p,
        input,
        warp_max,
        int(threadIdx.x % 32),
        warp_in_cta(),
        (reinterpret_cast<uintptr_t>(input) | reinterpret_cast<uintptr_t>(p.codes) << 1) % 16 == 0};
    WarpTile<T> tile;
    walk.load(tile, blockIdx.x * walk.kCtaElements);
    if (fill_dynamic_table(tables, p.codebook)) return walk.run(tile, DynamicEncoder{tables.entry});
    const BucketEncoder buckets = fill_bucket_table<true>(tables, p.codebook);
    if (buckets.usable) return walk.run(tile, buckets);
    walk.run(tile, SearchEncoder{tables.threshold, buckets.zero_code});
}

#define ENTRY_POINTS(dtype)                                                                   \
    extern "C" __global__ __launch_bounds__(kEncoderThreads, 4) void quantize_blockwise_##dtype( \
        const __grid_constant__ QuantizeBlockwiseParams p) {                                  \
        quantize_blockwise<dtype, true>(p);                                                         \
    }                                                                                         \
    extern "C" __global__ __launch_bounds__(256) void dequantize_blockwise_##dtype(           \
        const __grid_constant__ Dequantize8bitParams p) {                                     \
        dequantize_8bit<dtype, 2, 256>(p);                                                    \
    }

ENTRY_POINTS(float32)
ENTRY_POINTS(float16)
ENTRY_POINTS(bfloat16)
