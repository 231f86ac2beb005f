//! 4-bit blockwise quantization: a scale per block, two codes to a byte, the even element in the high nibble.
//! Dettmers et al., QLoRA, arXiv:2305.14314, section 3.

use super::absmax::{Scale, max_abs_bits_scalar};
use super::float::Float;
use super::isa::{Isa, Level};
use super::threads::{FloatEnvironment, for_each, part_len};
use super::{Absmax, Execution};
#[cfg(target_arch = "x86_64")]
use super::{blockwise_4bit_avx2 as avx2, blockwise_4bit_avx512 as avx512};
use crate::codebook::Codebook4;

/// Elements that the SIMD kernels take at a time: parts, and what is decoded, begin at multiples of it.
pub(super) const GROUP: usize = 64;
const MAX_BLOCK: usize = 4096;

/// Quantizes `input` [n] to `packed` [ceil_div(n, 2)] and `absmax` [ceil_div(n, block_size)].
///
/// # Panics
/// Where lengths do not fit, or `block_size` is not a power of two from 32 to 4096.
pub fn quantize_4bit<T: Float>(
    input: &[T],
    codebook: Codebook4,
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
    execution: Execution,
) {
    check_block_size(block_size);
    assert_eq!(packed.len(), input.len().div_ceil(2), "two codes to a byte");
    assert_eq!(absmax.len(), input.len().div_ceil(block_size), "an absmax for every block");
    let _ieee = FloatEnvironment::ieee();
    let len = part_len(input.len(), block_size.max(GROUP), execution.threads);
    let parts = input.chunks(len).zip(packed.chunks_mut(len / 2)).zip(absmax.chunks_mut(len / block_size));
    for_each(execution.threads, parts, |((input, packed), absmax)| {
        quantize_blocks(input, codebook, block_size, packed, absmax, execution.isa);
    });
}

/// Decodes `output.len()` elements of `packed` [ceil_div(n, 2)].
///
/// # Panics
/// As [`quantize_4bit`].
pub fn dequantize_4bit<T: Float>(
    packed: &[u8],
    absmax: Absmax<'_>,
    codebook: Codebook4,
    block_size: usize,
    output: &mut [T],
    execution: Execution,
) {
    check_block_size(block_size);
    assert_eq!(packed.len(), output.len().div_ceil(2), "two codes to a byte");
    absmax.check_len(output.len().div_ceil(block_size));
    let _ieee = FloatEnvironment::ieee();
    let len = part_len(output.len(), block_size.max(GROUP), execution.threads);
    for_each(execution.threads, output.chunks_mut(len).enumerate(), |(i, output)| {
        decode(packed, absmax, codebook, block_size, i * len, output, execution.isa);
    });
}

/// Packs the low four bits of `codes` [n] into `packed` [ceil_div(n, 2)]; an odd n is padded with the zero code.
///
/// # Panics
/// Where lengths do not fit.
pub fn pack_4bit(codes: &[u8], codebook: Codebook4, packed: &mut [u8], execution: Execution) {
    assert_eq!(packed.len(), codes.len().div_ceil(2), "two codes to a byte");
    let len = part_len(codes.len(), GROUP, execution.threads);
    for_each(execution.threads, codes.chunks(len).zip(packed.chunks_mut(len / 2)), |(codes, packed)| {
        let (pairs, last) = codes.as_chunks::<2>();
        for (byte, [high, low]) in packed.iter_mut().zip(pairs) {
            *byte = high << 4 | low & 15;
        }
        if let ([high], Some(byte)) = (last, packed.last_mut()) {
            *byte = high << 4 | codebook.zero_code();
        }
    });
}

/// The `codes.len()` codes of `packed` [ceil_div(n, 2)].
///
/// # Panics
/// Where lengths do not fit.
pub fn unpack_4bit(packed: &[u8], codes: &mut [u8], execution: Execution) {
    assert_eq!(packed.len(), codes.len().div_ceil(2), "two codes to a byte");
    let len = part_len(codes.len(), GROUP, execution.threads);
    for_each(execution.threads, packed.chunks(len / 2).zip(codes.chunks_mut(len)), |(packed, codes)| {
        let (pairs, last) = codes.as_chunks_mut::<2>();
        for ([high, low], byte) in pairs.iter_mut().zip(packed) {
            (*high, *low) = (byte >> 4, byte & 15);
        }
        if let ([high], Some(byte)) = (last, packed.last()) {
            *high = byte >> 4;
        }
    });
}

fn check_block_size(block_size: usize) {
    assert!(
        block_size.is_power_of_two() && (32..=MAX_BLOCK).contains(&block_size),
        "a block size of a 4-bit op"
    );
}

/// Quantizes whole blocks, and a last one that may be short.
fn quantize_blocks<T: Float>(
    input: &[T],
    codebook: Codebook4,
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
    isa: Isa,
) {
    if isa.level() == Level::Scalar {
        return quantize_scalar(input, codebook, block_size, packed, absmax);
    }
    let unit = block_size.max(GROUP);
    let whole = input.len() / unit * unit;
    let (input, rest) = input.split_at(whole);
    let (packed, rest_packed) = packed.split_at_mut(whole / 2);
    let (absmax, rest_absmax) = absmax.split_at_mut(whole / block_size);
    quantize_units(input, codebook, block_size, packed, absmax, isa);
    if rest.is_empty() {
        return;
    }
    // Zeros behind the end change no absmax and give the code that pads an odd count.
    let padded_len = rest.len().next_multiple_of(GROUP);
    let mut padded = [T::default(); MAX_BLOCK];
    padded[..rest.len()].copy_from_slice(rest);
    let mut codes = [0; MAX_BLOCK / 2];
    let mut scales = [0.0; 2];
    let block_size = if block_size < GROUP { block_size } else { padded_len };
    quantize_units(
        &padded[..padded_len],
        codebook,
        block_size,
        &mut codes[..padded_len / 2],
        &mut scales,
        isa,
    );
    rest_packed.copy_from_slice(&codes[..rest_packed.len()]);
    rest_absmax.copy_from_slice(&scales[..rest_absmax.len()]);
}

/// Quantizes blocks of a multiple of [`GROUP`], or an even number of blocks of 32.
fn quantize_units<T: Float>(
    input: &[T],
    codebook: Codebook4,
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
    isa: Isa,
) {
    match isa.level() {
        // SAFETY: an `Isa` of this level exists only where the CPU has the features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::quantize(input, codebook, block_size, packed, absmax) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::quantize(input, codebook, block_size, packed, absmax) },
        Level::Scalar => quantize_scalar(input, codebook, block_size, packed, absmax),
    }
}

/// The reference.
fn quantize_scalar<T: Float>(
    input: &[T],
    codebook: Codebook4,
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let blocks = input.chunks(block_size).zip(packed.chunks_mut(block_size / 2)).zip(absmax);
    for ((block, packed), absmax) in blocks {
        let scale = Scale::from_bits(max_abs_bits_scalar(block));
        *absmax = scale.absmax;
        let encode = |x: T| match scale.inverse {
            0.0 => codebook.zero_code(),
            inverse => codebook.encode(x.to_f32() * inverse),
        };
        for (byte, pair) in packed.iter_mut().zip(block.chunks(2)) {
            let low = pair.get(1).map_or(codebook.zero_code(), |&x| encode(x));
            *byte = encode(pair[0]) << 4 | low;
        }
    }
}

/// Decodes the elements `first..first + output.len()`; `first` is a multiple of [`GROUP`].
pub(super) fn decode<T: Float>(
    packed: &[u8],
    absmax: Absmax<'_>,
    codebook: Codebook4,
    block_size: usize,
    first: usize,
    output: &mut [T],
    isa: Isa,
) {
    debug_assert_eq!(first % GROUP, 0, "groups lie in one block and begin with a byte");
    if isa.level() == Level::Scalar {
        return decode_scalar(packed, absmax, codebook, block_size, first, output);
    }
    let (whole, rest) = output.split_at_mut(output.len() / GROUP * GROUP);
    decode_vectors(packed, absmax, codebook, block_size, first, whole, isa);
    decode_scalar(packed, absmax, codebook, block_size, first + whole.len(), rest);
}

/// Decodes a multiple of [`GROUP`] elements.
fn decode_vectors<T: Float>(
    packed: &[u8],
    absmax: Absmax<'_>,
    codebook: Codebook4,
    block_size: usize,
    first: usize,
    output: &mut [T],
    isa: Isa,
) {
    match isa.level() {
        // SAFETY: an `Isa` of this level exists only where the CPU has the features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe {
            avx512::decode(packed, absmax, codebook.decoded_values(), block_size, first, output)
        },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe {
            avx2::decode(packed, absmax, codebook.decoded_values(), block_size, first, output)
        },
        Level::Scalar => decode_scalar(packed, absmax, codebook, block_size, first, output),
    }
}

/// The reference.
fn decode_scalar<T: Float>(
    packed: &[u8],
    absmax: Absmax<'_>,
    codebook: Codebook4,
    block_size: usize,
    first: usize,
    output: &mut [T],
) {
    let values = codebook.decoded_values();
    for (i, output) in output.iter_mut().enumerate() {
        let i = first + i;
        let code = packed[i / 2] >> (4 * (1 - i % 2)) & 15;
        *output = T::from_f32(values[usize::from(code)] * absmax.get(i / block_size));
    }
}
