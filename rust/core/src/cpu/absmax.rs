//! The scale of a block and its inverse.

use super::float::Float;
use super::isa::{Isa, Level};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

const INFINITY: u32 = 0x7f80_0000;
const SMALLEST_NORMAL: u32 = 0x0080_0000;
const NAN: f32 = f32::from_bits(0x7fc0_0000);

/// 2^-119: below it, 127 / absmax could overflow.
const SMALLEST_OF_INT8: u32 = 0x0400_0000;

/// What a block, or a row of int8 codes, is scaled by. Where `inverse` is 0, every element takes the code of 0.0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    /// max |x|; 0 for a block of zeros and subnormals (in int8, below 2^-119), NaN where an element is.
    pub absmax: f32,
    /// 1 / absmax (in int8, 127 / absmax); 0 where absmax is 0 or not finite.
    pub inverse: f32,
}

impl Scale {
    /// From the largest magnitude as bits. As integers, magnitudes order as numbers do, with Inf and NaN on top.
    pub(super) fn from_bits(max_bits: u32) -> Self {
        Self::new(max_bits, SMALLEST_NORMAL, 1.0)
    }

    /// The same for int8 codes.
    pub(super) fn of_int8(max_bits: u32) -> Self {
        Self::new(max_bits, SMALLEST_OF_INT8, 127.0)
    }

    fn new(max_bits: u32, smallest: u32, numerator: f32) -> Self {
        let absmax = f32::from_bits(max_bits);
        match max_bits {
            bits if bits < smallest => Self { absmax: 0.0, inverse: 0.0 },
            bits if bits < INFINITY => Self { absmax, inverse: numerator / absmax },
            INFINITY => Self { absmax, inverse: 0.0 },
            _ => Self { absmax: NAN, inverse: 0.0 },
        }
    }

    /// The scale of `block`.
    pub(super) fn of<T: Float>(block: &[T], isa: Isa) -> Self {
        Self::from_bits(max_abs_bits(block, isa))
    }
}

/// Bits of the largest magnitude, NaN being larger than all; 0 of nothing.
pub(super) fn max_abs_bits<T: Float>(values: &[T], isa: Isa) -> u32 {
    match isa.level() {
        // SAFETY: an `Isa` of this level exists only where the CPU has the features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::max_abs_bits(values) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::max_abs_bits(values) },
        Level::Scalar => max_abs_bits_scalar(values),
    }
}

/// The reference, and the tail of the others.
pub(super) fn max_abs_bits_scalar<T: Float>(values: &[T]) -> u32 {
    values.iter().map(|value| value.to_f32().abs().to_bits()).max().unwrap_or(0)
}
