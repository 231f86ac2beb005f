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

/// Look-up table of the magnitudes of the signed dynamic map: the code of a >= 0 is the top byte of `bits(a)
/// + entry`.
///
/// A bucket is the exponent and the first six mantissa bits of a. Midpoints are further apart than that, so a
/// bucket that begins in code c holds at most one threshold t, and its entry is (c << 24) + 2^24 - 1 -
/// bits(t): adding bits(a) carries into the top byte exactly when a > t. Codes 127 - c and 127 + c have
/// mirrored midpoints and, as ties go to even codes, mirrored ties, so the magnitudes 0..128 serve both
/// signs; only 128 (the value 1) has no negative.
struct DynamicTable {
    static constexpr int kShift = 17;
    static constexpr uint32_t kFirstBits = 0x34800000;  // below the smallest threshold
    static constexpr int kNum = int((0x3f800000u - kFirstBits) >> kShift) + 1;  // the last bucket begins at 1
    static constexpr int kPadded = (kNum + 3) / 4 * 4;                          // whole sixteen-byte vectors

    alignas(16) uint32_t entry[kPadded];
};

/// Bits of the largest a that keeps magnitude c.
constexpr uint32_t dynamic_threshold(int c) {
    const int code = DynamicMap::kZeroCode + c;
    const float sum = from_bits(DynamicMap::kValueBits[code]) + from_bits(DynamicMap::kValueBits[code + 1]);
    return std::bit_cast<uint32_t>(sum * 0.5f) - uint32_t(code % 2);
}
constexpr DynamicTable dynamic_table() {
    constexpr int kNumThresholds = 128;
    DynamicTable t{};
    int c = 0;  // thresholds below the bucket
    for (int e = 0; e < DynamicTable::kNum; ++e) {
        const uint32_t low = DynamicTable::kFirstBits + (uint32_t(e) << DynamicTable::kShift);
        const uint32_t high = low + (1u << DynamicTable::kShift);
        const uint32_t next = c < kNumThresholds ? dynamic_threshold(c) : ~0u;
        const bool inside = next < high;
        t.entry[e] = (uint32_t(c) << 24) + (inside ? 0x00ffffffu - next : 0u - low);
        c += inside;
    }
    return t;
}
__device__ const DynamicTable kDynamicTable = dynamic_table();

/// Codes of the signed dynamic map. One copy of the table for all lanes: a read takes about 3.4 wavefronts,
/// which the load-store unit has to spare; 16 or 32 copies side by side were slower.
struct DynamicEncoder {
    const uint32_t* table;  // [DynamicTable::kPadded] shared memory

    __device__ __forceinline__ uint32_t magnitude(float y) const {
        constexpr uint32_t kFirst = DynamicTable::kFirstBits;
        const uint32_t bits = __float_as_uint(fmaxf(fabsf(y), __uint_as_float(kFirst)));
        return bits + table[int(bits >> DynamicTable::kShift) - int(kFirst >> DynamicTable::kShift)];
    }

    /// Codes of four elements; `signs` holds 0xff for each that is negative. -0 may count as either.
    __device__ __forceinline__ uint32_t operator()(const float (&y)[4], uint32_t signs) const {
        const uint32_t c =
            gather_bytes<3>(magnitude(y[0]), magnitude(y[1]), magnitude(y[2]), magnitude(y[3]));
        const uint32_t negative = (c - ((c >> 7) & 0x01010101u)) ^ 0x7f7f7f7fu;  // 127 - min(c, 127)
        const uint32_t positive = c + 0x7f7f7f7fu;
        return (signs & negative) | (~signs & positive);
    }
    __device__ __forceinline__ uint32_t zero_word() const { return DynamicMap::kZeroCode * 0x01010101u; }
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

/// Any ascending map, in eight steps.
struct SearchEncoder {
    const float* threshold;  // [255] shared memory
    int zero_code;

    __device__ __forceinline__ uint32_t code(float y) const {
        int c = 0;
        #pragma unroll
        for (int step = 128; step > 0; step /= 2) c += y > threshold[c + step - 1] ? step : 0;
        return uint32_t(c);
    }
    __device__ __forceinline__ uint32_t operator()(const float (&y)[4], uint32_t) const {
        return gather_bytes<0>(code(y[0]), code(y[1]), code(y[2]), code(y[3]));
    }
    __device__ __forceinline__ uint32_t zero_word() const { return uint32_t(zero_code) * 0x01010101u; }
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
    float split;  // 0, or the float below where a threshold lies there
    int zero_code;
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
    __device__ __forceinline__ uint32_t zero_word() const { return uint32_t(zero_code) * 0x01010101u; }
};

/// Shared memory of the encoders.
struct MapTables {
    static constexpr int kCapacity = 4096;  // buckets: 32 octaves of 64 on both sides of 0, or of 128 on one

    alignas(16) uint32_t entry[kCapacity];
    float threshold[255];
    uint32_t key[255];  // largest bits(|y|) that does not cross the threshold
    uint32_t warp_max[3][8];
};

/// Threads of a CTA that encodes: the tables are built with one thread for each map entry.
constexpr int kEncoderThreads = 256;

/// Fills the table of DynamicEncoder and tells if it is right for `map` [256]. It is filled before that is
/// known, so that both requests are in flight at once. All threads of the CTA must call.
__device__ __forceinline__ bool fill_dynamic_table(MapTables& tables, const float* map) {
    const uint4* const source = reinterpret_cast<const uint4*>(kDynamicTable.entry);
    const int i = threadIdx.x;
    const bool equal = __float_as_uint(__ldg(map + i)) == __float_as_uint(kDynamicMap.value[i]);
    for (int e = i; e < DynamicTable::kPadded / 4; e += kEncoderThreads)
        reinterpret_cast<uint4*>(tables.entry)[e] = __ldg(source + e);
    return __syncthreads_and(equal);
}

/// The thresholds on one side of the split, in the order of magnitudes, and where their buckets begin.
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
    /// A run of buckets begins with the one that holds a threshold; a warp fills one run.
    __device__ __forceinline__ void fill(uint32_t* entry, int shift) const {
        for (int run = threadIdx.x / 32; run < ::max(num, 1); run += kEncoderThreads / 32) {
            const uint32_t code = uint32_t(255 - total + run), here = num ? (*this)[run] : 0;
            const uint32_t begin = num ? (here >> shift) - low : 0;
            const uint32_t end =
                run + 1 < num ? ::min(((*this)[run + 1] >> shift) - low, num_buckets) : num_buckets;
            for (uint32_t b = begin + threadIdx.x % 32; b < end; b += 32)
                entry[b] = num && b == begin ? (code << 24) + 0x00ffffffu - here
                                             : ((code + (num ? 1 : 0)) << 24) - ((low + b) << shift);
        }
    }
};

/// Thresholds of any ascending map [256], for SearchEncoder too, and their buckets. kUnit: |y| stays below
/// kUnitLimit; otherwise the limit lies above all thresholds. An unsorted map gives meaningless tables, in
/// bounds. All threads of the CTA must call, after a barrier.
template <bool kUnit>
__device__ __forceinline__ BucketEncoder fill_bucket_table(MapTables& tables, const float* map) {
    const int k = threadIdx.x;
    const bool exists = k < 255;
    const float t = exists ? map_threshold(map, k) : 0.0f;
    const uint32_t magnitude = __float_as_uint(fabsf(t)), key = t < 0.0f ? magnitude - 1 : magnitude;
    if (exists) {
        tables.threshold[k] = t;
        tables.key[k] = key;
    }
    const uint32_t limit =
        kUnit ? kUnitLimit
              : ::min(max_over_cta<kEncoderThreads>(magnitude, tables.warp_max[0]) + 1, kInfinityBits);

    // A tie at 0 that goes up leaves its threshold just below 0, where no bucket can part it from 0: it
    // becomes the split.
    const float below_zero = float_below(0.0f);
    const int zero_code = __syncthreads_count(t < 0.0f);
    const bool has_zero = __syncthreads_count(exists && t == 0.0f) > 0;
    const float split = !has_zero && __syncthreads_count(t == below_zero) > 0 ? below_zero : 0.0f;
    const int num_above = __syncthreads_count(t > 0.0f), num_below = __syncthreads_count(t < split);
    SideKeys above{tables.key + 255 - num_above, 1, __syncthreads_count(t > 0.0f && key < limit), num_above};
    SideKeys below{tables.key + num_below - 1, -1, __syncthreads_count(t < split && key < limit), num_below};

    // Buckets are as wide as the closest pair of thresholds allows: they leave free the highest bit in which
    // the two differ, and what is below it.
    constexpr int kWidest = 23;
    const uint32_t common =
        max_over_cta<kEncoderThreads>(::max(above.common_bits(k), below.common_bits(k)), tables.warp_max[1]);
    const int shift = ::max(::min(31 - int(common), kWidest), 0);
    above.set_width(shift, limit);
    below.set_width(shift, limit);
    const bool usable = common < 32 && above.num_buckets + below.num_buckets <= MapTables::kCapacity;
    if (usable) {
        above.fill(tables.entry, shift);
        below.fill(tables.entry + above.num_buckets, shift);
    }
    __syncthreads();
    return {tables.entry,
            shift,
            {above.low << shift, -int(above.low)},
            {below.low << shift, int(above.num_buckets) - int(below.low)},
            split,
            zero_code,
            limit,
            usable};
}
