// What every kernel that multiplies by a 4-bit weight needs: codebook values, block scales, bias. The arguments are
// fields of the kernels' structs: absmax, absmax_scale, absmax_offset, absmax_codebook, block_shift, bias, bias_dtype.
#pragma once
#include <type_traits>
#include "bias.cuh"
#include "codebook.cuh"
#include "dtype.cuh"

/// Calls f with the codebook of that number as a type. The codebook only fills a table, so one kernel serves
/// all three.
template <typename F>
__device__ __forceinline__ auto with_codebook(int codebook, F&& f) {
    if (codebook == 0) return f(Nf4());
    if (codebook == 1) return f(Fp4());
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

/// Factor of a codebook's values before they are rounded to T. Chosen so that all 16 lie near representable
/// values: for NF4 the rms error of a bfloat16 weight is 7.8e-4 instead of 1.36e-3 (1.65e-3 for rounding
/// value * absmax), of a float16 weight 8.0e-5 instead of 1.8e-4 (search over [1, 2), codes weighted by their
/// frequency in Gaussian blocks of 64).
template <typename T, typename Codebook>
constexpr float kFactor = 1.0f;
template <>
constexpr float kFactor<bfloat16, Nf4> = 1.4367135f;
template <>
constexpr float kFactor<float16, Nf4> = 1.3661925f;
template <>
constexpr float kFactor<bfloat16, Af4> = 1.7892965f;
template <>
constexpr float kFactor<float16, Af4> = 1.7665435f;
template <typename T>
constexpr float kFactor<T, Fp4> = 12.0f;  // exact in both types

/// One over the factor of a codebook.
template <typename T>
__device__ __forceinline__ float inverse_factor(int codebook) {
    return with_codebook(codebook, [&]<typename Codebook>(Codebook) { return 1.0f / kFactor<T, Codebook>; });
}

/// Absmax of blocks in two steps, so that the memory latency of the first can be hidden. Elements are counted
/// from `first_element`, in the type that the caller counts in.
template <bool kNested>
class BlockScales {
 public:
    using Raw = std::conditional_t<kNested, uint32_t, float>;

    /// Nested: fills `map` [256]; the caller puts a barrier before the first `decode`.
    template <typename Params>
    __device__ __forceinline__ BlockScales(const Params& p, int64_t first_element, float* map)
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
