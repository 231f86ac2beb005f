"""Quantize, dequantize, multiply tensors of any shape and stride; here alone autograd or the op is picked.

Without a gradient every call takes arrays of any framework that speaks DLPack, and answers in that framework.
"""

from qbits.codebooks import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
)
from qbits.functional.blockwise_4bit import dequantize_4bit, pack_4bit, quantize_4bit, unpack_4bit
from qbits.functional.blockwise_8bit import (
    dequantize,
    dequantize_blockwise,
    dequantize_no_absmax,
    quantize,
    quantize_blockwise,
    quantize_no_absmax,
)
from qbits.functional.gemm_4bit import linear_4bit
from qbits.functional.gemm_4bit import multiply_4bit as multiply_4bit
from qbits.functional.gemm_4bit import weight_arguments as weight_arguments
from qbits.functional.gemm_int8 import gemm_int8
from qbits.functional.int8 import (
    dequantize_columnwise,
    dequantize_global,
    dequantize_rowwise,
    quantize_columnwise,
    quantize_columnwise_and_transpose,
    quantize_dual,
    quantize_global,
    quantize_global_transpose,
    quantize_rowwise,
)
from qbits.functional.matmul_int8 import matmul_int8
from qbits.functional.matmul_int8 import multiply_int8 as multiply_int8
from qbits.functional.standard_linear import standard_linear
from qbits.functional.switchback import switchback_linear
from qbits.records import QRows8, QTensor4, QTensor8

__all__ = [
    "QRows8",
    "QTensor4",
    "QTensor8",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_columnwise",
    "dequantize_global",
    "dequantize_no_absmax",
    "dequantize_rowwise",
    "gemm_int8",
    "get_4bit_type",
    "linear_4bit",
    "matmul_int8",
    "pack_4bit",
    "quantize",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_columnwise",
    "quantize_columnwise_and_transpose",
    "quantize_dual",
    "quantize_global",
    "quantize_global_transpose",
    "quantize_no_absmax",
    "quantize_rowwise",
    "standard_linear",
    "switchback_linear",
    "unpack_4bit",
]
