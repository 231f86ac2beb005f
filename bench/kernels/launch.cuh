// What harnesses need to launch kernels with tensor maps, in clusters, as dependent launches; and their times, interleaved.
#pragma once
#include <cuda.h>
#include "harness.cuh"

// ------------------------------------------------------------------------------------------ tensor maps

/// A map whose box rows are swizzled `swizzle_bytes` wide.
template <typename TensorMap>
TensorMap encode(const void* data, CUtensorMapDataType type, const std::vector<cuuint64_t>& sizes,
                 const std::vector<cuuint64_t>& strides, const std::vector<cuuint32_t>& box,
                 int swizzle_bytes, CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode_tiled = [] {
        void* f;
        cudaDriverEntryPointQueryResult found;
        CHECK(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found));
        return Encode(f);
    }();
    const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
    const auto swizzle = swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                         : swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                         : swizzle_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                               : CU_TENSOR_MAP_SWIZZLE_NONE;
    CUtensorMap map;
    if (const CUresult r =
            encode_tiled(&map, type, cuuint32_t(sizes.size()), const_cast<void*>(data), sizes.data(),
                         strides.data(), box.data(), ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion,
                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
        std::printf("cuTensorMapEncodeTiled: %d\n", r), std::exit(1);
    TensorMap v;
    static_assert(sizeof v == sizeof map);
    std::memcpy(&v, &map, sizeof v);
    return v;
}

// ------------------------------------------------------------------------------------------------ launch

struct LaunchShape {
    dim3 grid;
    unsigned threads, shared_bytes, cluster;
};
/// In clusters along x; `dependent`: it may begin before the kernels before it have ended.
template <typename Params>
void launch_kernel(void (*kernel)(Params), const Params& params, const LaunchShape& shape, bool dependent,
                   cudaStream_t stream) {
    cudaLaunchConfig_t config = {};
    config.gridDim = shape.grid, config.blockDim = shape.threads;
    config.dynamicSmemBytes = shape.shared_bytes, config.stream = stream;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {shape.cluster, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes, config.numAttrs = dependent ? 2 : 1;
    CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

// ------------------------------------------------------------------------------------------------- time

/// Graphs of some calls each, replayed in turn for `round_us` microseconds; median microseconds of a call.
inline std::vector<float> interleave(const std::vector<std::function<void(int, cudaStream_t)>>& calls,
                                     int copies, float us_about, float round_us = 5e3f, int num_rounds = 5) {
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    const int num = std::clamp(int(round_us / us_about), 1, copies),
              replays = std::max(1, int(round_us / us_about / float(num)));
    std::vector<cudaGraphExec_t> graphs;
    for (const auto& call : calls) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < num; ++i) call(i, stream);
        CHECK(cudaStreamEndCapture(stream, &graph));
        CHECK(cudaGraphInstantiate(&exec, graph, 0));
        CHECK(cudaGraphDestroy(graph));
        graphs.push_back(exec);
    }
    std::vector<std::vector<float>> us(calls.size());
    for (int round = -1; round < num_rounds; ++round) {
        for (size_t c = 0; c < graphs.size(); ++c) {
            CHECK(cudaEventRecord(begin, stream));
            for (int i = 0; i < replays; ++i) CHECK(cudaGraphLaunch(graphs[c], stream));
            CHECK(cudaEventRecord(end, stream));
            CHECK(cudaEventSynchronize(end));
            float ms;
            CHECK(cudaEventElapsedTime(&ms, begin, end));
            if (round >= 0) us[c].push_back(ms * 1e3f / float(replays * num));
        }
    }
    std::vector<float> medians;
    for (size_t c = 0; c < graphs.size(); ++c) {
        std::sort(us[c].begin(), us[c].end());
        medians.push_back(us[c][size_t(num_rounds) / 2]);
        CHECK(cudaGraphExecDestroy(graphs[c]));
    }
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    CHECK(cudaStreamDestroy(stream));
    return medians;
}
