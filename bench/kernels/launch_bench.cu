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
        report("runtime <<<>>>", host_ns([&] { nothing<<<1, 256, 0, s>>>(params); }));
    }
    CUcontext context;
    report("cuCtxGetCurrent", host_ns([&] { cuCtxGetCurrent(&context); }));
}
