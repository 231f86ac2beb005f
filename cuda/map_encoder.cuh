// Encoders of 256-entry maps: a value to the code of the nearest entry. One look-up per element for the
// signed dynamic map and for every map whose entries are not too close together, a search in eight steps for
// the rest. Rule: code = number of k with y > threshold[k]; a threshold is the midpoint of its neighbours, or
// the float below where a tie goes up, which it does to even codes.
#pragma once
#include <cstdint>
#include "codebook.cuh"
#include "pack.cuh"
#include "reduce.cuh"

/// |y| of a scaled element stays below this, even where the reciprocal of its block is subnormal: 1 + 2^-21.
constexpr uint32_t kUnitLimit = 0x3f800004u;

// ------------------------------------------------------------------------------------- signed dynamic map

/// Look-up table of the magnitudes of the signed dynamic map: the code of a >= 0 is the top byte of `bits(u)
/// + entry`, u = a + kOrigin.
///
/// Buckets are the leading bits of u, 64 to an octave. One holds at most one threshold t, and the entry of one
/// that begins in code c is (c << 24) + 2^24 - 1 - bits(t + kOrigin): adding bits(u) carries into the top byte
/// exactly when a > t. kOrigin gives every a a bucket, by an addition: the pipe of maxima is the busier one.
///
/// Codes 127 - c and 127 + c have mirrored midpoints and, as ties go to even codes, mirrored ties, so the
/// magnitudes 0..128 serve both signs; only 128 (the value 1) has no negative.
struct DynamicTable {
    static constexpr int kShift = 17;
    static constexpr float kOrigin = 0x1p-22f;  // below the smallest threshold
    static constexpr uint32_t kFirstBucket = std::bit_cast<uint32_t>(kOrigin) >> kShift,
                              kLastBucket = (kUnitLimit + 2) >> kShift;
    static constexpr int kNum = int(kLastBucket - kFirstBucket) + 1;
    static constexpr int kPadded = (kNum + 3) / 4 * 4;  // whole sixteen-byte vectors

    alignas(16) uint32_t entry[kPadded];
};

/// Bits of the largest a that keeps magnitude c.
constexpr uint32_t dynamic_threshold(int c) {
    const int code = DynamicMap::kZeroCode + c;
    const float sum = from_bits(DynamicMap::kValueBits[code]) + from_bits(DynamicMap::kValueBits[code + 1]);
    return std::bit_cast<uint32_t>(sum * 0.5f) - uint32_t(code % 2);
}
/// Bits of u for the float with these bits, rounded as the encoder does: the sum is exact in double.
constexpr uint32_t dynamic_shifted(uint32_t bits) {
    return std::bit_cast<uint32_t>(float(double(from_bits(bits)) + DynamicTable::kOrigin));
}
constexpr int kDynamicThresholds = 128;
/// An addition that rounds must not carry what lies above a threshold onto it.
constexpr bool dynamic_thresholds_stay_apart() {
    for (int c = 0; c < kDynamicThresholds; ++c)
        if (dynamic_shifted(dynamic_threshold(c) + 1) == dynamic_shifted(dynamic_threshold(c))) return false;
    return true;
}
static_assert(dynamic_thresholds_stay_apart(), "u must tell every threshold from the float above it");
constexpr DynamicTable dynamic_table() {
    DynamicTable t{};
    int c = 0;  // thresholds below the bucket
    for (int e = 0; e < DynamicTable::kNum; ++e) {
        const uint32_t bucket = DynamicTable::kFirstBucket + uint32_t(e);
        const uint32_t next = c < kDynamicThresholds ? dynamic_shifted(dynamic_threshold(c)) : ~0u;
        const bool inside = next >> DynamicTable::kShift == bucket;
        t.entry[e] =
            (uint32_t(c) << 24) + (inside ? 0x00ffffffu - next : 0u - (bucket << DynamicTable::kShift));
        c += inside;
    }
    return t;
}
static_assert((dynamic_table().entry[DynamicTable::kNum - 1] + std::bit_cast<uint32_t>(1.0f)) >> 24 ==
                  kDynamicThresholds,
              "each bucket must hold at most one threshold");
__device__ const DynamicTable kDynamicTable = dynamic_table();

/// Codes of the signed dynamic map. One copy of the table for all lanes: 16 or 32 copies side by side were
/// slower.
struct DynamicEncoder {
    const uint32_t* table;  // [DynamicTable::kPadded] shared memory

    __device__ __forceinline__ uint32_t magnitude(float y) const {
        const uint32_t u = __float_as_uint(__fadd_rn(fabsf(y), DynamicTable::kOrigin));
        return u + table[int(u >> DynamicTable::kShift) - int(DynamicTable::kFirstBucket)];
    }

    /// Codes of four elements; `signs` holds 0xff for each that is negative. -0 may count as either.
    __device__ __forceinline__ uint32_t operator()(const float (&y)[4], uint32_t signs) const {
        const uint32_t c =
            gather_bytes<3>(magnitude(y[0]), magnitude(y[1]), magnitude(y[2]), magnitude(y[3]));
        const uint32_t is_128 = permute_bytes(c, c, 0xba98);
        const uint32_t negative = (c ^ 0x7f7f7f7fu) & ~is_128;  // 127 - min(c, 127)
        const uint32_t positive = c + 0x7f7f7f7fu;
        return (signs & negative) | (~signs & positive);
    }
};

// ------------------------------------------------------------------------------------- any map

/// The float below x, which is no NaN.
__device__ __forceinline__ float float_below(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x == 0.0f) return __uint_as_float(0x80000001u);
    return __uint_as_float(x > 0.0f ? bits - 1 : bits + 1);
}
__device__ __forceinline__ float map_midpoint(const float* map, int k) {
    return __fmul_rn(__fadd_rn(__ldg(map + k), __ldg(map + k + 1)), 0.5f);
}
/// Threshold between codes k and k + 1: the lower end of equal midpoints decides for all of them.
__device__ __forceinline__ float map_threshold(const float* map, int k) {
    const float mid = map_midpoint(map, k);
    const bool tie_goes_up =
        k % 2 == 1 && __ldg(map + k) != __ldg(map + k + 1) && map_midpoint(map, k - 1) != mid;
    return tie_goes_up ? float_below(mid) : mid;
}

/// Any ascending map, in eight steps. Threshold k stands at position k + k / 32, so that what the lanes may
/// read in one of the first six steps lies in different banks.
struct SearchEncoder {
    static __device__ constexpr int position(int k) { return k + k / 32; }

    const float* threshold;  // [position(255)] shared memory

    __device__ __forceinline__ uint32_t code(float y) const {
        int at = 0;  // position of the code
        #pragma unroll
        for (int step = 128; step > 0; step /= 2)
            at += y > threshold[at + position(step - 1)] ? position(step) : 0;
        return uint32_t(at - at / position(32));
    }
    __device__ __forceinline__ uint32_t operator()(const float (&y)[4], uint32_t) const {
        return gather_bytes<0>(code(y[0]), code(y[1]), code(y[2]), code(y[3]));
    }
};

/// Maps with at most one threshold in each bucket of equal leading float bits: the method of DynamicTable,
/// with a table of its own for y > split and for the others, where codes are counted down from 255.
struct BucketEncoder {
    /// The elements on one side of `split`.
    struct Side {
        uint32_t first;  // bits at which the first bucket begins; smaller magnitudes belong to it too
        int offset;      // of bucket 0 in the table
    };

    const uint32_t* table;  // [num_buckets] shared memory
    int shift;              // mantissa bits that a bucket leaves free
    Side above, below;
    float split;     // 0, or the float below where a threshold lies there
    uint32_t limit;  // |y| must not exceed the float with these bits
    bool usable;     // false: too many buckets, or two thresholds in one

    __device__ __forceinline__ uint32_t operator()(const float (&y)[4], uint32_t) const {
        uint32_t sum[4], down = 0;
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool up = y[i] > split;
            const float first = __uint_as_float(up ? above.first : below.first);
            const uint32_t bits = __float_as_uint(fmaxf(fabsf(y[i]), first));
            sum[i] = bits + table[int(bits >> shift) + (up ? above.offset : below.offset)];
            down |= up ? 0u : 0xffu << (8 * i);
        }
        return gather_bytes<3>(sum[0], sum[1], sum[2], sum[3]) ^ down;
    }
};

/// Threads of a CTA that encodes: the tables are built with one thread for each map entry.
constexpr int kEncoderThreads = 256;

/// Shared memory of the encoders.
struct MapTables {
    static constexpr int kCapacity = 4096;  // buckets: 32 octaves of 64 on both sides of 0, or of 128 on one

    alignas(16) uint32_t entry[kCapacity];
    float threshold[SearchEncoder::position(255)];
    uint32_t key[255];                            // largest bits(|y|) that does not cross the threshold
    uint32_t reduction[4][kEncoderThreads / 32];  // each used once
};

/// Fills the table of DynamicEncoder and tells if it is right for `map` [256]. It is filled before that is
/// known, so that all requests are in flight at once. All threads of the CTA must call.
__device__ __forceinline__ bool fill_dynamic_table(MapTables& tables, const float* map) {
    constexpr int kVectors = DynamicTable::kPadded / 4,
                  kPerThread = (kVectors + kEncoderThreads - 1) / kEncoderThreads;
    const int i = threadIdx.x;
    uint4 entries[kPerThread];
    #pragma unroll
    for (int j = 0; j < kPerThread; ++j)
        entries[j] = __ldg(reinterpret_cast<const uint4*>(kDynamicTable.entry) +
                           ::min(i + j * kEncoderThreads, kVectors - 1));
    const bool equal = __float_as_uint(__ldg(map + i)) == __float_as_uint(__ldg(kDynamicMap.value + i));
    #pragma unroll
    for (int j = 0; j < kPerThread; ++j)
        if (i + j * kEncoderThreads < kVectors)
            reinterpret_cast<uint4*>(tables.entry)[i + j * kEncoderThreads] = entries[j];
    return uniform(__syncthreads_and(equal));
}

/// The thresholds on one side of the split, in the order of magnitudes, and their buckets.
struct SideKeys {
    const uint32_t* key;  // [num] `stride` apart
    int stride;           // 1 or -1
    int num;              // thresholds that can be crossed
    int total;            // and those beyond the limit
    uint32_t low;         // number of the first bucket among all of that width
    uint32_t num_buckets;

    __device__ __forceinline__ uint32_t operator[](int i) const { return key[i * stride]; }
    /// Leading bits that thresholds i and i + 1 share; 32 if they are equal.
    __device__ __forceinline__ uint32_t common_bits(int i) const {
        return i + 1 < num ? uint32_t(__clz(int((*this)[i] ^ (*this)[i + 1]))) : 0;
    }
    __device__ __forceinline__ void set_width(int shift, uint32_t limit) {
        low = (num ? ::min((*this)[0], limit) : limit) >> shift;
        num_buckets = (limit >> shift) - low + 1;
    }
    /// Each of `num_threads` threads fills a run of buckets, of odd length so that their stores fall on
    /// different banks.
    __device__ __forceinline__ void fill(uint32_t* entry, int shift, int thread, int num_threads) const {
        const int run = (int(num_buckets) + num_threads - 1) / num_threads | 1;
        const int begin = thread * run, end = ::min(begin + run, int(num_buckets));
        int i = 0;  // thresholds below the bucket
        #pragma unroll
        for (int step = 128; step > 0; step /= 2)
            if (i + step <= num && ((*this)[i + step - 1] >> shift) < low + begin) i += step;
        constexpr uint32_t kNone = ~0u;
        uint32_t next = i < num ? (*this)[i] : kNone;
        for (int b = begin; b < end; ++b) {
            const bool inside = next >> shift == low + b;
            const uint32_t code = uint32_t(255 - total + i) << 24;
            entry[b] = code + (inside ? 0x00ffffffu - next : 0u - ((low + b) << shift));
            if (inside) next = ++i < num ? (*this)[i] : kNone;
        }
    }
};

/// How many thresholds of a map lie where, in nine bits each, so that a CTA adds all of them up at once.
struct ThresholdCounts {
    uint32_t word[2];

    __device__ __forceinline__ ThresholdCounts(float t, uint32_t key, uint32_t limit)
        : word{packed(t < 0.0f, t == 0.0f, t > 0.0f),
               packed(t == float_below(0.0f), t < 0.0f && key < limit, t > 0.0f && key < limit)} {}
    __device__ __forceinline__ int negative() const { return field(word[0], 0); }
    __device__ __forceinline__ int zero() const { return field(word[0], 1); }
    __device__ __forceinline__ int positive() const { return field(word[0], 2); }
    __device__ __forceinline__ int below_zero() const { return field(word[1], 0); }
    __device__ __forceinline__ int used_negative() const { return field(word[1], 1); }
    __device__ __forceinline__ int used_positive() const { return field(word[1], 2); }

 private:
    static constexpr int kBits = 9;
    static __device__ __forceinline__ uint32_t packed(bool a, bool b, bool c) {
        return uint32_t(a) | uint32_t(b) << kBits | uint32_t(c) << (2 * kBits);
    }
    static __device__ __forceinline__ int field(uint32_t word, int i) {
        return int(word >> (i * kBits) & ((1u << kBits) - 1));
    }
};

/// Thresholds of any ascending map [256], for SearchEncoder too, and their buckets. kUnit: |y| stays below
/// kUnitLimit; otherwise the limit lies above all thresholds. An unsorted map gives meaningless tables, in
/// bounds. All threads of the CTA must call, after a barrier.
template <bool kUnit>
__device__ __forceinline__ BucketEncoder fill_bucket_table(MapTables& tables, const float* map) {
    const int k = threadIdx.x;
    const bool exists = k < 255;
    const float t = exists ? map_threshold(map, k) : __uint_as_float(kNanBits);
    const uint32_t magnitude = exists ? __float_as_uint(fabsf(t)) : 0,
                   key = t < 0.0f ? magnitude - 1 : magnitude;
    if (exists) {
        tables.threshold[SearchEncoder::position(k)] = t;
        tables.key[k] = key;
    }
    const uint32_t limit =
        kUnit ? kUnitLimit
              : ::min(max_over_cta<kEncoderThreads>(magnitude, tables.reduction[0]) + 1, kInfinityBits);

    // A tie at 0 that goes up leaves its threshold just below 0, where no bucket can part it from 0: it
    // becomes the split.
    ThresholdCounts count(t, key, limit);
    sum_over_cta<kEncoderThreads>(count.word, tables.reduction[1]);
    const int num_split = count.zero() ? 0 : count.below_zero(), num_below = count.negative() - num_split;
    SideKeys above{tables.key + 255 - count.positive(), 1, count.used_positive(), count.positive()};
    SideKeys below{tables.key + num_below - 1, -1, count.used_negative() - num_split, num_below};

    // Buckets are as wide as the closest pair of thresholds allows: they leave free the highest bit in which
    // the two differ, and what is below it.
    constexpr int kWidest = 23, kWarps = kEncoderThreads / 32;
    const uint32_t common =
        max_over_cta<kEncoderThreads>(::max(above.common_bits(k), below.common_bits(k)), tables.reduction[3]);
    const int shift = ::max(::min(31 - int(common), kWidest), 0);
    above.set_width(shift, limit);
    below.set_width(shift, limit);
    const uint32_t num_buckets = above.num_buckets + below.num_buckets;
    const bool usable = uniform(common < 32 && num_buckets <= MapTables::kCapacity);
    if (usable) {  // each warp works for one side, about as many of them as the side has buckets
        const int warps_above = ::min(::max(int(above.num_buckets * kWarps / num_buckets), 1), kWarps - 1);
        const int split_thread = warps_above * 32;
        if (k < split_thread)
            above.fill(tables.entry, shift, k, split_thread);
        else
            below.fill(tables.entry + above.num_buckets, shift, k - split_thread,
                       kEncoderThreads - split_thread);
    }
    __syncthreads();
    return {tables.entry,
            shift,
            {above.low << shift, -int(above.low)},
            {below.low << shift, int(above.num_buckets) - int(below.low)},
            num_split ? float_below(0.0f) : 0.0f,
            limit,
            usable};
}
