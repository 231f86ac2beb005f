// What a harness of gemm_int8 needs: random codes, exact sums, the scaled outputs that follow from them, and cuBLASLt's
// int8 product as a peer.
#pragma once
#include <cublasLt.h>
#include <dlfcn.h>
#include "harness.cuh"

// ------------------------------------------------------------------------------------------------- data

enum class Codes { kNormal, kUniform, kLargest };

/// Normal: rows of standard deviation 30, as quantized activations have. Largest: -128 and -127, the largest sums.
__global__ void fill_codes(int8_t* data, int64_t n, uint32_t seed, Codes codes) {
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x) {
        const uint32_t a = hash32(uint32_t(i) * 2u + seed * 0x9e3779b9u), b = hash32(a + seed);
        const float u = fminf((a + 1.0f) * 2.3283064e-10f, 1.0f);
        const float x = sqrtf(-2.0f * logf(u)) * cospif(b * 4.6566129e-10f) * 30.0f;
        data[i] = codes == Codes::kNormal    ? int8_t(fminf(fmaxf(rintf(x), -127.0f), 127.0f))
                  : codes == Codes::kUniform ? int8_t(int(a % 255) - 127)
                                             : int8_t(-127 - int(a % 2));
    }
}
inline void random_codes(int8_t* data, int64_t n, uint32_t seed, Codes codes = Codes::kNormal) {
    fill_codes<<<132 * 8, 256>>>(data, n, seed, codes);
    CHECK(cudaGetLastError());
}
__global__ void fill_scales(float* data, int64_t n, uint32_t seed) {
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x)
        data[i] = 0.1f + float(hash32(uint32_t(i) + seed) >> 8) * 0x1p-20f;
}

// -------------------------------------------------------------------------------------------- reference

/// Exact sums in 64 bits. A CTA of 16 x 16 threads has 16 rows of the input and of the weight.
__global__ void exact_sums(const int8_t* input, const int8_t* weight, int m, int n, int k, int64_t* sums) {
    const int row = int(blockIdx.y) * 16 + int(threadIdx.y), column = int(blockIdx.x) * 16 + int(threadIdx.x);
    if (row >= m || column >= n) return;
    const int4* const x = reinterpret_cast<const int4*>(input + int64_t(row) * k);
    const int4* const w = reinterpret_cast<const int4*>(weight + int64_t(column) * k);
    int64_t sum = 0;
    for (int i = 0; i < k / 16; ++i) {
        const int4 a = x[i], b = w[i];
        sum += __dp4a(a.x, b.x, __dp4a(a.y, b.y, __dp4a(a.z, b.z, __dp4a(a.w, b.w, 0))));
    }
    sums[int64_t(row) * n + column] = sum;
}

/// Scales and bias of one call; null pointers for what lacks.
struct Scales {
    const float* input;
    const float* weight;
    int weight_stride;
    const void* bias;
    int bias_dtype;
};

/// Counts the outputs with other bits than three roundings of the sums in float32 and one to the output give.
template <typename Output>
__global__ void compare_outputs(const int64_t* sums, const Output* output, Scales s, int64_t m, int64_t n,
                                unsigned long long* num_bad) {
    using Bits = std::conditional_t<sizeof(Output) == 2, uint16_t, uint32_t>;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < m * n;
         i += int64_t(gridDim.x) * blockDim.x) {
        const int64_t row = i / n, column = i % n;
        Output want;
        if constexpr (std::is_same_v<Output, int32_t>) {
            want = int32_t(sums[i]);
        } else {
            const float factor = s.input ? __fmul_rn(s.input[row], 1.0f / 16129.0f) : 1.0f;
            const float scale = s.weight ? s.weight[column * s.weight_stride] : 1.0f;
            const float bias = !s.bias             ? 0.0f
                               : s.bias_dtype == 0 ? static_cast<const float*>(s.bias)[column]
                               : s.bias_dtype == 1 ? float(static_cast<const float16*>(s.bias)[column])
                                                   : float(static_cast<const bfloat16*>(s.bias)[column]);
            want = Output(__fmaf_rn(__fmul_rn(__ll2float_rn(sums[i]), factor), scale, bias));
        }
        if (*reinterpret_cast<const Bits*>(&want) != *reinterpret_cast<const Bits*>(&output[i]))
            atomicAdd(num_bad, 1ull);
    }
}

/// bias_dtype -1: none. weight_scales: 0, 1 or n of them.
struct Case {
    int m, n, k;
    Codes codes = Codes::kNormal;
    bool input_scales = true;
    int weight_scales = 1;
    int bias_dtype = -1;
    size_t offset = 0;  // elements of the output behind an aligned address
};

/// Random operands of one product and its exact sums.
class Product {
 public:
    explicit Product(const Case& c)
        : c(c),
          input(size_t(c.m) * size_t(c.k)),
          weight(size_t(c.n) * size_t(c.k)),
          input_scales_(size_t(c.m)),
          weight_scales_(size_t(std::max(c.weight_scales, 1))),
          bias32_(size_t(c.n)),
          bias16_(size_t(c.n)),
          biasb_(size_t(c.n)),
          sums_(size_t(c.m) * size_t(c.n)),
          num_bad_(1) {
        static uint32_t seed = 0;
        seed += 101;
        random_codes(input.data(), int64_t(c.m) * c.k, seed, c.codes);
        random_codes(weight.data(), int64_t(c.n) * c.k, seed + 1, c.codes);
        fill_scales<<<64, 256>>>(input_scales_.data(), c.m, seed + 2);
        fill_scales<<<64, 256>>>(weight_scales_.data(), std::max(c.weight_scales, 1), seed + 3);
        random_normal(bias32_.data(), c.n, seed + 4);
        random_normal(bias16_.data(), c.n, seed + 5);
        random_normal(biasb_.data(), c.n, seed + 6);
        exact_sums<<<dim3(unsigned(ceil_div(c.n, 16)), unsigned(ceil_div(c.m, 16))), dim3(16, 16)>>>(
            input.data(), weight.data(), c.m, c.n, c.k, sums_.data());
        CHECK(cudaDeviceSynchronize());
    }
    Scales scales() const {
        const void* const biases[4] = {nullptr, bias32_.data(), bias16_.data(), biasb_.data()};
        return {c.input_scales ? input_scales_.data() : nullptr,
                c.weight_scales ? weight_scales_.data() : nullptr, c.weight_scales > 1,
                biases[c.bias_dtype + 1], std::max(c.bias_dtype, 0)};
    }
    /// Launches `runs` times into poisoned memory; every bit counts, and nothing beside the output may be written.
    template <typename Output, typename Launch>
    void check(const std::string& what, int runs, Launch&& launch) {
        for (int run = 0; run < runs; ++run) {
            const Buffer<Output> output(size_t(c.m) * size_t(c.n), c.offset);
            const unsigned long long zero = 0;
            CHECK(cudaMemcpy(num_bad_.data(), &zero, 8, cudaMemcpyHostToDevice));
            launch(run, output.data());
            compare_outputs<<<132 * 8, 256>>>(sums_.data(), output.data(), scales(), c.m, c.n,
                                              num_bad_.data());
            CHECK(cudaDeviceSynchronize());
            const unsigned long long num_bad = num_bad_.download()[0];
            const bool intact = output.intact();
            ++num_checks;
            if (num_bad || !intact)
                ++failures, std::printf("FAIL %s m %d n %d k %d run %d: %llu outputs differ%s\n",
                                        what.c_str(), c.m, c.n, c.k, run, num_bad, intact ? "" : ", CANARY");
        }
    }

    Case c;
    Buffer<int8_t> input, weight;
    static inline int num_checks = 0;

 private:
    Buffer<float> input_scales_, weight_scales_, bias32_;
    Buffer<float16> bias16_;
    Buffer<bfloat16> biasb_;
    Buffer<int64_t> sums_;
    Buffer<unsigned long long> num_bad_;
};

// ------------------------------------------------------------------------------------------------- peer

/// Raw int32 sums by cuBLASLt, of the library that CUBLASLT names, with the fastest of the algorithms that it suggests;
/// without the library there is no peer.
class CublasLt {
 public:
    CublasLt() {
        const char* const name = std::getenv("CUBLASLT");
        lib_ = dlopen(name ? name : "libcublasLt.so.13", RTLD_NOW);
        if (!lib_ || load<decltype(&cublasLtCreate)>("cublasLtCreate")(&handle_)) {
            std::printf("no cuBLASLt: %s\n", lib_ ? "cublasLtCreate failed" : dlerror());
            handle_ = nullptr;
            return;
        }
        CHECK(cudaMalloc(&workspace_, kWorkspaceBytes));
    }
    bool is_there() const { return handle_ != nullptr; }
    /// For products of one shape; the operands are tried to choose an algorithm. False: cuBLASLt takes no such shape.
    bool plan(int m, int n, int k, const int8_t* input, const int8_t* weight, int32_t* output) {
        const cublasOperation_t transposed = CUBLAS_OP_T;
        const auto layout = load<decltype(&cublasLtMatrixLayoutCreate)>("cublasLtMatrixLayoutCreate");
        load<decltype(&cublasLtMatmulDescCreate)>("cublasLtMatmulDescCreate")(&product_, CUBLAS_COMPUTE_32I,
                                                                              CUDA_R_32I);
        load<decltype(&cublasLtMatmulDescSetAttribute)>("cublasLtMatmulDescSetAttribute")(
            product_, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed);
        layout(&weight_, CUDA_R_8I, uint64_t(k), uint64_t(n), k);
        layout(&input_, CUDA_R_8I, uint64_t(k), uint64_t(m), k);
        layout(&output_, CUDA_R_32I, uint64_t(n), uint64_t(m), n);
        cublasLtMatmulPreference_t preference;
        load<decltype(&cublasLtMatmulPreferenceCreate)>("cublasLtMatmulPreferenceCreate")(&preference);
        load<decltype(&cublasLtMatmulPreferenceSetAttribute)>("cublasLtMatmulPreferenceSetAttribute")(
            preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspaceBytes, sizeof kWorkspaceBytes);
        cublasLtMatmulHeuristicResult_t found[8];
        int num = 0;
        const auto status = load<decltype(&cublasLtMatmulAlgoGetHeuristic)>("cublasLtMatmulAlgoGetHeuristic")(
            handle_, product_, weight_, input_, output_, output_, preference, 8, found, &num);
        if (status != CUBLAS_STATUS_SUCCESS) num = 0;
        float best_us = INFINITY;
        for (int i = 0; i < num; ++i) {
            if (run_with(found[i].algo, input, weight, output, nullptr)) continue;
            const float us = time_us(
                2, [&](int, cudaStream_t stream) { run_with(found[i].algo, input, weight, output, stream); });
            if (us < best_us) best_us = us, algo_ = found[i].algo;
        }
        return best_us < INFINITY;
    }
    void run(const int8_t* input, const int8_t* weight, int32_t* output, cudaStream_t stream) const {
        run_with(algo_, input, weight, output, stream);
    }

 private:
    static constexpr size_t kWorkspaceBytes = 64 << 20;

    template <typename Function>
    Function load(const char* name) const {
        void* const f = dlsym(lib_, name);
        if (!f) std::printf("cuBLASLt has no %s\n", name), std::exit(1);
        return reinterpret_cast<Function>(f);
    }
    cublasStatus_t run_with(const cublasLtMatmulAlgo_t& algo, const int8_t* input, const int8_t* weight,
                            int32_t* output, cudaStream_t stream) const {
        static const auto multiply = load<decltype(&cublasLtMatmul)>("cublasLtMatmul");
        const int32_t one = 1, zero = 0;
        return multiply(handle_, product_, &one, weight, weight_, input, input_, &zero, output, output_,
                        output, output_, &algo, workspace_, kWorkspaceBytes, stream);
    }

    void* lib_ = nullptr;
    void* workspace_ = nullptr;
    cublasLtHandle_t handle_ = nullptr;
    cublasLtMatmulDesc_t product_ = nullptr;
    cublasLtMatrixLayout_t weight_ = nullptr, input_ = nullptr, output_ = nullptr;
    cublasLtMatmulAlgo_t algo_ = {};
};
