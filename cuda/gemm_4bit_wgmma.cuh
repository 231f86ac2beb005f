// What the wgmma kernels of gemm_4bit (mid, large) share: the operands beside the tensor maps, the codebook as
// values and as a pair table, four block scales of a row at once (plain or nested), bias, swizzle.
// Decoded weights are the register operand of wgmma, rows of the weight its 64 rows, tokens its columns: the
// kernels compute output^T. TMA, barriers and wgmma itself are in ptx_sm90.cuh.
#pragma once
#include "gemm_4bit.cuh"
#include "ptx_sm90.cuh"
#include "ring.cuh"

/// Operands that need no tensor map; mirrored by `ops::gemm_4bit::Gemm4bitOperands`.
struct Gemm4bitOperands {
    const void* absmax;            // [ceil_div(n * k, block)]  float, or uint8_t codes when nested
    const float* absmax_scale;     // [ceil_div(blocks, 256)]   of the codes; null: absmax is not nested
    const float* absmax_offset;    // [1]                       nested only
    const float* absmax_codebook;  // [256]                     nested only; null: the signed dynamic map
    const void* bias;              // [n]                       bias_dtype, or null
    void* output;                  // [m, n]                    T
    int32_t m;
    int32_t n;
    int32_t k;              // a multiple of 64
    int32_t block_shift;    // log2 of the block size, 5..12
    int32_t codebook;       // 0 NF4, 1 FP4, 2 AF4
    int32_t bias_dtype;     // 0 float32, 1 float16, 2 bfloat16
    int32_t weights_ready;  // no kernel in flight writes packed or absmax: they may be read before the wait
};
static_assert(sizeof(Gemm4bitOperands) == 80, "keep in step with the Rust mirror");

namespace wgmma {

constexpr int kSmemStart = 1024;            // sm_90 places dynamic shared memory behind one KB of its own
constexpr int kPairTableBytes = 256 * 256;  // with rows of 256 bytes

/// Fills the 256 rows of kRowBytes bytes from `table` on: row b holds the pair of values of byte b, high nibble
/// first, once for each lane at 4 lane, so that 32 lanes look up 32 bytes without a conflict. The values are
/// kFactor times too large. Rows of 256 bytes are addressed by PRMT, which shares a pipe with most of decoding, rows
/// of 128 by IDP, which shares one with the scaling: faster up to 32 tokens.
template <typename T, int kThreads, int kRowBytes = 256>
__device__ __forceinline__ void fill_pair_table(int codebook, uint32_t table, int thread) {
    static_assert(kThreads % 256 == 0, "a thread fills rows of one byte, whose pair it computes once");
    const uint32_t byte = thread % 256;
    const uint32_t pair = with_codebook(codebook, [&]<typename Codebook>(Codebook) {
        return pack_pair<T>(__fmul_rn(select_value<Codebook>(byte >> 4), kFactor<T, Codebook>),
                            __fmul_rn(select_value<Codebook>(byte & 15), kFactor<T, Codebook>));
    });
    #pragma unroll
    for (int i = 0; i < 8; i += kThreads / 256)
        store_shared_16(table + byte * kRowBytes + (i + thread / 256 + byte) % 8 * 16,
                        make_uint4(pair, pair, pair, pair));
}
/// What look_up_pair takes beside the word; the table begins shared memory, at `base`.
template <int kRowBytes>
__device__ __forceinline__ uint32_t lane_of_table(uint32_t base, int lane) {
    return opaque((kRowBytes == 256 ? base & 0xff000000 : base) | lane * 4);
}
/// The pair of byte kByte of `word`.
template <int kByte, int kRowBytes = 256>
__device__ __forceinline__ uint32_t look_up_pair(uint32_t word, uint32_t lane) {
    if constexpr (kRowBytes == 128)
        return load_shared_4(__dp4a(word, 128u << 8 * kByte, lane));
    else
        return load_shared_4<kSmemStart>(permute_bytes(word, lane, 0x7604 | kByte << 4));
}

/// Turns the 4 x 4 bytes that the lanes of a quad hold in each of four words: lane t ends with byte t of lane i's
/// word as byte i. Codes come as words, and a fragment wants byte t of each. kIsLean: two registers less for four
/// shifts more.
template <bool kIsLean>
class QuadTranspose {
 public:
    __device__ __forceinline__ explicit QuadTranspose(int lane) {
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            constexpr uint32_t kSelectors[2][3][2] = {{{0x7531, 0x6420}, {0x5240, 0x3514}, {0x7260, 0x3716}},
                                                      {{0x7632, 0x5410}, {0x5410, 0x3254}, {0x7610, 0x3276}}};
            const bool is_high = lane >> i & 1;
            send_[i] = opaque(is_high ? kSelectors[i][0][1] : kSelectors[i][0][0]);
            first_[i] = opaque(is_high ? kSelectors[i][1][1] : kSelectors[i][1][0]);
            if (!kIsLean) second_[i] = opaque(is_high ? kSelectors[i][2][1] : kSelectors[i][2][0]);
        }
    }
    __device__ __forceinline__ void operator()(uint32_t (&words)[4]) const {
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            #pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const uint32_t sent = permute_bytes(words[j], words[j + 1], send_[i]);
                const uint32_t got = __shfl_xor_sync(0xffffffffu, sent, 1 << i);
                words[j] = permute_bytes(words[j], got, first_[i]);
                words[j + 1] = kIsLean ? permute_bytes(words[j + 1], got >> 16, first_[i])
                                       : permute_bytes(words[j + 1], got, second_[i]);
            }
        }
    }

 private:
    uint32_t send_[2], first_[2], second_[kIsLean ? 1 : 2];
};
/// Four scales of each of kRows rows: those of the elements `unit * kUnit` .. , `unit` a multiple of 4; blocks of
/// kUnit elements or more. Zero beyond the row's end and beyond the last row, so that what TMA fills with zeros is
/// multiplied by zero. `load` and `decode` are apart, so that the latency between can be hidden.
template <int kUnit, int kRows>
class RowScales {
 public:
    /// Nested: `map` is the shared address of 256 floats that `fill_map` has filled.
    __device__ __forceinline__ RowScales(const Gemm4bitOperands& o, uint32_t map)
        : o_(o), map_(map), shift_(o.block_shift - kLog2Unit), num_units_(o.k / kUnit) {
        const bool is_nested = o.absmax_scale != nullptr;
        offset_ = is_nested ? __ldg(o.absmax_offset) : 0.0f;
        // Four units lie in one vector, or in aligned halves, or in one block.
        const bool is_aligned =
            num_units_ % 4 == 0 &&
            (shift_ > 0 || reinterpret_cast<int64_t>(o.absmax) % (is_nested ? 4 : 16) == 0);
        form_ = !is_aligned ? kSingles : is_nested ? kCodes : shift_ == 0 ? kVector : kHalves;
    }
    static __device__ __forceinline__ void fill_map(const Gemm4bitOperands& o, uint32_t map, int thread,
                                                    int num_threads) {
        if (o.absmax_scale == nullptr) return;
        const float* const from = o.absmax_codebook ? o.absmax_codebook : kDynamicMap.value;
        for (int i = thread; i < 256; i += num_threads) store_shared_4(map + 4 * i, __float_as_uint(from[i]));
    }

    /// Rows row, row + step, ..
    __device__ __forceinline__ void load(uint4 (&v)[kRows], int row, int step, int unit) const {
        #pragma unroll
        for (int i = 0; i < kRows; ++i) v[i] = make_uint4(0, 0, 0, 0);
        const int num = unit < num_units_ ? o_.n - row : 0;  // row i exists if i * step < num
        const int64_t first = int64_t(row) * num_units_ + unit, pitch = int64_t(step) * num_units_;
        if (form_ == kVector) {
            const float* from = static_cast<const float*>(o_.absmax) + first;
            #pragma unroll
            for (int i = 0; i < kRows; ++i, from += pitch)
                if (i * step < num) v[i] = __ldg(reinterpret_cast<const uint4*>(from));
        } else if (form_ == kHalves) {
            #pragma unroll
            for (int i = 0; i < kRows; ++i) {
                if (i * step >= num) break;
                const uint32_t* const from =
                    static_cast<const uint32_t*>(o_.absmax) + ((first + i * pitch) >> shift_);
                v[i].x = v[i].z = __ldg(from);
                if (shift_ == 1) v[i].z = __ldg(from + 1);
            }
        } else if (form_ == kCodes) {
            #pragma unroll
            for (int i = 0; i < kRows; ++i) {
                if (i * step >= num) break;
                const int64_t block = (first + i * pitch) >> shift_;
                const uint8_t* const codes = static_cast<const uint8_t*>(o_.absmax) + block;
                if (shift_ == 0)
                    v[i].x = __ldg(reinterpret_cast<const uint32_t*>(codes));
                else
                    v[i].x = __ldg(codes) * 0x1010101u;
                if (shift_ == 1) v[i].x = (v[i].x & 0xffff) | __ldg(codes + 1) * 0x1010000u;
                v[i].y = __float_as_uint(__ldg(o_.absmax_scale + (block >> 8)));
            }
        } else {
            #pragma unroll 1
            for (int j = 0; j < 4; ++j) {  // the values move up, so that none has an index at run time
                #pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    v[i].x = v[i].y, v[i].y = v[i].z, v[i].z = v[i].w, v[i].w = 0;
                    if (i * step < num && unit + j < num_units_)
                        v[i].w = load_single((first + i * pitch + j) >> shift_);
                }
            }
        }
    }
    /// Brings what `load` will want into L2.
    __device__ __forceinline__ void prefetch(int row, int step, int unit) const {
        if (unit >= num_units_) return;
        #pragma unroll
        for (int i = 0; i < kRows; ++i) {
            if (row + i * step >= o_.n) break;
            const int64_t block = (int64_t(row + i * step) * num_units_ + unit) >> shift_;
            prefetch_l2(static_cast<const char*>(o_.absmax) + (o_.absmax_scale ? block : 4 * block));
        }
    }
    /// What `load` has brought becomes the bits of four floats.
    __device__ __forceinline__ void decode(uint4 (&v)[kRows]) const {
        if (form_ == kHalves) {
            #pragma unroll
            for (int i = 0; i < kRows; ++i) v[i].y = v[i].x, v[i].w = v[i].z;
        } else if (form_ == kCodes) {
            #pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const uint32_t codes = v[i].x;
                const float scale = __uint_as_float(v[i].y);
                v[i] = make_uint4(decode_code(codes & 255, scale), decode_code(codes >> 8 & 255, scale),
                                  decode_code(codes >> 16 & 255, scale), decode_code(codes >> 24, scale));
            }
        }
    }

 private:
    enum Form { kSingles, kVector, kHalves, kCodes };
    static constexpr int kLog2Unit = kUnit == 64 ? 6 : 5;
    static_assert(kUnit == 64 || kUnit == 32, "a unit is the smallest block that the kernel takes");

    __device__ __forceinline__ uint32_t load_single(int64_t block) const {
        if (o_.absmax_scale == nullptr) return __ldg(static_cast<const uint32_t*>(o_.absmax) + block);
        return decode_code(__ldg(static_cast<const uint8_t*>(o_.absmax) + block),
                           __ldg(o_.absmax_scale + (block >> 8)));
    }
    /// Two roundings, as the unfused decoder has.
    __device__ __forceinline__ uint32_t decode_code(uint32_t code, float scale) const {
        const float value = __uint_as_float(load_shared_4(map_ + 4 * code));
        return __float_as_uint(__fadd_rn(__fmul_rn(value, scale), offset_));
    }

    const Gemm4bitOperands& o_;
    uint32_t map_;
    int shift_, num_units_;
    float offset_;
    Form form_;
};

/// Byte offset of 16-byte piece `piece` of row `row` in rows of kRowBytes that TMA has swizzled as wide as
/// they are. Eight consecutive rows fall on eight different groups of banks.
template <int kRowBytes>
__device__ __forceinline__ int swizzled_offset(int row, int piece) {
    static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes == 128, "the widths of TMA's swizzles");
    constexpr int kPieces = kRowBytes / 16, kRowsPerStep = 128 / kRowBytes;
    return row * kRowBytes + ((piece ^ (row / kRowsPerStep & (kPieces - 1))) << 4);
}

}  // namespace wgmma
