//! Element types of tensors, each of them exact in float32.

use crate::Dtype;
use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// float32, float16 or bfloat16.
pub trait Float: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// The name of the type, for the kernels that load and store it.
    const DTYPE: Dtype;

    /// Exact.
    fn to_f32(self) -> f32;

    /// Rounds to nearest even; too large becomes infinite, NaN stays NaN.
    fn from_f32(value: f32) -> Self;
}

impl Float for f32 {
    const DTYPE: Dtype = Dtype::Float32;

    fn to_f32(self) -> f32 {
        self
    }

    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Float for f16 {
    const DTYPE: Dtype = Dtype::Float16;

    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Float for bf16 {
    const DTYPE: Dtype = Dtype::Bfloat16;

    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }

    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}
