// What arithmetic costs beside wgmma on one sm_90a GPU: two warpgroups multiply m64n256k16 from resident shared memory, a
// third repeats one instruction. Answers how many instructions a kernel may spend on decoding while the tensor cores work.
//
// nvcc -std=c++20 -O3 -I../../cuda -gencode arch=compute_90a,code=sm_90a wgmma_alu_bench.cu
#include "dtype.cuh"
#include "harness.cuh"
#include "ptx_sm90.cuh"

enum Instruction { kPermute, kLogic, kMultiplyAdd, kMultiply, kPackedMultiplyAdd };
constexpr int kChains = 32;     // independent, so that no latency shows
constexpr int kRepeats = 2000;  // of all chains
constexpr int kBlocks = 900;    // of 64 k; enough to outlast the instructions
constexpr int kSharedBytes = 96 * 1024;

template <Instruction kInstruction>
__device__ __forceinline__ void step(uint32_t& r, uint32_t a, uint32_t b) {
    if constexpr (kInstruction == kPermute)
        asm volatile("prmt.b32 %0, %1, %2, %0;" : "+r"(r) : "r"(a), "r"(b));
    if constexpr (kInstruction == kLogic)
        asm volatile("lop3.b32 %0, %0, 0x77777777, 0x32103210, 0xea;" : "+r"(r));
    if constexpr (kInstruction == kMultiplyAdd)
        asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+r"(r) : "r"(a), "r"(b));
    if constexpr (kInstruction == kMultiply) asm volatile("mul.rn.f32 %0, %0, 0f3F800001;" : "+r"(r));
    if constexpr (kInstruction == kPackedMultiplyAdd)
        asm volatile("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(r) : "r"(a), "r"(b));
}

/// clk: of the instructions; of the blocks multiplied until they ended, and how many.
template <Instruction kInstruction, bool kMultiplies>
__global__ void __launch_bounds__(384, 1) beside_wgmma(long long* clk) {
    __shared__ volatile int has_ended;
    const uint32_t base = shared_start();
    if (threadIdx.x == 0) has_ended = 0;
    for (uint32_t i = threadIdx.x; i < kSharedBytes / 4; i += 384)
        store_shared_4(base + 4 * i, (i * 2654435761u & 0x8fff8fffu) | 0x30003000u);
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x < 256) {
        if (!kMultiplies) return;
        const uint64_t a = operand_descriptor(base + threadIdx.x / 128 * 8192),
                       b = operand_descriptor(base + 16384);
        float acc[128] = {};
        const long long begin = clock64();
        long long end = begin;
        int num = 0;
        #pragma unroll 1
        for (int block = 1; block <= kBlocks; ++block) {
            wgmma_fence();
            #pragma unroll
            for (int k = 0; k < 4; ++k) wgmma_k16_shared<bfloat16, 256>(acc, a + 2 * k, b + 2 * k);
            wgmma_commit();
            wgmma_wait<1>();
            if (threadIdx.x == 0 && !has_ended) end = clock64(), num = block;
            __syncwarp();
        }
        wgmma_wait<0>();
        float sum = 0.0f;  // results are used, or ptxas removes what computes them
        for (int i = 0; i < 128; ++i) sum += acc[i];
        if (sum == 1.2345f) clk[3] = 0;
        if (threadIdx.x == 0 && blockIdx.x == 0) clk[1] = end - begin, clk[2] = num;
    } else {
        uint32_t r[kChains];
        for (int i = 0; i < kChains; ++i) r[i] = threadIdx.x * 33 + i;
        const uint32_t a = threadIdx.x * 77 | 0x30003000, b = threadIdx.x * 99 | 0x3f003f00;
        const long long begin = clock64();
        for (int repeat = 0; repeat < kRepeats; ++repeat) {
            #pragma unroll
            for (int i = 0; i < kChains; ++i) step<kInstruction>(r[i], a, b);
        }
        const long long end = clock64();
        uint32_t all = 0;
        for (int i = 0; i < kChains; ++i) all ^= r[i];
        if (all == 0x12345) clk[3] = 0;
        named_barrier(5, 128);
        if (threadIdx.x == 256) {
            has_ended = 1;
            if (blockIdx.x == 0) clk[0] = end - begin;
        }
    }
}

template <Instruction kInstruction>
static void report(const char* name, long long* clk) {
    double per_instruction[2], per_block = 0;
    for (const bool multiplies : {false, true}) {
        const auto kernel = multiplies ? beside_wgmma<kInstruction, true> : beside_wgmma<kInstruction, false>;
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
        long long got[3];
        for (int run = 0; run < 2; ++run) {
            kernel<<<132, 384, kSharedBytes>>>(clk);
            CHECK(cudaGetLastError());
            CHECK(cudaMemcpy(got, clk, sizeof got, cudaMemcpyDeviceToHost));
        }
        per_instruction[multiplies] = double(got[0]) / (kRepeats * kChains);
        if (multiplies) per_block = double(got[1]) / double(got[2]);
    }
    std::printf(
        "%-16s clk per instruction and warp: alone %.2f, beside wgmma %.2f; clk per 64 k (1024 at best) "
        "%.0f\n",
        name, per_instruction[0], per_instruction[1], per_block);
}

int main() {
    long long* clk;
    CHECK(cudaMalloc(&clk, 64));
    report<kPermute>("prmt", clk);
    report<kLogic>("lop3", clk);
    report<kMultiplyAdd>("fma.f32", clk);
    report<kMultiply>("mul.f32", clk);
    report<kPackedMultiplyAdd>("fma.bf16x2", clk);
}
