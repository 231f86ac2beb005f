// Host time of one launch by the driver's calls: a function, a context-free kernel, with and without
// attributes. nvcc -std=c++20 -O2 launch_bench.cu -lcuda -o launch_bench && ./launch_bench
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>
#include <cuda.h>
#include <cuda_runtime.h>

struct Params {
    const void* input;
    void *packed, *absmax;
    int64_t n;
    int32_t shift;
};
extern "C" __global__ void nothing(const __grid_constant__ Params) {}

static void check(CUresult status) {
    if (status != CUDA_SUCCESS) {
        const char* text = "";
        cuGetErrorString(status, &text);
        std::printf("failed: %s\n", text);
        std::exit(1);
    }
}

/// Least mean nanoseconds of 400 calls: fewer than the queue takes before it makes the caller wait.
template <typename F>
static double host_ns(F&& call) {
    double best = 1e30;
    for (int repeat = 0; repeat < 50; ++repeat) {
        cudaDeviceSynchronize();
        const auto begin = std::chrono::steady_clock::now();
        for (int i = 0; i < 400; ++i) call();
        const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - begin;
        best = std::min(best, time.count() / 400);
    }
    cudaDeviceSynchronize();
    return best;
}

int main() {
    cudaFree(nullptr);
    cudaFunction_t runtime_function;
    cudaGetFuncBySymbol(&runtime_function, reinterpret_cast<const void*>(nothing));
    const CUfunction function = reinterpret_cast<CUfunction>(runtime_function);
    CUkernel kernel = nullptr;
    cudaKernel_t runtime_kernel;
    cudaGetKernel(&runtime_kernel, reinterpret_cast<const void*>(nothing));
    kernel = reinterpret_cast<CUkernel>(runtime_kernel);
    CUstream stream;
    check(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    Params params{};
    void* arguments[] = {&params};
    size_t size = sizeof params;
    void* extra[] = {CU_LAUNCH_PARAM_BUFFER_POINTER, &params, CU_LAUNCH_PARAM_BUFFER_SIZE, &size,
                     CU_LAUNCH_PARAM_END};
    const auto report = [](const char* name, double ns) { std::printf("%-48s %7.0f ns\n", name, ns); };
    for (CUstream s : {stream, CUstream(nullptr)}) {
        std::printf("%s\n", s ? "own stream" : "legacy default stream");
        report("cuLaunchKernel, CUfunction", host_ns([&] {
                   check(cuLaunchKernel(function, 1, 1, 1, 256, 1, 1, 0, s, arguments, nullptr));
               }));
        report("cuLaunchKernel, CUfunction, parameter buffer",
               host_ns([&] { check(cuLaunchKernel(function, 1, 1, 1, 256, 1, 1, 0, s, nullptr, extra)); }));
        report("cuLaunchKernel, CUkernel", host_ns([&] {
                   check(cuLaunchKernel(reinterpret_cast<CUfunction>(kernel), 1, 1, 1, 256, 1, 1, 0, s,
                                        arguments, nullptr));
               }));
        CUlaunchConfig config{1, 1, 1, 256, 1, 1, 0, s, nullptr, 0};
        report("cuLaunchKernelEx, CUfunction",
               host_ns([&] { check(cuLaunchKernelEx(&config, function, arguments, nullptr)); }));
        report("cuLaunchKernelEx, CUkernel", host_ns([&] {
                   check(cuLaunchKernelEx(&config, reinterpret_cast<CUfunction>(kernel), arguments, nullptr));
               }));
        CUlaunchAttribute attributes[2] = {};
        attributes[0].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attributes[0].value.programmaticStreamSerializationAllowed = 1;
        attributes[1].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attributes[1].value.clusterDim = {1, 1, 1};
        config.attrs = attributes;
        for (config.numAttrs = 1; config.numAttrs <= 2; ++config.numAttrs)
            report(config.numAttrs == 1 ? "the same, dependent" : "the same, dependent, a cluster", host_ns([&] {
                       check(cuLaunchKernelEx(&config, reinterpret_cast<CUfunction>(kernel), arguments, nullptr));
                   }));
        report("runtime <<<>>>", host_ns([&] { nothing<<<1, 256, 0, s>>>(params); }));
    }
    void* matrix;
    cudaMalloc(&matrix, 4096 * 4096 * 2);
    alignas(64) CUtensorMap map;
    const cuuint64_t dims[] = {4096, 4096}, strides[] = {8192};
    const cuuint32_t box[] = {64, 128}, steps[] = {1, 1};
    report("cuTensorMapEncodeTiled, 2 dimensions", host_ns([&] {
               check(cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, matrix, dims, strides, box,
                                            steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
           }));
    report("cuTensorMapReplaceAddress", host_ns([&] { check(cuTensorMapReplaceAddress(&map, matrix)); }));
    CUcontext context;
    report("cuCtxGetCurrent", host_ns([&] { cuCtxGetCurrent(&context); }));
}
