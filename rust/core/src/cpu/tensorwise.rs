//! 8-bit quantization of a whole tensor with one scale, or with none.
//! Dettmers, 8-bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561, section 2.

use std::sync::atomic::{AtomicU32, Ordering};

use super::Execution;
use super::absmax::{Scale, max_abs_bits};
use super::blockwise_8bit::{Encoder, Scaling, decode};
use super::float::Float;
use super::threads::{FloatEnvironment, for_each, part_len};

/// Elements of which every part is a multiple.
const UNIT: usize = 64;

/// Quantizes `input` [n] with the ascending `map` to `codes` [n] and returns the absmax. Elements are divided by it,
/// not multiplied by its inverse.
///
/// # Panics
/// Where lengths do not fit.
pub fn quantize<T: Float>(input: &[T], map: &[f32; 256], codes: &mut [u8], execution: Execution) -> f32 {
    assert_eq!(codes.len(), input.len(), "a code for every element");
    let _ieee = FloatEnvironment::ieee();
    let len = part_len(input.len(), UNIT, execution.threads);
    let encoder = Encoder::new(map, input.len(), execution.isa);
    let max_bits = AtomicU32::new(0);
    for_each(execution.threads, input.chunks(len), |input| {
        max_bits.fetch_max(max_abs_bits(input, execution.isa), Ordering::Relaxed);
    });
    let scale = Scale::from_bits(max_bits.into_inner());
    match scale.inverse {
        0.0 => codes.fill(encoder.zero_code()),
        _ => encode(input, Scaling::Divide(scale.absmax), &encoder, codes, execution),
    }
    scale.absmax
}

/// Codes of `input` [n] as it is. Values outside the map saturate; NaN takes the code of 0.0.
///
/// # Panics
/// Where lengths do not fit.
pub fn quantize_no_absmax<T: Float>(input: &[T], map: &[f32; 256], codes: &mut [u8], execution: Execution) {
    assert_eq!(codes.len(), input.len(), "a code for every element");
    let _ieee = FloatEnvironment::ieee();
    let encoder = Encoder::new(map, input.len(), execution.isa);
    encode(input, Scaling::Multiply(1.0), &encoder, codes, execution);
}

/// Decodes `codes` [n] to `output` [n] with one scale.
///
/// # Panics
/// Where lengths do not fit.
pub fn dequantize<T: Float>(
    codes: &[u8],
    absmax: f32,
    map: &[f32; 256],
    output: &mut [T],
    execution: Execution,
) {
    assert_eq!(codes.len(), output.len(), "a code for every element");
    let _ieee = FloatEnvironment::ieee();
    let len = part_len(output.len(), UNIT, execution.threads);
    for_each(execution.threads, codes.chunks(len).zip(output.chunks_mut(len)), |(codes, output)| {
        decode(codes, map, absmax, output, execution.isa);
    });
}

/// The map's values for `codes` [n].
///
/// # Panics
/// Where lengths do not fit.
pub fn dequantize_no_absmax<T: Float>(
    codes: &[u8],
    map: &[f32; 256],
    output: &mut [T],
    execution: Execution,
) {
    dequantize(codes, 1.0, map, output, execution);
}

fn encode<T: Float>(
    input: &[T],
    scaling: Scaling,
    encoder: &Encoder,
    codes: &mut [u8],
    execution: Execution,
) {
    let len = part_len(input.len(), UNIT, execution.threads);
    for_each(execution.threads, input.chunks(len).zip(codes.chunks_mut(len)), |(input, codes)| {
        encoder.encode(input, scaling, codes, execution.isa);
    });
}
