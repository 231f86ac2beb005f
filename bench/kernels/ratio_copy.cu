// Entry points of the yardstick, by ratio and unrolling: ratio_copy_<read>_<write>_<unroll>.
#include "ratio_copy.cuh"

#define RATIO_COPY(kRead, kWrite, kUnroll)                                                                \
    extern "C" __global__ void __launch_bounds__(kCopyThreads)                                            \
        ratio_copy_##kRead##_##kWrite##_##kUnroll(const uint4* input, uint4* output, int64_t num_steps) { \
        ratio_copy<kRead, kWrite, kUnroll>(input, output, num_steps);                                     \
    }

// 4-bit codes and one float32 per 64 elements against 32-bit and 16-bit floats: 7.1 and 3.6 bytes to one
RATIO_COPY(7, 1, 1)
RATIO_COPY(7, 2, 1)
RATIO_COPY(2, 7, 1)
RATIO_COPY(1, 7, 1)
// 8-bit codes against 32-bit and 16-bit floats, 4-bit codes against 8-bit ones
RATIO_COPY(4, 1, 1)
RATIO_COPY(4, 1, 2)
RATIO_COPY(2, 1, 1)
RATIO_COPY(2, 1, 2)
RATIO_COPY(2, 1, 4)
RATIO_COPY(1, 2, 1)
RATIO_COPY(1, 2, 2)
RATIO_COPY(1, 2, 4)
RATIO_COPY(1, 4, 1)
RATIO_COPY(1, 4, 2)
// the plain copy
RATIO_COPY(1, 1, 1)
RATIO_COPY(1, 1, 2)
RATIO_COPY(1, 1, 4)
RATIO_COPY(1, 1, 8)
