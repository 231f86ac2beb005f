// The 256-entry maps and the scalar rules, on the host: what the kernels are checked against.
#pragma once
#include <array>
#include "codebook.cuh"
#include "harness.cuh"

using Map = std::vector<float>;

inline Map dynamic_map() {
    Map map;
    for (uint32_t bits : DynamicMap::kValueBits) map.push_back(from_bits(bits));
    return map;
}
inline Map unsigned_dynamic_map() {
    Map map = {0.0f, 1.0f};
    for (int i = 0; i < 7; ++i) {
        const int k = 2 << i;
        const float step = (1.0f - 0.1f) / float(k), decade = float(std::pow(10.0, i - 6));
        const auto edge = [&](int j) {
            return j < (k + 1) / 2 ? std::fmaf(step, float(j), 0.1f) : std::fmaf(-step, float(k - j), 1.0f);
        };
        for (int j = 0; j < k; ++j) map.push_back(decade * ((edge(j) + edge(j + 1)) * 0.5f));
    }
    std::sort(map.begin(), map.end());
    return map;
}
inline Map linear_map() {
    Map map;
    const float step = 2.0f / 254;
    for (int j = 0; j < 255; ++j)
        map.push_back(j < 127 ? std::fmaf(step, float(j), -1.0f) : std::fmaf(-step, float(254 - j), 1.0f));
    map.insert(map.begin() + 127, 0.0f);
    return map;
}
inline Map fp8_map(int exponent_bits, int mantissa_bits) {
    std::vector<double> values;
    const int bias = 1 << (exponent_bits - 1);
    for (int field = 0; field < 1 << exponent_bits; ++field)
        for (int m = 0; m < 1 << mantissa_bits; ++m) {
            const double f = double(m) / (1 << mantissa_bits);
            const double x = field == 0 ? std::ldexp(f, -bias) : std::ldexp(1 + f, bias + 1 - field);
            values.push_back(x);
            values.push_back(-x);
        }
    std::stable_sort(values.begin(), values.end());
    Map map(values.begin(), values.end());
    const float largest = map.back();
    for (float& x : map) x /= largest;
    return map;
}
/// The values of NF4 with zeros between them.
inline Map normal_map() {
    Map map(256, 0.0f);
    for (int i = 0; i < 7; ++i) map[i] = from_bits(Nf4::kValueBits[i]);
    for (int i = 0; i < 8; ++i) map[248 + i] = from_bits(Nf4::kValueBits[8 + i]);
    return map;
}
/// Thresholds too close for buckets: the search in eight steps.
inline Map crowded_map() {
    Map map;
    for (int i = 0; i < 256; ++i)
        map.push_back(i < 192 ? float(i - 128) / 128 : 0.5f + float(i - 192) * 0x1p-20f);
    return map;
}

/// Scale of a block by rule: absmax as stored, and its reciprocal or 0.
template <typename T>
std::pair<float, float> block_scale(const T* x, int64_t n) {
    float absmax = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float a = std::fabs(float(x[i]));
        if (std::isnan(a)) return {std::nanf(""), 0.0f};
        absmax = std::max(absmax, a);
    }
    if (absmax < 0x1p-126f) return {0.0f, 0.0f};
    return {absmax, std::isinf(absmax) ? 0.0f : 1.0f / absmax};
}

template <typename Codebook>
uint8_t code_of(float y) {
    int code = 0;
    if constexpr (std::is_same_v<Codebook, Fp4>) {
        static constexpr uint8_t kCodeOfRank[8] = {0, 1, 6, 7, 4, 5, 2, 3};
        for (float t : Fp4::kThresholds) code += std::fabs(y) > t;
        return uint8_t((y < 0 ? 8 : 0) + kCodeOfRank[code]);
    } else {
        for (float t : Codebook::kThresholds.value) code += (std::is_same_v<Codebook, Nf4> ? y : -y) > t;
        return uint8_t(code);
    }
}

/// Index of the nearest entry; a tie goes to the even one unless both are equal.
struct MapRule {
    Map map, mid;
    explicit MapRule(const Map& m) : map(m) {
        for (int i = 0; i < 255; ++i) mid.push_back((map[i] + map[i + 1]) * 0.5f);
    }
    uint8_t operator()(float y) const {
        const int k = int(std::lower_bound(mid.begin(), mid.end(), y) - mid.begin());
        return uint8_t(k + (k < 255 && y == mid[k] && k % 2 == 1 && map[k] != map[k + 1]));
    }
};

inline float round_to(float x, float) { return x; }
inline float16 round_to(float x, float16) { return __float2half_rn(x); }
inline bfloat16 round_to(float x, bfloat16) { return __float2bfloat16_rn(x); }
