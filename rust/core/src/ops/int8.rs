//! int8 codes with one scale for each row, each column, or the whole tensor; plain, transposed, or both.
//! Dettmers et al., LLM.int8(), arXiv:2208.07339, section 2; Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.

use super::with_float;
use crate::backend::{Cpu, Run};
use crate::cpu::{self, ElementScales, Execution, Matrix};
use crate::error::Result;
use crate::op;
use crate::spec::{FLOAT32, FLOATS, INT8, Of};
use crate::tensor::{Dtype, Tensor};

mod columns;
mod rows;

op! {
    /// Quantize every row to int8 codes by its largest magnitude: `values = rint(input * (127 / scales[row]))`.
    ///
    /// A row whose maximum is below 2^-119 has scale 0. A NaN or an Inf in a row is stored as its scale, and its codes are 0.
    ///
    /// Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 2.
    quantize_rowwise => QuantizeRowwise {
        input: In(FLOATS, "M, K"),
        values: Out(Of::Is(Dtype::Int8), "M, K"),
        scales: Out(Of::Is(Dtype::Float32), "M"),
    }
}

op! {
    /// Quantize every row to int8 codes, apart from columns that hold a magnitude of at least `threshold`.
    ///
    /// ElementScales are the largest magnitudes below `threshold`. Columns with an outlier in any row are marked in `outlier_mask`,
    /// and their codes are 0 in all rows. A NaN is no outlier.
    ///
    /// Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 3.
    quantize_rowwise_outliers => QuantizeRowwiseOutliers {
        input: In(FLOATS, "M, K"),
        threshold: Float,
        values: Out(Of::Is(Dtype::Int8), "M, K"),
        scales: Out(Of::Is(Dtype::Float32), "M"),
        outlier_mask: Out(Of::Is(Dtype::Bool), "K"),
    }
}

op! {
    /// Quantize every column to int8 codes by its largest magnitude: `values = rint(input * (127 / scales[column]))`.
    ///
    /// Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.
    quantize_columnwise => QuantizeColumnwise {
        input: In(FLOATS, "M, K"),
        values: Out(Of::Is(Dtype::Int8), "M, K"),
        scales: Out(Of::Is(Dtype::Float32), "K"),
    }
}

op! {
    /// Quantize every column to int8 codes and transpose them: the codes of `quantize_columnwise`, [K, M].
    ///
    /// Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.
    quantize_columnwise_and_transpose => QuantizeColumnwiseAndTranspose {
        input: In(FLOATS, "M, K"),
        values: Out(Of::Is(Dtype::Int8), "K, M"),
        scales: Out(Of::Is(Dtype::Float32), "K"),
    }
}

op! {
    /// Quantize a tensor to int8 codes by its largest magnitude: `values = rint(input * (127 / scales[0]))`.
    ///
    /// Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.
    quantize_global => QuantizeGlobal {
        input: In(FLOATS, "*M, K"),
        values: Out(Of::Is(Dtype::Int8), "*M, K"),
        scales: Out(Of::Is(Dtype::Float32), "1"),
        scratch: Scratch("2048"),
    }
}

op! {
    /// Quantize a matrix to int8 codes by its largest magnitude and transpose them: the codes of `quantize_global`, [K, M].
    ///
    /// Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.
    quantize_global_transpose => QuantizeGlobalTranspose {
        input: In(FLOATS, "M, K"),
        values: Out(Of::Is(Dtype::Int8), "K, M"),
        scales: Out(Of::Is(Dtype::Float32), "1"),
        scratch: Scratch("2048"),
    }
}

op! {
    /// Quantize a weight both ways: `quantize_rowwise`, and `quantize_columnwise_and_transpose` for the backward.
    ///
    /// Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.
    quantize_dual_rowwise => QuantizeDualRowwise {
        input: In(FLOATS, "N, K"),
        values: Out(Of::Is(Dtype::Int8), "N, K"),
        scales: Out(Of::Is(Dtype::Float32), "N"),
        transposed: Out(Of::Is(Dtype::Int8), "K, N"),
        transposed_scales: Out(Of::Is(Dtype::Float32), "K"),
    }
}

op! {
    /// Quantize a weight by its largest magnitude, with its codes transposed, too, for the backward.
    ///
    /// Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.
    quantize_dual_global => QuantizeDualGlobal {
        input: In(FLOATS, "N, K"),
        values: Out(Of::Is(Dtype::Int8), "N, K"),
        transposed: Out(Of::Is(Dtype::Int8), "K, N"),
        scales: Out(Of::Is(Dtype::Float32), "1"),
        scratch: Scratch("2048"),
    }
}

op! {
    /// Decode int8 codes of rows: `output = (values * scales[row]) * (1 / 127)` in float32, rounded once to `dtype`.
    ///
    /// Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 2.
    dequantize_rowwise => DequantizeRowwise {
        values: In(INT8, "M, K"),
        scales: In(FLOAT32, "M"),
        dtype: OneOfDtype(FLOATS),
        output: Out(Of::Arg("dtype"), "M, K"),
    }
}

op! {
    /// Decode int8 codes of columns: `output = (values * scales[column]) * (1 / 127)` in float32, rounded once to `dtype`.
    ///
    /// Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.
    dequantize_columnwise => DequantizeColumnwise {
        values: In(INT8, "M, K"),
        scales: In(FLOAT32, "K"),
        dtype: OneOfDtype(FLOATS),
        output: Out(Of::Arg("dtype"), "M, K"),
    }
}

op! {
    /// Decode int8 codes with one scale: `output = (values * scales[0]) * (1 / 127)` in float32, rounded once to `dtype`.
    ///
    /// Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.
    dequantize_global => DequantizeGlobal {
        values: In(INT8, "*M, K"),
        scales: Flat(FLOAT32, "1"),
        dtype: OneOfDtype(FLOATS),
        output: Out(Of::Arg("dtype"), "*M, K"),
    }
}

/// The elements of a tensor as rows of its last dimension.
///
/// # Safety
/// As [`Tensor::as_slice`].
unsafe fn matrix<'a, T>(tensor: &Tensor) -> Matrix<'a, T> {
    let columns = tensor.shape().last().map_or(1, |&columns| columns as usize);
    let rows = tensor.shape().iter().rev().skip(1).product::<i64>() as usize;
    // SAFETY: the caller's promise.
    Matrix { elements: unsafe { tensor.as_slice() }, rows, columns }
}

/// Runs a quantizer on the CPU: `$input` is the matrix, `$execution` how to run.
macro_rules! on_cpu {
    ($Op:ty, |$op:ident, $input:ident, $execution:ident| $body:block) => {
        impl Run<$Op> for Cpu {
            unsafe fn run(&self, $op: &$Op) -> Result<()> {
                let $execution = Execution::new(self.num_threads)?;
                // SAFETY: the caller's promise: checked lengths and dtypes, written tensors that share no memory.
                with_float!($op.input.dtype, T => unsafe {
                    let $input = matrix::<T>(&$op.input);
                    $body
                });
                Ok(())
            }
        }
    };
}

on_cpu!(QuantizeRowwise, |op, input, execution| {
    cpu::quantize_rowwise(input, op.values.as_slice_mut(), op.scales.as_slice_mut(), execution);
});

on_cpu!(QuantizeRowwiseOutliers, |op, input, execution| {
    let (values, scales) = (op.values.as_slice_mut(), op.scales.as_slice_mut());
    cpu::quantize_rowwise_outliers(
        input,
        op.threshold,
        values,
        scales,
        op.outlier_mask.as_slice_mut(),
        execution,
    );
});

on_cpu!(QuantizeColumnwise, |op, input, execution| {
    let inverses = cpu::find_column_scales(input, op.scales.as_slice_mut(), execution);
    cpu::quantize_matrix(input, ElementScales::Each(&inverses), op.values.as_slice_mut(), execution);
});

on_cpu!(QuantizeColumnwiseAndTranspose, |op, input, execution| {
    let inverses = cpu::find_column_scales(input, op.scales.as_slice_mut(), execution);
    cpu::quantize_transposed(input, ElementScales::Each(&inverses), op.values.as_slice_mut(), execution);
});

on_cpu!(QuantizeGlobal, |op, input, execution| {
    let (scale, inverse) = cpu::find_tensor_scale(input.elements, execution);
    op.scales.as_slice_mut()[0] = scale;
    cpu::quantize_matrix(input, ElementScales::One(inverse), op.values.as_slice_mut(), execution);
});

on_cpu!(QuantizeGlobalTranspose, |op, input, execution| {
    let (scale, inverse) = cpu::find_tensor_scale(input.elements, execution);
    op.scales.as_slice_mut()[0] = scale;
    cpu::quantize_transposed(input, ElementScales::One(inverse), op.values.as_slice_mut(), execution);
});

on_cpu!(QuantizeDualRowwise, |op, input, execution| {
    cpu::quantize_rowwise(input, op.values.as_slice_mut(), op.scales.as_slice_mut(), execution);
    let inverses = cpu::find_column_scales(input, op.transposed_scales.as_slice_mut(), execution);
    cpu::quantize_transposed(input, ElementScales::Each(&inverses), op.transposed.as_slice_mut(), execution);
});

on_cpu!(QuantizeDualGlobal, |op, input, execution| {
    let (scale, inverse) = cpu::find_tensor_scale(input.elements, execution);
    op.scales.as_slice_mut()[0] = scale;
    cpu::quantize_matrix(input, ElementScales::One(inverse), op.values.as_slice_mut(), execution);
    cpu::quantize_transposed(input, ElementScales::One(inverse), op.transposed.as_slice_mut(), execution);
});

impl Run<DequantizeRowwise> for Cpu {
    unsafe fn run(&self, op: &DequantizeRowwise) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: as above.
        with_float!(op.dtype, T => unsafe {
            let (values, output) = (matrix(&op.values), op.output.as_slice_mut::<T>());
            cpu::dequantize_matrix(values, Some(op.scales.as_slice()), ElementScales::One(0.0), output, execution);
        });
        Ok(())
    }
}

impl Run<DequantizeColumnwise> for Cpu {
    unsafe fn run(&self, op: &DequantizeColumnwise) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: as above.
        with_float!(op.dtype, T => unsafe {
            let (values, output) = (matrix(&op.values), op.output.as_slice_mut::<T>());
            cpu::dequantize_matrix(values, None, ElementScales::Each(op.scales.as_slice()), output, execution);
        });
        Ok(())
    }
}

impl Run<DequantizeGlobal> for Cpu {
    unsafe fn run(&self, op: &DequantizeGlobal) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: as above.
        with_float!(op.dtype, T => unsafe {
            let (values, output) = (matrix(&op.values), op.output.as_slice_mut::<T>());
            cpu::dequantize_matrix(values, None, ElementScales::One(op.scales.as_slice()[0]), output, execution);
        });
        Ok(())
    }
}
