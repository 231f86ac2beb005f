//! The numbers that codes stand for: 16-entry codebooks, 256-entry maps, and the thresholds between their entries.
//! Dettmers et al., QLoRA, arXiv:2305.14314 (nf4); Yoshida, NF4 Isn't Information Theoretically Optimal,
//! arXiv:2306.06965 (af4); Dettmers, 8-bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561.

mod maps;
#[cfg(test)]
mod tests;

pub use maps::{DYNAMIC_SIGNED, create_dynamic_map, create_fp8_map, create_linear_map, create_normal_map};

use crate::{Error, ErrorKind, Result};

/// A built-in codebook of 16 values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codebook4 {
    /// Quantiles of the normal distribution, ascending, with an exact zero.
    Nf4,
    /// A sign bit and eight magnitudes, in the order of bitsandbytes, not of OCP's e2m1.
    Fp4,
    /// Minimal absolute error at block size 64, descending.
    Af4,
}

const fn from_bits<const N: usize>(bits: [u32; N]) -> [f32; N] {
    let mut values = [0.0; N];
    let mut i = 0;
    while i < N {
        values[i] = f32::from_bits(bits[i]);
        i += 1;
    }
    values
}

/// Midpoints of neighbours, each rounded to nearest even.
const fn midpoints(values: &[f32; 16]) -> [f32; 15] {
    let mut middle = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        middle[i] = (values[i] + values[i + 1]) * 0.5;
        i += 1;
    }
    middle
}

static NF4: [f32; 16] = NF4_VALUES;
const NF4_VALUES: [f32; 16] = from_bits([
    0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000,
    0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000,
]);
pub(crate) static NF4_THRESHOLDS: [f32; 15] = midpoints(&NF4_VALUES);

static FP4: [f32; 16] = FP4_VALUES;
const FP4_VALUES: [f32; 16] = from_bits([
    0x00000000, 0x3baaaaab, 0x3f2aaaab, 0x3f800000, 0x3eaaaaab, 0x3f000000, 0x3e2aaaab, 0x3e800000,
    0x00000000, 0xbbaaaaab, 0xbf2aaaab, 0xbf800000, 0xbeaaaaab, 0xbf000000, 0xbe2aaaab, 0xbe800000,
]);
static FP4_DECODED: [f32; 16] = {
    let mut values = FP4_VALUES;
    values[8] = -0.0;
    values
};
/// On magnitudes, by rank. Constants of bitsandbytes' CUDA kernels, some of them ulps away from the midpoints.
pub(crate) static FP4_THRESHOLDS: [f32; 7] =
    from_bits([0x3b2aaab9, 0x3db00000, 0x3e555555, 0x3e955555, 0x3ed55556, 0x3f155550, 0x3f555555]);
/// Code of the magnitude that has so many smaller ones.
pub(crate) static FP4_CODE_OF_RANK: [u8; 8] = [0, 1, 6, 7, 4, 5, 2, 3];

static AF4: [f32; 16] = AF4_VALUES;
const AF4_VALUES: [f32; 16] = from_bits([
    0x3f800000, 0x3f39685c, 0x3f0e1203, 0x3ed9ed55, 0x3ea22dee, 0x3e60e22a, 0x3e0472f9, 0x3d2f075f,
    0x00000000, 0xbd4a2141, 0xbe196bab, 0xbe831c55, 0xbebf54f7, 0xbf032f19, 0xbf31c4dc, 0xbf800000,
]);
pub(crate) static AF4_THRESHOLDS: [f32; 15] = midpoints(&AF4_VALUES);

/// 16 equal steps with zero twice, descending: a codebook to look at, no op takes it.
pub static INT4: [f32; 16] = {
    let mut values = [0.0; 16];
    let mut i = 0;
    while i < 7 {
        values[i] = (7 - i) as f32 / 7.0;
        values[15 - i] = -values[i];
        i += 1;
    }
    values
};

impl Codebook4 {
    /// Every codebook, in the order of the ops' declarations.
    pub const ALL: [Self; 3] = [Self::Nf4, Self::Fp4, Self::Af4];

    /// The name that ops take.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
            Self::Af4 => "af4",
        }
    }

    /// The codebook with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codebook| codebook.name() == name)
    }

    /// Values by code, as checkpoints store them.
    pub fn values(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
            Self::Af4 => &AF4,
        }
    }

    /// Values by code, as decoding uses them: code 8 of fp4 is -0.0.
    pub fn decoded_values(self) -> &'static [f32; 16] {
        match self {
            Self::Fp4 => &FP4_DECODED,
            _ => self.values(),
        }
    }

    /// Where codes meet: between neighbours (nf4 ascending, af4 descending), or between fp4's magnitudes by rank.
    pub fn thresholds(self) -> &'static [f32] {
        match self {
            Self::Nf4 => &NF4_THRESHOLDS,
            Self::Fp4 => &FP4_THRESHOLDS,
            Self::Af4 => &AF4_THRESHOLDS,
        }
    }

    /// Code of 0.0, which also pads an odd count.
    pub const fn zero_code(self) -> u8 {
        match self {
            Self::Nf4 => 7,
            Self::Fp4 => 0,
            Self::Af4 => 8,
        }
    }

    /// Code of `y`. A tie goes to the lower code, of fp4 to the smaller magnitude.
    pub fn encode(self, y: f32) -> u8 {
        match self {
            Self::Nf4 => NF4_THRESHOLDS.iter().map(|&t| u8::from(y > t)).sum(),
            Self::Af4 => AF4_THRESHOLDS.iter().map(|&t| u8::from(y < t)).sum(),
            Self::Fp4 => {
                let rank: usize = FP4_THRESHOLDS.iter().map(|&t| usize::from(y.abs() > t)).sum();
                FP4_CODE_OF_RANK[rank] | (u8::from(y < 0.0) << 3)
            }
        }
    }
}

/// A map of 256 finite, ascending values, or the error of `op` that says what is wrong with it.
pub fn validate_map<'a>(op: &str, map: &'a [f32]) -> Result<&'a [f32; 256]> {
    let fault = |kind, got: String| {
        Error::new(
            kind,
            format!("qbits::{op}: codebook must hold 256 finite values in ascending order, got {got}"),
        )
    };
    let Ok(values) = <&[f32; 256]>::try_from(map) else {
        return Err(fault(ErrorKind::Shape, format!("{} values", map.len())));
    };
    if let Some(i) = values.iter().position(|value| !value.is_finite()) {
        return Err(fault(ErrorKind::Value, format!("{} at index {i}", values[i])));
    }
    match values.windows(2).position(|pair| pair[0] > pair[1]) {
        Some(i) => {
            Err(fault(ErrorKind::Value, format!("{} after {} at index {}", values[i + 1], values[i], i + 1)))
        }
        None => Ok(values),
    }
}

/// The thresholds of an ascending 256-entry map, with the rule for ties folded in: `y` has the code k when it is
/// above exactly k of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Thresholds([f32; 255]);

impl Thresholds {
    /// Thresholds of `map`, which [`validate_map`] accepts. A tie goes to the even index: an odd k is left by its own
    /// midpoint already, so its threshold is the next float below. Not where equal values make the midpoint no border.
    pub fn new(map: &[f32; 256]) -> Self {
        let middle: [f32; 255] = std::array::from_fn(|k| (map[k] + map[k + 1]) * 0.5);
        Self(std::array::from_fn(|k| {
            let is_border = map[k] != map[k + 1] && middle[k.saturating_sub(1)] != middle[k];
            if k % 2 == 1 && is_border { middle[k].next_down() } else { middle[k] }
        }))
    }

    /// The 255 thresholds.
    pub fn as_array(&self) -> &[f32; 255] {
        &self.0
    }

    /// Number of thresholds below `y`. NaN counts as 0.0.
    pub fn encode(&self, y: f32) -> u8 {
        let y = if y.is_nan() { 0.0 } else { y };
        // Eight halvings without a branch: which way they go is random data.
        let mut code = 0;
        let mut step = 128;
        while step > 0 {
            code += if y > self.0[code + step - 1] { step } else { 0 };
            step /= 2;
        }
        code as u8
    }
}
