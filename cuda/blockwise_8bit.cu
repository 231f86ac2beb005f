// Blockwise 8-bit codes of a 256-entry map: quantize and dequantize.
// Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2.
//
// Launch: any alignment, any n > 0, any grid; no dynamic shared memory. T = ceil_div(n, elements of a CTA's tile).
//
//   entry point                              threads  elements/CTA  static shared  best grid
//   quantize_blockwise_{float16,bfloat16}        256    tile: 8192        18.8 KB  s + ceil_div(T - s, 4)
//   quantize_blockwise_float32                   256    tile: 4096        18.8 KB  with s = min(T, 792)
//   dequantize_blockwise_{float16,bfloat16}      256          4096           1 KB  ceil_div(n, 4096)
//   dequantize_blockwise_float32                 256          2048           1 KB  ceil_div(n, 2048)
//
// The last 792 CTAs of quantize_blockwise do one tile, all others four. The signed dynamic map takes 1 to 2 % longer
// if none is small, which leaves multiprocessors idle at the end; maps whose tables are made in every CTA take 13 %
// longer with two tiles for each (H200). More CTAs on a multiprocessor than four are slower too, by 4 % with five and
// 14 % with six: memory serves fewer streams better.
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

/// Consecutive tiles of a CTA: many of the first ones, since a CTA makes its own tables, few of the last ones,
/// so that all multiprocessors end together.
constexpr int kManyTiles = 4, kFewTiles = 1;

template <typename T>
constexpr int kCtaElements = WarpTile<T>::kElements * (kEncoderThreads / 32);  // of one tile

/// Encodes `num` > 0 full tiles, the first of which is in hand. A row of the next is requested when that of
/// the last is encoded, into the same registers.
template <typename T, typename Encoder>
__device__ __forceinline__ void quantize_full_tiles(const QuantizeBlockwiseParams& p, WarpTile<T>& tile,
                                                    const Encoder& encoder, const BlockLane<T>& self,
                                                    uint32_t (&warp_max)[2][kEncoderThreads / 32],
                                                    int64_t base, int64_t num) {
    const int64_t first = base + self.warp * WarpTile<T>::kElements;
    const uint4* input = reinterpret_cast<const uint4*>(static_cast<const T*>(p.input) + first) + self.lane;
    uint8_t* codes = p.codes + first;
    float* absmax = p.absmax + (first >> self.shift) + (self.start >> self.shift);
    for (int turn = 0;; turn ^= 1) {
        const Scale scale = scale_of<1>(block_absmax<kEncoderThreads>(tile, self, warp_max[turn]));
        if (self.is_first) *absmax = scale.absmax;
        const bool more = --num > 0;
        input += kCtaElements<T> / kPerVector<T>;
        encode_tile<true>(tile, encoder, scale.inverse, self, codes, 0, [&](int r) {
            if (more) tile.row[r] = load_streaming(input + r * 32);
        });
        if (!more) return;
        codes += kCtaElements<T>;
        absmax += kCtaElements<T> >> self.shift;
    }
}

/// The tiles of a CTA, which are full up to `full_end`. The last CTA takes all that are left, so that any grid
/// is right.
struct TileRange {
    int64_t begin, end, full_end;

    template <int kMany, int kFew>
    static __device__ __forceinline__ TileRange of_cta(int64_t num_tiles, int64_t num_full) {
        const int64_t num_ctas = gridDim.x, cta = blockIdx.x;
        const int64_t num_large =
            ::max((num_tiles - kFew * num_ctas + kMany - kFew - 1) / (kMany - kFew), int64_t(0));
        const int64_t begin = kFew * cta + (kMany - kFew) * ::min(cta, num_large),
                      size = cta < num_large ? kMany : kFew,
                      end = cta + 1 == num_ctas ? num_tiles : ::min(begin + size, num_tiles);
        return {begin, end, ::min(end, num_full)};
    }
};

/// Encodes `tiles`, of which the first is in hand if it is full.
template <typename T, typename Encoder>
__device__ __forceinline__ void quantize_tiles(const QuantizeBlockwiseParams& p, WarpTile<T>& tile,
                                               const TileRange& tiles, const Encoder& encoder, int lane,
                                               int warp) {
    __shared__ uint32_t
        warp_max[2][kEncoderThreads / 32];  // taken in turn: a warp is at most one barrier ahead
    const BlockLane<T> self(p.block_shift, lane, warp);
    if (tiles.begin < tiles.full_end)
        quantize_full_tiles(p, tile, encoder, self, warp_max, tiles.begin * kCtaElements<T>,
                            tiles.full_end - tiles.begin);
    for (int64_t t = ::max(tiles.begin, tiles.full_end); t < tiles.end; ++t) {
        const int64_t first = t * kCtaElements<T> + warp * WarpTile<T>::kElements;
        tile.template load<false>(static_cast<const T*>(p.input), first, p.n, lane);
        __syncthreads();  // warp_max
        const float inverse =
            block_scales<false, kEncoderThreads>(tile, self, warp_max[0], p.absmax, first, p.n);
        encode_tile<false>(tile, encoder, inverse, self, p.codes + first, p.n - first, [](int) {});
    }
}

/// A CTA asks for its first tile, then for the map; which encoder the map takes is found out in every CTA, so
/// that the host need not know the map. Full speed needs the input on 16 and the codes on 8 bytes.
template <typename T, int kMany = kManyTiles, int kFew = kFewTiles>
__device__ __forceinline__ void quantize_blockwise(const QuantizeBlockwiseParams& p) {
    wait_for_earlier_kernels();
    __shared__ MapTables tables;
    constexpr int kElements = kCtaElements<T>;
    const int lane = threadIdx.x % 32, warp = warp_in_cta();
    const bool aligned =
        (reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.codes) << 1) % 16 == 0;
    const TileRange tiles =
        TileRange::of_cta<kMany, kFew>((p.n + kElements - 1) / kElements, aligned ? p.n / kElements : 0);
    WarpTile<T> tile;
    if (tiles.begin < tiles.full_end)
        tile.template load<true>(static_cast<const T*>(p.input),
                                 tiles.begin * kElements + warp * WarpTile<T>::kElements, p.n, lane);
    if (fill_dynamic_table(tables, p.codebook))
        return quantize_tiles(p, tile, tiles, DynamicEncoder{tables.entry}, lane, warp);
    const BucketEncoder buckets = fill_bucket_table<true>(tables, p.codebook);
    if (buckets.usable) return quantize_tiles(p, tile, tiles, buckets, lane, warp);
    quantize_tiles(p, tile, tiles, SearchEncoder{tables.threshold}, lane, warp);
}

/// CTAs of quantize_blockwise that must fit on a multiprocessor, without a spill.
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
