// What the two kernels of gemm_4bit_skinny share: arguments, codebook values, block scales, the last sum.
#pragma once
#include <type_traits>
#include "codebook.cuh"
#include "dtype.cuh"

/// Arguments of gemm_4bit_skinny; mirrored by `ops::gemm_4bit::Gemm4bitSkinnyParams`.
struct Gemm4bitSkinnyParams {
    const void* input;  // [m, k]                     T
    const uint8_t*
        packed;  // [ceil_div(n * k, 2)]       element i = row * k + column; an even one in the high nibble
    const void* absmax;            // [ceil_div(n * k, block)]   float, or uint8_t codes when nested
    const float* absmax_scale;     // [ceil_div(blocks, 256)]    of the codes; null: absmax is not nested
    const float* absmax_offset;    // [1]                        nested only
    const float* absmax_codebook;  // [256]                      nested only; null: the signed dynamic map
    const void* bias;              // [n]                        bias_dtype, or null
    void* output;                  // [m, n]                     T
    int64_t m;
    int64_t n;
    int64_t k;
    int32_t block_shift;      // log2 of the block size, 5..12
    int32_t codebook;         // 0 NF4, 1 FP4, 2 AF4
    int32_t bias_dtype;       // 0 float32, 1 float16, 2 bfloat16
    int32_t tiles_per_cta;    // mma kernel: tiles of 16 rows of a CTA, 0..3 ..
    int32_t num_larger_ctas;  // .. and how many CTAs, the first ones, have one tile more
};
static_assert(sizeof(Gemm4bitSkinnyParams) == 112, "keep in step with the Rust mirror");

/// Calls f with the codebook of the arguments as a type. The codebook only fills a table, so one kernel
/// serves all three.
template <typename F>
__device__ __forceinline__ auto with_codebook(const Gemm4bitSkinnyParams& p, F&& f) {
    if (p.codebook == 0) return f(Nf4());
    if (p.codebook == 1) return f(Fp4());
    return f(Af4());
}

/// Value of a code by selects on immediates: a table in memory would be one more latency at kernel start.
/// kNum values from kFirst on are left to choose from.
template <typename Codebook, int kNum = 16, int kFirst = 0>
__device__ __forceinline__ float select_value(uint32_t code) {
    if constexpr (kNum == 1) {
        constexpr uint32_t kBits = Codebook::kValueBits[kFirst];
        return __uint_as_float(kBits);
    } else {
        const float low = select_value<Codebook, kNum / 2, kFirst>(code);
        const float high = select_value<Codebook, kNum / 2, kFirst + kNum / 2>(code);
        return code & (kNum / 2) ? high : low;
    }
}

/// Absmax of blocks in two steps, so that the memory latency of the first can be hidden. Elements are counted
/// from `first_element`, in the type that the caller counts in.
template <bool kNested>
class BlockScales {
 public:
    using Raw = std::conditional_t<kNested, uint32_t, float>;

    /// Nested: fills `map` [256]; the caller puts a barrier before the first `decode`.
    __device__ __forceinline__ BlockScales(const Gemm4bitSkinnyParams& p, int64_t first_element, float* map)
        : map_(map), shift_(p.block_shift) {
        const int64_t first_group = first_element >> shift_ >> 8;
        in_group_ = int(first_element - (first_group << 8 << shift_));
        absmax_ = static_cast<const Stored*>(p.absmax) + (first_group << 8);
        keep_in_register(absmax_);
        if constexpr (kNested) {
            group_scales_ = p.absmax_scale + first_group;
            prefetch_l2(group_scales_);
            offset_ = *p.absmax_offset;
            const float* const from = p.absmax_codebook ? p.absmax_codebook : kDynamicMap.value;
            for (int i = threadIdx.x; i < 256; i += blockDim.x) map[i] = from[i];
        }
    }

    template <typename Offset>
    __device__ __forceinline__ Raw load(Offset element) const {
        return __ldg(absmax_ + block_of(element));
    }

    /// Nested: two roundings, as the unfused decoder has. The scale of 256 blocks is fetched only here: it is
    /// mostly in L1, and registers are short.
    template <typename Offset>
    __device__ __forceinline__ float decode(Raw raw, Offset element) const {
        if constexpr (kNested) {
            const float scale = __ldg(group_scales_ + (block_of(element) >> 8));
            return __fadd_rn(__fmul_rn(map_[raw], scale), offset_);
        } else {
            return raw;
        }
    }

    /// Elements from `element` to the end of its block.
    template <typename Offset>
    __device__ __forceinline__ Offset left_in_block(Offset element) const {
        return (Offset(1) << shift_) - ((element + in_group_) & ((Offset(1) << shift_) - 1));
    }

 private:
    using Stored = std::conditional_t<kNested, uint8_t, float>;

    /// Counted from the first block of the group of 256 in which `first_element` lies.
    template <typename Offset>
    __device__ __forceinline__ Offset block_of(Offset element) const {
        return (element + in_group_) >> shift_;
    }

    const Stored* absmax_;
    const float* group_scales_ = nullptr;
    const float* map_;
    float offset_ = 0.0f;
    int shift_;
    int in_group_;  // elements before `first_element`
};

/// bias[row] as float32, 0 without a bias.
__device__ __forceinline__ float load_bias(const Gemm4bitSkinnyParams& p, int64_t row) {
    if (p.bias == nullptr) return 0.0f;
    if (p.bias_dtype == 0) return static_cast<const float*>(p.bias)[row];
    if (p.bias_dtype == 1) return float(static_cast<const float16*>(p.bias)[row]);
    return float(static_cast<const bfloat16*>(p.bias)[row]);
}
