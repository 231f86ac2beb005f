//! Nested statistics: the absmax values of a 4-bit tensor, themselves kept as 8-bit codes of the signed dynamic map.
//! Dettmers et al., QLoRA, arXiv:2305.14314, section 3 ("double quantization").

use super::Execution;
use super::threads::FloatEnvironment;
use crate::codebook::DYNAMIC_SIGNED;

/// Absmax values that share a scale.
pub(super) const NESTED_BLOCK: usize = 256;

/// Quantized absmax values.
#[derive(Clone, Copy, Debug)]
pub struct Nested<'a> {
    /// [num_blocks]
    pub codes: &'a [u8],
    /// [ceil_div(num_blocks, 256)]
    pub scale: &'a [f32],
    /// Added to every value.
    pub offset: f32,
    /// What `codes` stand for.
    pub map: &'a [f32; 256],
}

/// The absmax of each block of a 4-bit tensor.
#[derive(Clone, Copy, Debug)]
pub enum Absmax<'a> {
    /// As they are. [num_blocks]
    Plain(&'a [f32]),
    /// Quantized again.
    Nested(Nested<'a>),
}

impl Absmax<'_> {
    /// Of this block. Product and sum round separately, as in the unfused decode of a file.
    #[inline]
    pub(super) fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(values) => values[block],
            Self::Nested(nested) => {
                let scale = nested.scale[block / NESTED_BLOCK];
                nested.map[usize::from(nested.codes[block])] * scale + nested.offset
            }
        }
    }

    /// Panics unless there are values for `num_blocks` blocks.
    pub(super) fn check_len(&self, num_blocks: usize) {
        match self {
            Self::Plain(values) => assert_eq!(values.len(), num_blocks, "an absmax for every block"),
            Self::Nested(nested) => {
                assert_eq!(nested.codes.len(), num_blocks, "an absmax code for every block");
                assert_eq!(
                    nested.scale.len(),
                    num_blocks.div_ceil(NESTED_BLOCK),
                    "a scale for 256 absmax codes"
                );
            }
        }
    }
}

/// The mean in float64: sums of 256 in order, then their sum in order. The same on every backend.
fn mean(values: &[f32]) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    let sum = |run: &[f32]| run.iter().fold(0.0, |sum, &value| sum + f64::from(value));
    let total = values.chunks(NESTED_BLOCK).map(sum).fold(0.0, |total, sum| total + sum);
    (total / values.len() as f64) as f32
}

/// Quantizes the absmax values of a 4-bit tensor and returns the offset, their mean (0 of none).
///
/// `codes` [n], `scale` [ceil_div(n, 256)].
///
/// # Panics
/// Where lengths do not fit.
pub fn quantize_absmax(absmax: &[f32], codes: &mut [u8], scale: &mut [f32], execution: Execution) -> f32 {
    let _ieee = FloatEnvironment::ieee();
    let offset = mean(absmax);
    let centred: Vec<f32> = absmax.iter().map(|value| value - offset).collect();
    super::quantize_blockwise(&centred, &DYNAMIC_SIGNED, NESTED_BLOCK, codes, scale, execution);
    offset
}
