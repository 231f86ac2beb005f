// Blockwise 4-bit codes: quantize, dequantize (plain and with nested statistics), pack, unpack.
// Dettmers et al., QLoRA, arXiv:2305.14314, section 3; 8-bit Optimizers via Block-wise Quantization,
// arXiv:2110.02861.
//
// Launch: grid = min(ceil_div(n, elements per CTA), 2^31 - 1); any alignment, any n > 0; no dynamic shared
// memory.
//
//   entry point                                       threads  elements/warp  elements/CTA  static shared
//   quantize_4bit_{float16,bfloat16}_{nf4,fp4,af4}        256           1024          8192           64 B
//   quantize_4bit_float32_{nf4,fp4,af4}                   256            512          4096           64 B
//   dequantize_4bit_{float16,bfloat16}_{nf4,fp4,af4}      256            512          4096              0
//   dequantize_4bit_float32_{nf4,fp4,af4}                 256            256          2048              0
//   dequantize_4bit_nested_...                         as dequantize_4bit_...
//   pack_4bit, unpack_4bit                                256           1024          8192              0
#include "codebook.cuh"
#include "dtype.cuh"
#include "pack.cuh"
#include "tile.cuh"

/// Arguments of quantize_4bit.
struct Quantize4bitParams {
    const void* input;    // [n]                         T
    uint8_t* packed;      // [ceil_div(n, 2)]            element 2i in the high nibble
    float* absmax;        // [ceil_div(n, block_size)]
    int64_t n;            //
    int32_t block_shift;  // log2 of the block size, 5 to 12
};
static_assert(sizeof(Quantize4bitParams) == 40, "keep in step with the Rust mirror");

/// Quantizes the warp tile at `first`. `warp_max` as for block_scales.
template <bool kFull, int kThreads, typename T, typename Codebook>
__device__ __forceinline__ void quantize_4bit_tile(const Quantize4bitParams& p,
                                                   const CodeSearch<Codebook>& search,
                                                   const BlockLane<T>& self, uint32_t* warp_max,
                                                   int64_t first) {
    using Tile = WarpTile<T>;
    constexpr int kVector = Tile::kVector, kRowBytes = Tile::kRowElements / 2;
    Tile tile;
    tile.template load<kFull>(static_cast<const T*>(p.input), first, p.n, self.lane);
    const float inverse = block_scales<kFull, kThreads>(tile, self, warp_max, p.absmax, first, p.n);
    uint32_t word[Tile::kRows];
    #pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
        const float scale = __shfl_sync(0xffffffffu, inverse, r, self.lanes);
        float x[kVector];
        uint32_t code[kVector];
        unpack<T>(tile.row[r], x);
        #pragma unroll
        for (int i = 0; i < kVector; ++i) code[i] = search(__fmul_rn(x[i], scale));
        word[r] = Codebook::finish(pack_nibbles(code));
    }
    if (__any_sync(0xffffffffu, inverse == 0.0f)) {  // a NaN or an Inf has no code
        #pragma unroll
        for (int r = 0; r < Tile::kRows; ++r)
            if (__shfl_sync(0xffffffffu, inverse, r, self.lanes) == 0.0f) word[r] = Codebook::kZeroWord;
    }
    const int64_t i = first + self.lane * kVector;
    uint8_t* const out = p.packed + (i >> 1);
    #pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
        if constexpr (kFull && kVector == 8) {
            *reinterpret_cast<uint32_t*>(out + r * kRowBytes) = word[r];
        } else if constexpr (kFull) {
            *reinterpret_cast<uint16_t*>(out + r * kRowBytes) = uint16_t(word[r]);
        } else {
            #pragma unroll
            for (int j = 0; j < kVector / 2; ++j)
                if (i + r * Tile::kRowElements + 2 * j < p.n)
                    out[r * kRowBytes + j] = uint8_t(word[r] >> (8 * j));
        }
    }
}

/// A warp owns whole tiles; only blocks larger than a tile (1024 elements of 16 bits, 512 of 32) need a
/// barrier. Full speed needs the input on 16 and the codes on 4 bytes.
template <typename T, typename Codebook, int kThreads>
__device__ __forceinline__ void quantize_4bit(const Quantize4bitParams& p) {
    wait_for_earlier_kernels();
    constexpr int kElements = WarpTile<T>::kElements;
    constexpr int64_t kCtaElements = int64_t(kElements) * (kThreads / 32);
    __shared__ uint32_t warp_max[2][kThreads / 32];  // taken in turn: a warp is at most one barrier ahead
    const int lane = threadIdx.x % 32, warp = warp_in_cta();
    const CodeSearch<Codebook> search(lane);
    const BlockLane<T> self(p.block_shift, lane, warp);
    const bool aligned =
        (reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.packed) << 2) % 16 == 0;
    int turn = 0;
    for (int64_t base = blockIdx.x * kCtaElements; base < p.n; base += gridDim.x * kCtaElements) {
        if (aligned && base + kCtaElements <= p.n)
            quantize_4bit_tile<true, kThreads>(p, search, self, warp_max[turn], base + warp * kElements);
        else
            quantize_4bit_tile<false, kThreads>(p, search, self, warp_max[turn], base + warp * kElements);
        turn ^= 1;
    }
}

/// Arguments of dequantize_4bit and dequantize_4bit_nested.
struct Dequantize4bitParams {
    const uint8_t* packed;         // [ceil_div(n, 2)]
    const void* absmax;            // [num_blocks]                 float; nested: uint8_t
    const float* absmax_scale;     // [ceil_div(num_blocks, 256)]  nested
    const float* absmax_offset;    // [1]                          nested
    const float* absmax_codebook;  // [256]                        nested; null: the signed dynamic map
    void* output;                  // [n]                          T
    int64_t n;                     //
    int32_t block_shift;           // log2 of the block size
};
static_assert(sizeof(Dequantize4bitParams) == 64, "keep in step with the Rust mirror");

/// The second level of nested statistics, or nothing.
template <bool kNested>
struct AbsmaxDecoder {
    const float* map;  // [256]
    float offset;

    __device__ __forceinline__ explicit AbsmaxDecoder(const Dequantize4bitParams& p)
        : map(p.absmax_codebook ? p.absmax_codebook : kDynamicMap.value),
          offset(kNested ? __ldg(p.absmax_offset) : 0.0f) {}
};

template <typename T, typename Codebook, bool kNested, int kRows, bool kFull>
__device__ __forceinline__ void dequantize_4bit_tile(const Dequantize4bitParams& p,
                                                     const CodeValue<Codebook>& value,
                                                     const AbsmaxDecoder<kNested>& decoder, int64_t first,
                                                     int lane) {
    constexpr int kVector = kPerVector<T>;
    uint32_t codes[kRows];
    float absmax[kRows];
    uint8_t absmax_code[kRows];
    #pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int64_t i = first + (r * 32 + lane) * kVector;
        const uint8_t* const source = p.packed + (i >> 1);
        if constexpr (kFull && kVector == 8) {
            codes[r] = load_streaming(reinterpret_cast<const uint32_t*>(source));
        } else if constexpr (kFull) {
            codes[r] = load_streaming(reinterpret_cast<const uint16_t*>(source));
        } else {
            codes[r] = 0;
            #pragma unroll
            for (int j = 0; j < kVector / 2; ++j)
                if (i + 2 * j < p.n) codes[r] |= uint32_t(source[j]) << (8 * j);
        }
        const int64_t block = kFull || i < p.n ? i >> p.block_shift : 0;
        if constexpr (kNested) {
            absmax_code[r] = __ldg(static_cast<const uint8_t*>(p.absmax) + block);
            absmax[r] = __ldg(p.absmax_scale + (block >> 8));
        } else {
            absmax[r] = __ldg(static_cast<const float*>(p.absmax) + block);
        }
    }
    #pragma unroll
    for (int r = 0; r < kRows; ++r) {
        if constexpr (kNested)  // two roundings: the same scales as an unfused decode
            absmax[r] = __fadd_rn(__fmul_rn(__ldg(decoder.map + absmax_code[r]), absmax[r]), decoder.offset);
        float x[kVector];
        #pragma unroll
        for (int i = 0; i < kVector; ++i) x[i] = __fmul_rn(value(codes[r] >> nibble_shift(i)), absmax[r]);
        store_vector<kFull>(static_cast<T*>(p.output), first + (r * 32 + lane) * kVector, p.n, pack<T>(x));
    }
}

/// Full speed needs the codes on 4 and the output on 16 bytes. Two rows per warp: one was 6 % slower, four 2
/// %.
template <typename T, typename Codebook, bool kNested, int kRows, int kThreads>
__device__ __forceinline__ void dequantize_4bit(const Dequantize4bitParams& p) {
    wait_for_earlier_kernels();
    constexpr int kElements = kRows * 32 * kPerVector<T>;
    constexpr int64_t kCtaElements = int64_t(kElements) * (kThreads / 32);
    const int lane = threadIdx.x % 32;
    const CodeValue<Codebook> value(lane);
    const AbsmaxDecoder<kNested> decoder(p);
    const bool aligned =
        (reinterpret_cast<uintptr_t>(p.output) | reinterpret_cast<uintptr_t>(p.packed) << 2) % 16 == 0;
    for (int64_t first = blockIdx.x * kCtaElements + warp_in_cta() * kElements; first < p.n;
         first += gridDim.x * kCtaElements) {
        if (aligned && first + kElements <= p.n)
            dequantize_4bit_tile<T, Codebook, kNested, kRows, true>(p, value, decoder, first, lane);
        else
            dequantize_4bit_tile<T, Codebook, kNested, kRows, false>(p, value, decoder, first, lane);
    }
}

/// Arguments of pack_4bit.
struct Pack4bitParams {
    const uint8_t* codes;  // [n]               the low four bits count
    uint8_t* packed;       // [ceil_div(n, 2)]
    int64_t n;             //
    int32_t zero_code;     // fills the last nibble of an odd n
};
static_assert(sizeof(Pack4bitParams) == 32, "keep in step with the Rust mirror");

/// Four codes, one to a byte of `word`, as two bytes.
__device__ __forceinline__ uint32_t pack_word(uint32_t word) {
    const uint32_t pairs = (word & 0x0f0f0f0fu) * 16 + ((word >> 8) & 0x000f000fu);  // in bytes 0 and 2
    return __byte_perm(pairs, 0, 0x4420);
}

/// The inverse of pack_word.
__device__ __forceinline__ uint32_t unpack_word(uint32_t pairs) {
    const uint32_t spread = __byte_perm(pairs, 0, 0x4140);
    return ((spread >> 4) & 0x000f000fu) | ((spread & 0x000f000fu) << 8);
}

constexpr int kPackThreads = 256;
constexpr int kPackCodes = 16;  // of one thread at a time
constexpr int64_t kPackCtaCodes = 2 * kPackThreads * kPackCodes;

extern "C" __global__ __launch_bounds__(kPackThreads) void pack_4bit(
    const __grid_constant__ Pack4bitParams p) {
    wait_for_earlier_kernels();
    const bool aligned =
        (reinterpret_cast<uintptr_t>(p.codes) | reinterpret_cast<uintptr_t>(p.packed) << 1) % 16 == 0;
    for (int64_t base = blockIdx.x * kPackCtaCodes; base < p.n; base += gridDim.x * kPackCtaCodes) {
        #pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t i = base + (half * kPackThreads + int(threadIdx.x)) * kPackCodes;
            if (aligned && i + kPackCodes <= p.n) {
                const uint4 v = load_streaming(reinterpret_cast<const uint4*>(p.codes + i));
                *reinterpret_cast<uint2*>(p.packed + i / 2) =
                    make_uint2(pack_word(v.x) | pack_word(v.y) << 16, pack_word(v.z) | pack_word(v.w) << 16);
            } else {
                for (int64_t j = i; j < ::min(i + kPackCodes, p.n); j += 2) {
                    const uint32_t low = j + 1 < p.n ? p.codes[j + 1] : uint32_t(p.zero_code);
                    p.packed[j / 2] = uint8_t((p.codes[j] & 15u) << 4 | (low & 15u));
                }
            }
        }
    }
}

/// Arguments of unpack_4bit.
struct Unpack4bitParams {
    const uint8_t* packed;  // [ceil_div(n, 2)]
    uint8_t* codes;         // [n]
    int64_t n;              //
};
static_assert(sizeof(Unpack4bitParams) == 24, "keep in step with the Rust mirror");

extern "C" __global__ __launch_bounds__(kPackThreads) void unpack_4bit(
    const __grid_constant__ Unpack4bitParams p) {
    wait_for_earlier_kernels();
    const bool aligned =
        (reinterpret_cast<uintptr_t>(p.codes) | reinterpret_cast<uintptr_t>(p.packed) << 1) % 16 == 0;
    for (int64_t base = blockIdx.x * kPackCtaCodes; base < p.n; base += gridDim.x * kPackCtaCodes) {
        #pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t i = base + (half * kPackThreads + int(threadIdx.x)) * kPackCodes;
            if (aligned && i + kPackCodes <= p.n) {
                const uint2 v = load_streaming(reinterpret_cast<const uint2*>(p.packed + i / 2));
                store_streaming(reinterpret_cast<uint4*>(p.codes + i),
                                make_uint4(unpack_word(v.x), unpack_word(v.x >> 16), unpack_word(v.y),
                                           unpack_word(v.y >> 16)));
            } else {
                for (int64_t j = i; j < ::min(i + kPackCodes, p.n); ++j)
                    p.codes[j] = p.packed[j / 2] >> (j % 2 ? 0 : 4) & 15;
            }
        }
    }
}

/// CTAs of quantize_4bit that must fit on a multiprocessor: six of 256 threads, of 40 registers each.
#if __CUDA_ARCH__ >= 800
constexpr int kQuantize4bitCtas = 6;
#else
constexpr int kQuantize4bitCtas = 4;  // all that sm_75 has room for
#endif

#define ENTRY_POINTS(dtype, codebook, Codebook)                                                              \
    extern "C" __global__ __launch_bounds__(256, kQuantize4bitCtas) void quantize_4bit_##dtype##_##codebook( \
        const __grid_constant__ Quantize4bitParams p) {                                                      \
        quantize_4bit<dtype, Codebook, 256>(p);                                                              \
    }                                                                                                        \
    extern "C" __global__ __launch_bounds__(256) void dequantize_4bit_##dtype##_##codebook(                  \
        const __grid_constant__ Dequantize4bitParams p) {                                                    \
        dequantize_4bit<dtype, Codebook, false, 2, 256>(p);                                                  \
    }                                                                                                        \
    extern "C" __global__ __launch_bounds__(256) void dequantize_4bit_nested_##dtype##_##codebook(           \
        const __grid_constant__ Dequantize4bitParams p) {                                                    \
        dequantize_4bit<dtype, Codebook, true, 2, 256>(p);                                                   \
    }

ENTRY_POINTS(float32, nf4, Nf4)
ENTRY_POINTS(float32, fp4, Fp4)
ENTRY_POINTS(float32, af4, Af4)
ENTRY_POINTS(float16, nf4, Nf4)
ENTRY_POINTS(float16, fp4, Fp4)
ENTRY_POINTS(float16, af4, Af4)
ENTRY_POINTS(bfloat16, nf4, Nf4)
ENTRY_POINTS(bfloat16, fp4, Fp4)
ENTRY_POINTS(bfloat16, af4, Af4)
