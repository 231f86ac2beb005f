// What the benchmark of the blockwise kernels launches, and their check against scalar rules.
#pragma once
#include "blockwise_4bit.cu"
#undef ENTRY_POINTS
#include "blockwise_8bit.cu"
#undef ENTRY_POINTS
#include "nested.cu"
#include "tensorwise.cu"
#include "harness.cuh"
#include "maps.cuh"

// ------------------------------------------------------------------------------------------ launches

template <typename T>
struct Entry;
#define ENTRY(dtype)                                                                    \
    template <>                                                                         \
    struct Entry<dtype> {                                                               \
        static constexpr const char* kName = #dtype;                                    \
        static constexpr auto quantize_nf4 = quantize_4bit_##dtype##_nf4;               \
        static constexpr auto quantize_fp4 = quantize_4bit_##dtype##_fp4;               \
        static constexpr auto quantize_af4 = quantize_4bit_##dtype##_af4;               \
        static constexpr auto dequantize_nf4 = dequantize_4bit_##dtype##_nf4;           \
        static constexpr auto dequantize_fp4 = dequantize_4bit_##dtype##_fp4;           \
        static constexpr auto dequantize_af4 = dequantize_4bit_##dtype##_af4;           \
        static constexpr auto dequantize_nested = dequantize_4bit_nested_##dtype##_nf4; \
        static constexpr auto quantize_8bit = quantize_blockwise_##dtype;               \
        static constexpr auto dequantize_8bit = dequantize_blockwise_##dtype;           \
        static constexpr auto absmax_of = quantize_absmax_of_##dtype;                   \
        static constexpr auto quantize_tensor = quantize_##dtype;                       \
    };
ENTRY(float32)
ENTRY(float16)
ENTRY(bfloat16)

/// Launches with one CTA for every `elements`.
template <typename Params>
void launch(void (*kernel)(Params), const Params& p, int64_t elements, cudaStream_t stream = nullptr,
            int threads = 256) {
    kernel<<<unsigned(std::min<int64_t>(ceil_div(p.n, elements), INT32_MAX)), threads, 0, stream>>>(p);
    CHECK(cudaGetLastError());
}
/// Elements of one CTA: `elements` of 16 bits, half as many of 32.
template <typename T>
constexpr int64_t per_cta(int64_t elements) {
    return elements * 2 / int64_t(sizeof(T));
}
inline int log2_of(int64_t x) { return 63 - __builtin_clzll(uint64_t(x)); }
inline void launch_quantize_absmax(const QuantizeAbsmaxParams& p, cudaStream_t stream = nullptr) {
    launch(quantize_absmax_sums, p, 8192, stream);
    quantize_absmax_offset<<<1, kOffsetThreads, 0, stream>>>(p);
    launch(quantize_absmax, p, 4096, stream);
}
template <typename T>
void launch_quantize_tensor(QuantizeParams p, cudaStream_t stream = nullptr) {
    p.num_partials = int(std::min<int64_t>(ceil_div(p.n, per_cta<T>(8192)), 1024));
    Entry<T>::absmax_of<<<unsigned(p.num_partials), 256, 0, stream>>>(p);
    Entry<T>::quantize_tensor<<<unsigned(std::min<int64_t>(p.num_partials, 4 * 132)), 256, 0, stream>>>(p);
}

// --------------------------------------------------------------------------------------- correctness

template <typename T>
void expect_equal(const Buffer<T>& got, const std::vector<T>& want, const std::string& what) {
    const std::vector<T> values = got.download();
    int64_t wrong = 0;
    for (size_t i = 0; i < want.size(); ++i)
        wrong += std::memcmp(&values[i], &want[i], sizeof(T)) != 0 &&
                 !(std::isnan(float(values[i])) && std::isnan(float(want[i])));
    if (wrong == 0 && got.intact()) return;
    ++failures;
    std::printf("FAIL %s: %lld of %zu differ%s\n", what.c_str(), static_cast<long long>(wrong), want.size(),
                got.intact() ? "" : ", written outside");
}

/// Normal numbers whose last blocks hold NaN, Inf, zeros, subnormal and huge values.
template <typename T>
std::vector<T> test_vector(int64_t n) {
    Buffer<T> buffer(n);
    random_normal(buffer.data(), n, 7);
    std::vector<T> x = buffer.download();
    const float unusual[] = {NAN, INFINITY, -INFINITY, 0.0f, 1e-41f, 3e38f, 0x1p-126f};
    for (int i = 0; i < 7 && n > 8 * 8192; ++i) {
        for (int j = 0; i > 2 && j < 4096; ++j)
            x[n - 8192 * (i + 1) + j] = round_to(unusual[i] * float(j % 3), T());
        x[n - 8192 * (i + 1) + 77] = round_to(unusual[i], T());
    }
    return x;
}

template <typename T, typename Codebook>
void check_4bit(const std::vector<T>& x, void (*quantize)(Quantize4bitParams),
                void (*dequantize)(Dequantize4bitParams), int64_t block_size, int offset) {
    const int64_t n = int64_t(x.size()), blocks = ceil_div(n, block_size);
    std::vector<uint8_t> want(ceil_div(n, 2));
    std::vector<float> absmax(blocks);
    std::vector<T> decoded(n);
    parallel(blocks, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t first = b * block_size, last = std::min(n, first + block_size);
            const auto [am, inverse] = block_scale(&x[first], last - first);
            absmax[b] = am;
            for (int64_t i = first; i < last + (last == n && n % 2); ++i) {
                const uint8_t code = code_of<Codebook>(i < n && inverse != 0 ? float(x[i]) * inverse : 0.0f);
                want[i / 2] |= uint8_t(code << (i % 2 ? 0 : 4));
                if (i < n) decoded[i] = round_to(from_bits(Codebook::kValueBits[code]) * am, T());
            }
        }
    });
    Buffer<T> input(x, offset), output(n, offset);
    Buffer<uint8_t> packed(want.size(), offset);
    Buffer<float> absmax_out(blocks);
    const int shift = log2_of(block_size);
    launch(quantize, {input.data(), packed.data(), absmax_out.data(), n, shift}, per_cta<T>(8192));
    launch(dequantize, {packed.data(), absmax_out.data(), nullptr, nullptr, nullptr, output.data(), n, shift},
           per_cta<T>(4096));
    const std::string what = std::string(Entry<T>::kName) + " 4-bit block " + std::to_string(block_size);
    expect_equal(packed, want, what + " codes");
    expect_equal(absmax_out, absmax, what + " absmax");
    expect_equal(output, decoded, what + " decoded");
}

template <typename T>
void check_8bit(const std::vector<T>& x, const Map& map, const char* name, int64_t block_size, int offset) {
    const int64_t n = int64_t(x.size()), blocks = ceil_div(n, block_size);
    const MapRule rule(map);
    std::vector<uint8_t> want(n);
    std::vector<float> absmax(blocks);
    std::vector<T> decoded(n);
    parallel(blocks, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t first = b * block_size, last = std::min(n, first + block_size);
            const auto [am, inverse] = block_scale(&x[first], last - first);
            absmax[b] = am;
            for (int64_t i = first; i < last; ++i) {
                want[i] = rule(inverse != 0 ? float(x[i]) * inverse : 0.0f);
                decoded[i] = round_to(map[want[i]] * am, T());
            }
        }
    });
    Buffer<T> input(x, offset), output(n, offset);
    Buffer<uint8_t> codes(n, offset);
    Buffer<float> absmax_out(blocks), device_map(map);
    const int shift = log2_of(block_size);
    launch(Entry<T>::quantize_8bit,
           {input.data(), device_map.data(), codes.data(), absmax_out.data(), n, shift},
           per_cta<T>(2 * 8192));
    launch(Entry<T>::dequantize_8bit,
           {codes.data(), absmax_out.data(), device_map.data(), output.data(), n, shift}, per_cta<T>(4096));
    const std::string what =
        std::string(Entry<T>::kName) + " " + name + " block " + std::to_string(block_size);
    expect_equal(codes, want, what + " codes");
    expect_equal(absmax_out, absmax, what + " absmax");
    expect_equal(output, decoded, what + " decoded");
}

/// Whole tensor: finite values only, so that their quotients can be compared.
template <typename T>
void check_tensorwise(const std::vector<T>& x, const Map& map) {
    const int64_t n = int64_t(x.size());
    const MapRule rule(map);
    const float am = block_scale(x.data(), n).first;
    std::vector<uint8_t> want(n);
    parallel(n, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) want[i] = rule(float(x[i]) / am);
    });
    Buffer<T> input(x);
    Buffer<uint8_t> codes(n);
    Buffer<float> absmax(1), device_map(map);
    Buffer<uint32_t> partials(1024);
    launch_quantize_tensor<T>(
        {input.data(), device_map.data(), codes.data(), absmax.data(), partials.data(), n, 0});
    expect_equal(codes, want, std::string(Entry<T>::kName) + " tensorwise");
    expect_equal(absmax, {am}, "tensorwise absmax");
}

inline void check_quantize_absmax(std::vector<float> x) {
    const int64_t n = int64_t(x.size());
    double total = 0, run = 0;
    for (int64_t i = 0; i < n; ++i) {
        run += x[i];
        if (i % 256 == 255 || i + 1 == n) total += run, run = 0;
    }
    const float offset = float(total / double(n));
    const MapRule rule(dynamic_map());
    std::vector<uint8_t> want(n);
    std::vector<float> scale;
    std::vector<float> centred(x);
    for (float& v : centred) v -= offset;
    for (int64_t first = 0; first < n; first += 256) {
        const auto [am, inverse] = block_scale(&centred[first], std::min<int64_t>(256, n - first));
        scale.push_back(am);
        for (int64_t i = first; i < std::min(n, first + 256); ++i)
            want[i] = rule(inverse != 0 ? centred[i] * inverse : 0.0f);
    }
    Buffer<float> absmax(x), scale_out(scale.size()), offset_out(1);
    Buffer<uint8_t> codes(n);
    Buffer<double> sums(scale.size());
    launch_quantize_absmax(
        {absmax.data(), codes.data(), scale_out.data(), offset_out.data(), sums.data(), n});
    expect_equal(offset_out, {offset}, "quantize_absmax offset");
    expect_equal(scale_out, scale, "quantize_absmax scale");
    expect_equal(codes, want, "quantize_absmax codes");
}

template <typename T>
void check_type(int64_t n) {
    using E = Entry<T>;
    const std::vector<T> x = test_vector<T>(n);
    for (int64_t block_size : {32, 64, 128, 256, 512, 1024, 2048, 4096}) {
        check_4bit<T, Nf4>(x, E::quantize_nf4, E::dequantize_nf4, block_size, 0);
        check_4bit<T, Fp4>(x, E::quantize_fp4, E::dequantize_fp4, block_size, 0);
        check_4bit<T, Af4>(x, E::quantize_af4, E::dequantize_af4, block_size, block_size == 64);
        if (block_size > 32) check_8bit<T>(x, dynamic_map(), "dynamic", block_size, block_size == 128);
    }
    check_8bit<T>(x, unsigned_dynamic_map(), "unsigned", 256, 0);
    check_8bit<T>(x, linear_map(), "linear", 4096, 0);
    check_8bit<T>(x, fp8_map(4, 3), "e4m3", 256, 0);
    check_8bit<T>(x, fp8_map(5, 2), "e5m2", 64, 0);
    check_8bit<T>(x, normal_map(), "normal", 256, 0);
    check_8bit<T>(x, crowded_map(), "crowded", 256, 0);
    check_tensorwise<T>(std::vector<T>(x.begin(), x.begin() + n / 2), dynamic_map());
}

/// All kernels on n elements of every dtype.
inline void check_all(int64_t n) {
    check_type<float>(n);
    check_type<float16>(n);
    check_type<bfloat16>(n);
    std::vector<float> absmax(300001);
    for (size_t i = 0; i < absmax.size(); ++i) absmax[i] = 0.02f + float(i * 2654435761u % 65536) * 0x1p-20f;
    check_quantize_absmax(absmax);
    for (size_t i = 0; i < absmax.size(); ++i) absmax[i] = std::ldexp(absmax[i], int(i % 120) - 60);
    check_quantize_absmax(absmax);
    std::printf("check: %d failures\n", failures);
}
