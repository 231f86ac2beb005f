// The code values NF4, FP4, AF4 and the signed dynamic 8-bit map, with the decision thresholds and look-ups
// of 4-bit codes. NF4: Dettmers et al., QLoRA, arXiv:2305.14314, section 3. FP4: sign, two exponent bits, one
// mantissa bit, scaled to 1. AF4: Yoshida, NF4 Isn't Information Theoretically Optimal (and that's Good),
// arXiv:2306.06965. Dynamic map: Dettmers, 8-bit Approximations for Parallelism in Deep Learning,
// arXiv:1511.04561, section 2.
#pragma once
#include <bit>
#include <cstdint>

constexpr float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
constexpr float kNoThreshold = from_bits(0x7f800000u);

/// One of 32 equal buckets of [-1, 1]. A bucket holds at most one threshold, so one comparison settles the
/// code.
struct alignas(8) Bucket {
    float threshold;  // compared(y) > threshold picks code + 1; +Inf where the bucket holds none
    uint32_t code;    // below the threshold
};
struct BucketTable {
    Bucket bucket[32];
};

/// Bucket of y before the offset of 16: floor(y * scale), exact in double for every float threshold.
constexpr int bucket_of(float y, float scale) {
    const double p = double(y) * double(scale);
    const int i = int(p);
    return double(i) > p ? i - 1 : i;
}

/// Bucket table of codes that are counted by ascending thresholds.
template <int kNum>
constexpr BucketTable count_buckets(const float (&threshold)[kNum], float scale) {
    BucketTable t{};
    for (Bucket& b : t.bucket) b = {kNoThreshold, 0};
    for (float value : threshold) {
        const int b = bucket_of(value, scale) + 16;
        t.bucket[b].threshold = value;
        for (int i = b + 1; i < 32; ++i) ++t.bucket[i].code;
    }
    return t;
}
template <int kNum>
constexpr bool one_threshold_per_bucket(const float (&threshold)[kNum], float scale) {
    for (int k = 1; k < kNum; ++k)
        if (bucket_of(threshold[k], scale) == bucket_of(threshold[k - 1], scale)) return false;
    return true;
}

/// The fifteen midpoints of a table, ascending in `sign * value`.
struct Thresholds {
    float value[15];
};
constexpr Thresholds midpoints(const uint32_t (&value_bits)[16], float sign) {
    Thresholds t{};
    for (int k = 0; k < 15; ++k)
        t.value[k] = sign * ((from_bits(value_bits[k]) + from_bits(value_bits[k + 1])) * 0.5f);
    return t;
}

struct Nf4 {
    static constexpr float kScale = 15.5f;             // buckets per unit
    static constexpr uint32_t kZeroWord = 0x77777777;  // eight codes of 0.0
    static constexpr uint32_t kValueBits[16] = {
        0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000,
        0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000};
    /// Threshold k separates codes k and k + 1.
    static constexpr Thresholds kThresholds = midpoints(kValueBits, 1.0f);
    static_assert(one_threshold_per_bucket(kThresholds.value, kScale), "one comparison must settle a bucket");

    static constexpr BucketTable buckets() { return count_buckets(kThresholds.value, kScale); }
    /// What a threshold is compared with: y itself, since the codes ascend.
    static __device__ __forceinline__ float compared(float y) { return y; }
    /// Eight codes found by the search are the codes.
    static __device__ __forceinline__ uint32_t finish(uint32_t codes) { return codes; }
};

/// The values descend, so the code counts the thresholds above y: everything is mirrored.
struct Af4 {
    static constexpr float kScale = -15.5f;
    static constexpr uint32_t kZeroWord = 0x88888888;  // eight codes of 0.0
    static constexpr uint32_t kValueBits[16] = {
        0x3f800000, 0x3f39685c, 0x3f0e1203, 0x3ed9ed55, 0x3ea22dee, 0x3e60e22a, 0x3e0472f9, 0x3d2f075f,
        0x00000000, 0xbd4a2141, 0xbe196bab, 0xbe831c55, 0xbebf54f7, 0xbf032f19, 0xbf31c4dc, 0xbf800000};
    /// -y above threshold k separates codes k and k + 1.
    static constexpr Thresholds kThresholds = midpoints(kValueBits, -1.0f);
    static_assert(one_threshold_per_bucket(kThresholds.value, -kScale),
                  "one comparison must settle a bucket");

    static constexpr BucketTable buckets() { return count_buckets(kThresholds.value, -kScale); }
    static __device__ __forceinline__ float compared(float y) { return -y; }
    static __device__ __forceinline__ uint32_t finish(uint32_t codes) { return codes; }
};

struct Fp4 {
    static constexpr float kScale = 15.0f;
    static constexpr uint32_t kZeroWord = 0x00000000;  // eight codes of 0.0
    static constexpr uint32_t kValueBits[16] = {
        0x00000000, 0x3baaaaab, 0x3f2aaaab, 0x3f800000, 0x3eaaaaab, 0x3f000000, 0x3e2aaaab, 0x3e800000,
        0x80000000, 0xbbaaaaab, 0xbf2aaaab, 0xbf800000, 0xbeaaaaab, 0xbf000000, 0xbe2aaaab, 0xbe800000};
    /// Threshold r separates the magnitudes of ranks r and r + 1: bitsandbytes' constants, some of which are
    /// a few ulp beside the midpoints.
    static constexpr float kThresholds[7] = {
        from_bits(0x3b2aaab9), from_bits(0x3db00000), from_bits(0x3e555555), from_bits(0x3e955555),
        from_bits(0x3ed55556), from_bits(0x3f155550), from_bits(0x3f555555)};
    static_assert(one_threshold_per_bucket(kThresholds, kScale), "one comparison must settle a bucket");

    /// A bucket's code is the sign in bit 3 and the rank of its magnitude. Zero is an edge between two
    /// buckets, and the search rounds y * scale downwards, so that -0 falls on the positive side and the
    /// least negative y does not.
    static constexpr BucketTable buckets() {
        BucketTable t{};
        for (int i = 0; i < 32; ++i) {
            const int magnitude = i < 16 ? 15 - i : i - 16;  // |y| * scale lies in [magnitude, magnitude + 1]
            t.bucket[i] = {kNoThreshold, i < 16 ? 8u : 0u};
            for (float value : kThresholds) {
                const int b = bucket_of(value, kScale);
                if (b == magnitude) t.bucket[i].threshold = value;
                t.bucket[i].code += b < magnitude;
            }
        }
        return t;
    }
    static __device__ __forceinline__ float compared(float y) { return fabsf(y); }
    /// Ranks 0..7 are the codes 0 1 6 7 4 5 2 3: bit 2 of the code is bit 2 of the rank xor its bit 1.
    static __device__ __forceinline__ uint32_t finish(uint32_t ranks) {
        return ranks ^ ((ranks & 0x22222222u) << 1);
    }
};

template <typename Codebook>
__device__ const BucketTable kBuckets = Codebook::buckets();

/// Code search without memory: lane i of the warp keeps bucket i. Eight issue slots per element with unpack
/// and pack.
template <typename Codebook>
struct CodeSearch {
    float threshold;
    uint32_t code;

    __device__ __forceinline__ explicit CodeSearch(int lane)
        : threshold(kBuckets<Codebook>.bucket[lane].threshold), code(kBuckets<Codebook>.bucket[lane].code) {}

    /// Code of y, |y| <= 1 + 2^-21. Every lane of the warp must call.
    __device__ __forceinline__ uint32_t operator()(float y) const {
        // 2^23 + 16 + floor(y * scale): the bucket stands in the low five bits, which is all that SHFL reads
        const int bucket = __float_as_int(__fmaf_rd(y, Codebook::kScale, 8388608.0f + 16.0f));
        const float t = __shfl_sync(0xffffffffu, threshold, bucket);
        const uint32_t c = __shfl_sync(0xffffffffu, code, bucket);
        return c + (__float_as_uint(t - Codebook::compared(y)) >> 31);  // the difference is exact in sign
    }
};

struct ValueTable {
    float value[16];
};
template <typename Codebook>
constexpr ValueTable values_of() {
    ValueTable t{};
    for (int i = 0; i < 16; ++i) t.value[i] = from_bits(Codebook::kValueBits[i]);
    return t;
}
template <typename Codebook>
__device__ const ValueTable kValues = values_of<Codebook>();

/// Code to value without memory: lanes i and i + 16 keep value i.
template <typename Codebook>
struct CodeValue {
    float value;

    __device__ __forceinline__ explicit CodeValue(int lane) : value(kValues<Codebook>.value[lane & 15]) {}

    /// Value of the code in the low four bits; the bits above are ignored. Every lane of the warp must call.
    __device__ __forceinline__ float operator()(uint32_t code) const {
        return __shfl_sync(0xffffffffu, value, int(code));
    }
};

/// The signed dynamic 8-bit map, ascending.
struct DynamicMap {
    static constexpr int kZeroCode = 127;
    static constexpr uint32_t kValueBits[256] = {
        0xbf7e3333, 0xbf7a999a, 0xbf770000, 0xbf736666, 0xbf6fcccd, 0xbf6c3333, 0xbf68999a, 0xbf650000,
        0xbf616666, 0xbf5dcccd, 0xbf5a3333, 0xbf56999a, 0xbf530000, 0xbf4f6666, 0xbf4bcccd, 0xbf483333,
        0xbf44999a, 0xbf410000, 0xbf3d6666, 0xbf39cccd, 0xbf363334, 0xbf32999a, 0xbf2f0000, 0xbf2b6666,
        0xbf27cccd, 0xbf243334, 0xbf20999a, 0xbf1d0000, 0xbf196666, 0xbf15cccd, 0xbf123334, 0xbf0e999a,
        0xbf0b0000, 0xbf076666, 0xbf03cccc, 0xbf003333, 0xbef93332, 0xbef20000, 0xbeeacccc, 0xbee3999a,
        0xbedc6666, 0xbed53333, 0xbece0000, 0xbec6cccc, 0xbebf999a, 0xbeb86666, 0xbeb13333, 0xbeaa0000,
        0xbea2cccc, 0xbe9b999a, 0xbe946666, 0xbe8d3334, 0xbe860000, 0xbe7d9999, 0xbe6f3333, 0xbe60cccd,
        0xbe526666, 0xbe440000, 0xbe35999a, 0xbe273333, 0xbe18cccd, 0xbe0a6666, 0xbdf80000, 0xbddb3334,
        0xbdc9eb85, 0xbdc428f7, 0xbdbe6667, 0xbdb8a3d7, 0xbdb2e148, 0xbdad1eb8, 0xbda75c2a, 0xbda1999a,
        0xbd9bd70a, 0xbd96147b, 0xbd9051eb, 0xbd8a8f5d, 0xbd84cccd, 0xbd7e147b, 0xbd728f5d, 0xbd670a3d,
        0xbd5b851f, 0xbd500000, 0xbd447ae1, 0xbd38f5c3, 0xbd2d70a3, 0xbd21eb85, 0xbd166667, 0xbd0ae148,
        0xbcfeb852, 0xbce7ae15, 0xbcd0a3d7, 0xbcb9999a, 0xbca28f5d, 0xbc8b851f, 0xbc68f5c3, 0xbc3ae148,
        0xbc1f3b64, 0xbc160418, 0xbc0ccccd, 0xbc039581, 0xbbf4bc6a, 0xbbe24dd3, 0xbbcfdf3b, 0xbbbd70a4,
        0xbbab020d, 0xbb989374, 0xbb8624dd, 0xbb676c8a, 0xbb428f5c, 0xbb1db22d, 0xbaf1a9fc, 0xbaa7ef9d,
        0xba7765ff, 0xba59e83e, 0xba3c6a80, 0xba1eecc1, 0xba016f01, 0xb9c7e283, 0xb98ce705, 0xb923d70b,
        0xb8ba1f4b, 0xb88aefb3, 0xb8378034, 0xb7b24206, 0xb70205ff, 0xb65a1a94, 0xb513a3b7, 0x00000000,
        0x3513a3b7, 0x365a1a94, 0x370205ff, 0x37b24206, 0x38378034, 0x388aefb3, 0x38ba1f4b, 0x3923d70b,
        0x398ce705, 0x39c7e283, 0x3a016f01, 0x3a1eecc1, 0x3a3c6a80, 0x3a59e83e, 0x3a7765ff, 0x3aa7ef9d,
        0x3af1a9fc, 0x3b1db22d, 0x3b428f5c, 0x3b676c8a, 0x3b8624dd, 0x3b989374, 0x3bab020d, 0x3bbd70a4,
        0x3bcfdf3b, 0x3be24dd3, 0x3bf4bc6a, 0x3c039581, 0x3c0ccccd, 0x3c160418, 0x3c1f3b64, 0x3c3ae148,
        0x3c68f5c3, 0x3c8b851f, 0x3ca28f5d, 0x3cb9999a, 0x3cd0a3d7, 0x3ce7ae15, 0x3cfeb852, 0x3d0ae148,
        0x3d166667, 0x3d21eb85, 0x3d2d70a3, 0x3d38f5c3, 0x3d447ae1, 0x3d500000, 0x3d5b851f, 0x3d670a3d,
        0x3d728f5d, 0x3d7e147b, 0x3d84cccd, 0x3d8a8f5d, 0x3d9051eb, 0x3d96147b, 0x3d9bd70a, 0x3da1999a,
        0x3da75c2a, 0x3dad1eb8, 0x3db2e148, 0x3db8a3d7, 0x3dbe6667, 0x3dc428f7, 0x3dc9eb85, 0x3ddb3334,
        0x3df80000, 0x3e0a6666, 0x3e18cccd, 0x3e273333, 0x3e35999a, 0x3e440000, 0x3e526666, 0x3e60cccd,
        0x3e6f3333, 0x3e7d9999, 0x3e860000, 0x3e8d3334, 0x3e946666, 0x3e9b999a, 0x3ea2cccc, 0x3eaa0000,
        0x3eb13333, 0x3eb86666, 0x3ebf999a, 0x3ec6cccc, 0x3ece0000, 0x3ed53333, 0x3edc6666, 0x3ee3999a,
        0x3eeacccc, 0x3ef20000, 0x3ef93332, 0x3f003333, 0x3f03cccc, 0x3f076666, 0x3f0b0000, 0x3f0e999a,
        0x3f123334, 0x3f15cccd, 0x3f196666, 0x3f1d0000, 0x3f20999a, 0x3f243334, 0x3f27cccd, 0x3f2b6666,
        0x3f2f0000, 0x3f32999a, 0x3f363334, 0x3f39cccd, 0x3f3d6666, 0x3f410000, 0x3f44999a, 0x3f483333,
        0x3f4bcccd, 0x3f4f6666, 0x3f530000, 0x3f56999a, 0x3f5a3333, 0x3f5dcccd, 0x3f616666, 0x3f650000,
        0x3f68999a, 0x3f6c3333, 0x3f6fcccd, 0x3f736666, 0x3f770000, 0x3f7a999a, 0x3f7e3333, 0x3f800000};
};

struct MapTable {
    float value[256];
};
constexpr MapTable dynamic_map_values() {
    MapTable t{};
    for (int i = 0; i < 256; ++i) t.value[i] = from_bits(DynamicMap::kValueBits[i]);
    return t;
}
/// The map in memory: what a null pointer in place of a map means.
__device__ const MapTable kDynamicMap = dynamic_map_values();
