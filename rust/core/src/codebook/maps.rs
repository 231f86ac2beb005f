//! The 256-entry maps, built by rule at compile time where they are the defaults.
//! Dettmers, arXiv:1511.04561, section 2 (dynamic); Dettmers et al., arXiv:2305.14314, section 3 (normal).

use super::NF4_VALUES;
use crate::{Error, ErrorKind, Result};

/// The signed dynamic map, default of the 8-bit ops and of nested statistics. It holds 1.0 but no -1.0.
pub static DYNAMIC_SIGNED: [f32; 256] = dynamic_map(true, 7, 8);

const POWERS_OF_TEN: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];

/// Point `i` of `num` equal steps from `first` to `last`, as torch computes it on machines with a fused multiply-add.
/// The product and the sum are exact in float64 (the step has 24 bits, the index 8, the exponents lie within 32 of
/// each other), so the cast is the only rounding: the same as a fused multiply-add in float32.
const fn linspace(first: f32, last: f32, num: usize, i: usize) -> f32 {
    let step = (last - first) / (num - 1) as f32;
    if i < num / 2 {
        (step as f64 * i as f64 + first as f64) as f32
    } else {
        (last as f64 - step as f64 * (num - 1 - i) as f64) as f32
    }
}

/// Stable insertion sort, ascending.
const fn sort(values: &mut [f32; 256]) {
    let mut i = 1;
    while i < 256 {
        let value = values[i];
        let mut j = i;
        while j > 0 && values[j - 1] > value {
            values[j] = values[j - 1];
            j -= 1;
        }
        values[j] = value;
        i += 1;
    }
}

/// Appends the centres of `num` equal bins of [0.1, 1], times `scale`, and their negatives if `signed`.
const fn push_bins(values: &mut [f32; 256], mut len: usize, num: usize, scale: f32, signed: bool) -> usize {
    let mut j = 0;
    while j < num {
        let centre = (linspace(0.1, 1.0, num + 1, j) + linspace(0.1, 1.0, num + 1, j + 1)) * 0.5;
        values[len] = scale * centre;
        len += 1;
        if signed {
            values[len] = -(scale * centre);
            len += 1;
        }
        j += 1;
    }
    len
}

const fn dynamic_map(signed: bool, max_exponent_bits: usize, total_bits: usize) -> [f32; 256] {
    let mut values = [0.0; 256];
    values[0] = 1.0;
    let mut len = 1;
    let spare_bits = total_bits - 1 - max_exponent_bits;
    let mut i = 0;
    while i < max_exponent_bits {
        let num = 1 << (i + spare_bits + if signed { 0 } else { 1 });
        len = push_bins(&mut values, len, num, POWERS_OF_TEN[i + 7 - max_exponent_bits], signed);
        i += 1;
    }
    // The code points that the sign of a smaller exponent field leaves free go into the last decade once more.
    if spare_bits > 0 {
        push_bins(&mut values, len, (1 << spare_bits) - 1, 1.0, signed);
    }
    sort(&mut values);
    values
}

fn refuse(map: &str, rule: &str, got: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Value, format!("qbits::{map}: {rule}, got {got}"))
}

/// The dynamic map: decades of [0.1, 1], each with twice as many bins as the one below, and 0 and 1.
/// Fewer bits leave zeros in the middle.
///
/// # Errors
/// Where `total_bits` is not 2 to 8, or `max_exponent_bits` not 1 to `total_bits - 1` (unsigned: exactly that).
pub fn create_dynamic_map(signed: bool, max_exponent_bits: u32, total_bits: u32) -> Result<[f32; 256]> {
    let map = "create_dynamic_map";
    if !(2..=8).contains(&total_bits) {
        return Err(refuse(map, "total_bits must be 2 to 8", total_bits));
    }
    if !(1..total_bits).contains(&max_exponent_bits) {
        return Err(refuse(map, "max_exponent_bits must be 1 to total_bits - 1", max_exponent_bits));
    }
    if !signed && max_exponent_bits != total_bits - 1 {
        return Err(refuse(
            map,
            "max_exponent_bits must be total_bits - 1 for an unsigned map",
            max_exponent_bits,
        ));
    }
    Ok(dynamic_map(signed, max_exponent_bits as usize, total_bits as usize))
}

/// Equal steps from -1 (unsigned: 0) to 1. A signed map loses one value so that zero is exact; `add_zero = false` keeps
/// it at eight bits. Fewer bits put zeros in the middle, which leaves an unsigned map unsorted, and a signed one where the
/// rounding of its middle value left a negative residue.
///
/// # Errors
/// Where `total_bits` is not 2 to 8.
pub fn create_linear_map(signed: bool, total_bits: u32, add_zero: bool) -> Result<[f32; 256]> {
    if !(2..=8).contains(&total_bits) {
        return Err(refuse("create_linear_map", "total_bits must be 2 to 8", total_bits));
    }
    let num = (1 << total_bits) - usize::from(signed && (add_zero || total_bits < 8));
    let first = if signed { -1.0 } else { 0.0 };
    let mut values = [0.0; 256];
    for i in 0..num {
        values[if i < num / 2 { i } else { i + 256 - num }] = linspace(first, 1.0, num, i);
    }
    Ok(values)
}

/// Every pair of an exponent and a fraction field, sorted and divided by the maximum; fewer than eight bits add zeros.
/// The exponent field runs downwards and there is neither Inf nor NaN, so this is no OCP FP8.
///
/// # Errors
/// Where `exponent_bits` is not 1 to 7, `total_bits` above 8, or the fields do not fill `total_bits`.
pub fn create_fp8_map(
    signed: bool,
    exponent_bits: u32,
    precision_bits: u32,
    total_bits: u32,
) -> Result<[f32; 256]> {
    let map = "create_fp8_map";
    if !(1..=7).contains(&exponent_bits) {
        return Err(refuse(map, "exponent_bits must be 1 to 7", exponent_bits));
    }
    if total_bits > 8 {
        return Err(refuse(map, "total_bits must be at most 8", total_bits));
    }
    if exponent_bits + precision_bits + u32::from(signed) != total_bits {
        let got = format!("{exponent_bits} + {precision_bits} + {}", u32::from(signed));
        return Err(refuse(
            map,
            &format!("exponent, precision and sign bits must add up to {total_bits}"),
            got,
        ));
    }
    let bias = 1 << (exponent_bits - 1);
    let mut values = [0.0; 256];
    let mut len = 0;
    for exponent in 0..1 << exponent_bits {
        for fraction in 0..1 << precision_bits {
            let fraction = f64::from(fraction) / f64::from(1 << precision_bits);
            let magnitude = match exponent {
                0 => fraction * 2f64.powi(-bias),
                _ => (1.0 + fraction) * 2f64.powi(bias + 1 - exponent),
            } as f32;
            values[len] = magnitude;
            len += 1;
            if signed {
                values[len] = -magnitude;
                len += 1;
            }
        }
    }
    sort(&mut values);
    let max = values[255];
    Ok(values.map(|value| value / max))
}

/// Quantiles of the normal distribution at offset 0.9677083, divided by the largest, with zeros in the middle: seven
/// negative values, and eight positive ones, or seven without the extra value. These are nf4's.
pub fn create_normal_map(use_extra_value: bool) -> [f32; 256] {
    let mut values = [0.0; 256];
    values[..7].copy_from_slice(&NF4_VALUES[..7]);
    if use_extra_value {
        values[248..].copy_from_slice(&NF4_VALUES[8..]);
    } else {
        for (positive, negative) in values[249..].iter_mut().zip(NF4_VALUES[..7].iter().rev()) {
            *positive = -negative;
        }
    }
    values
}
