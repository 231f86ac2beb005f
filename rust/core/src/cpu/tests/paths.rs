//! Every instruction set and number of threads against the scalar path on one thread, to the bit.

use super::*;
use crate::codebook::{
    Codebook4, DYNAMIC_SIGNED, create_dynamic_map, create_fp8_map, create_linear_map, create_normal_map,
};
use crate::cpu::{
    Absmax, Nested, dequantize, dequantize_4bit, dequantize_blockwise, quantize, quantize_4bit,
    quantize_absmax, quantize_blockwise, quantize_no_absmax,
};
use half::f16;
use proptest::prelude::*;

pub(super) const SCALAR: Execution = Execution { isa: Isa::SCALAR, threads: 1 };

/// A generator of bits that needs no state elsewhere (splitmix64).
struct Bits(u64);

impl Bits {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (((z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)) >> 32) as u32
    }

    /// Near zero more often than not, as weights are.
    fn weight(&mut self) -> f32 {
        let u = self.next() as i32 as f32 * 2f32.powi(-31);
        u * u.abs()
    }
}

/// How the elements of a block are drawn.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Weights,
    /// Weights at the ends of the range of float32.
    Tiny,
    Huge,
    /// The largest is 1, so that the others are what thresholds are compared with: they and their neighbours.
    Thresholds,
    /// Any pattern of bits, with NaN and Inf.
    Any,
}

fn draw(kind: Kind, i: usize, bits: &mut Bits) -> f32 {
    match kind {
        Kind::Weights => bits.weight(),
        Kind::Tiny => bits.weight() * 2f32.powi(-120 - (bits.next() % 10) as i32),
        Kind::Huge => bits.weight() * 2f32.powi(127),
        Kind::Thresholds if i.is_multiple_of(32) => 1.0,
        Kind::Thresholds => {
            let codebook = Codebook4::ALL[bits.next() as usize % 3];
            let middle = (DYNAMIC_SIGNED[i % 255] + DYNAMIC_SIGNED[i % 255 + 1]) * 0.5;
            let thresholds = codebook.thresholds();
            let t = match bits.next() % 4 {
                0 => middle,
                1 => -thresholds[bits.next() as usize % thresholds.len()],
                _ => thresholds[bits.next() as usize % thresholds.len()],
            };
            [t.next_down(), t, t.next_up()][bits.next() as usize % 3]
        }
        Kind::Any => f32::from_bits(bits.next()),
    }
}

/// Elements of which every 64 are of one kind. Bits of float16 and bfloat16 that are NaN stay so.
pub(super) fn elements<T: Float>(n: usize, seed: u64) -> Vec<T> {
    let mut bits = Bits(seed);
    let mut kind = Kind::Weights;
    (0..n)
        .map(|i| {
            if i.is_multiple_of(64) {
                let kinds = [
                    Kind::Weights,
                    Kind::Weights,
                    Kind::Tiny,
                    Kind::Huge,
                    Kind::Thresholds,
                    Kind::Thresholds,
                    Kind::Any,
                ];
                kind = kinds[bits.next() as usize % kinds.len()];
            }
            T::from_f32(draw(kind, i, &mut bits))
        })
        .collect()
}

/// Every other way to run: one thread, and more of them where there is work for them.
pub(super) fn others(n: usize) -> impl Iterator<Item = Execution> {
    let threads: &[usize] = if n < 65_536 { &[1] } else { &[1, 3] };
    let all = Isa::available().flat_map(|isa| threads.iter().map(move |&threads| Execution { isa, threads }));
    all.filter(|execution| execution.isa != Isa::SCALAR || execution.threads > 1)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Quantized and decoded to each type.
type Result4 = (Vec<u8>, Vec<u32>, Vec<u8>, Vec<u8>, Vec<u8>);

fn run_4bit<T: Float>(input: &[T], codebook: Codebook4, block_size: usize, execution: Execution) -> Result4 {
    let n = input.len();
    let mut packed = vec![0xa5; n.div_ceil(2)];
    let mut absmax = vec![-1.0; n.div_ceil(block_size)];
    quantize_4bit(input, codebook, block_size, &mut packed, &mut absmax, execution);
    fn decode<U: Float>(
        packed: &[u8],
        absmax: &[f32],
        codebook: Codebook4,
        block_size: usize,
        n: usize,
        execution: Execution,
    ) -> Vec<u8> {
        let mut output = vec![U::default(); n];
        dequantize_4bit(packed, Absmax::Plain(absmax), codebook, block_size, &mut output, execution);
        output.to_bytes()
    }
    let float32 = decode::<f32>(&packed, &absmax, codebook, block_size, n, execution);
    let float16 = decode::<f16>(&packed, &absmax, codebook, block_size, n, execution);
    let bfloat16 = decode::<bf16>(&packed, &absmax, codebook, block_size, n, execution);
    (packed, bits(&absmax), float32, float16, bfloat16)
}

fn check_4bit<T: Float>(n: usize, block_size: usize, seed: u64) {
    let input = elements::<T>(n, seed);
    for codebook in Codebook4::ALL {
        let expected = run_4bit(&input, codebook, block_size, SCALAR);
        for execution in others(n) {
            let found = run_4bit(&input, codebook, block_size, execution);
            assert!(found == expected, "{codebook:?} {block_size} n = {n} seed = {seed} {execution:?}");
        }
    }
}

#[test]
fn paths_of_4bit_agree_at_every_size() {
    for block_size in [32, 64, 128, 256, 512, 1024, 2048, 4096] {
        for n in [1, 31, 65, block_size - 1, block_size, block_size + 1, 2 * block_size + 77] {
            check_4bit::<f32>(n, block_size, n as u64);
            check_4bit::<f16>(n, block_size, n as u64 + 1);
            check_4bit::<bf16>(n, block_size, n as u64 + 2);
        }
    }
}

#[test]
fn paths_of_4bit_agree_where_threads_share_the_work() {
    for (n, block_size) in [(70_003, 32), (65_536, 64), (70_001, 4096)] {
        check_4bit::<f32>(n, block_size, 5);
        check_4bit::<bf16>(n, block_size, 6);
    }
}

#[test]
fn paths_of_nested_decoding_agree() {
    for (n, block_size) in [(70_001usize, 64), (66_000, 32), (33, 32)] {
        let mut bits = Bits(9);
        let input: Vec<f32> = (0..n).map(|_| bits.weight()).collect();
        let mut packed = vec![0; n.div_ceil(2)];
        let mut absmax = vec![0.0; n.div_ceil(block_size)];
        quantize_4bit(&input, Codebook4::Nf4, block_size, &mut packed, &mut absmax, SCALAR);
        let run = |execution| {
            let mut codes = vec![0; absmax.len()];
            let mut scale = vec![0.0; absmax.len().div_ceil(256)];
            let offset = quantize_absmax(&absmax, &mut codes, &mut scale, execution);
            let nested = Nested { codes: &codes, scale: &scale, offset, map: &DYNAMIC_SIGNED };
            let mut output = vec![bf16::ZERO; n];
            dequantize_4bit(
                &packed,
                Absmax::Nested(nested),
                Codebook4::Nf4,
                block_size,
                &mut output,
                execution,
            );
            (codes, scale, offset, output)
        };
        let expected = run(SCALAR);
        for execution in others(n) {
            assert!(run(execution) == expected, "{n} {execution:?}");
        }
    }
}

/// Elements of every pattern of a two-byte type, in an order that mixes their magnitudes.
fn every_pattern<T: Float>(from_bits: fn(u16) -> T) -> Vec<T> {
    (0..=u16::MAX).map(|i| from_bits(i.wrapping_mul(40_503))).collect()
}

fn check_every_pattern<T: Float>(from_bits: fn(u16) -> T) {
    let finite = |x: &T| x.to_f32().is_finite();
    let input = every_pattern(from_bits);
    let finite: Vec<T> = input.iter().copied().filter(finite).collect();
    for input in [&input, &finite] {
        let expected = run_4bit(input, Codebook4::Fp4, 32, SCALAR);
        let expected_8bit = run_8bit(input, &DYNAMIC_SIGNED, 64, SCALAR);
        for execution in others(0) {
            assert!(run_4bit(input, Codebook4::Fp4, 32, execution) == expected, "{execution:?}");
            assert!(run_8bit(input, &DYNAMIC_SIGNED, 64, execution) == expected_8bit, "{execution:?}");
        }
    }
}

#[test]
fn paths_agree_on_every_pattern_of_two_bytes() {
    check_every_pattern(f16::from_bits);
    check_every_pattern(bf16::from_bits);
}

fn check_decoding<T: Float>(packed: &[u8], absmax: &[f32]) {
    for (block_size, n) in [(32, 2 * packed.len()), (64, 2 * packed.len() - 1), (256, 2 * packed.len() - 33)]
    {
        for codebook in Codebook4::ALL {
            let run = |execution| {
                let absmax = Absmax::Plain(&absmax[..n.div_ceil(block_size)]);
                let mut output = vec![T::default(); n];
                dequantize_4bit(
                    &packed[..n.div_ceil(2)],
                    absmax,
                    codebook,
                    block_size,
                    &mut output,
                    execution,
                );
                output.to_bytes()
            };
            let run_8bit = |execution| {
                let mut output = vec![T::default(); packed.len()];
                let absmax = &absmax[..packed.len().div_ceil(block_size)];
                dequantize_blockwise(packed, absmax, &DYNAMIC_SIGNED, block_size, &mut output, execution);
                output.to_bytes()
            };
            let (expected, expected_8bit) = (run(SCALAR), run_8bit(SCALAR));
            for execution in others(0) {
                assert!(run(execution) == expected, "{codebook:?} {block_size} {execution:?}");
                assert!(run_8bit(execution) == expected_8bit, "{block_size} {execution:?}");
            }
        }
    }
}

#[test]
fn paths_of_decoding_agree_on_any_bits() {
    let mut bits = Bits(77);
    let packed: Vec<u8> = (0..40_000).map(|_| bits.next() as u8).collect();
    // every kind of NaN, with payloads that rounding to a shorter type must not turn into numbers
    let special =
        [0x7fff_ffff, 0xffff_ffff, 0x7f80_0001, 0xff80_8000, 0x7f80_0000, 1, 0x8000_0000, 0x7f7f_ffff];
    let absmax: Vec<f32> =
        (0..2500).map(|i| f32::from_bits(*special.get(i).unwrap_or(&bits.next()))).collect();
    check_decoding::<f32>(&packed, &absmax);
    check_decoding::<f16>(&packed, &absmax);
    check_decoding::<bf16>(&packed, &absmax);
}

fn maps() -> Vec<[f32; 256]> {
    let mut lopsided = DYNAMIC_SIGNED.map(|value| value * 3.0 + 1.0);
    lopsided[..40].fill(-5e30);
    vec![
        DYNAMIC_SIGNED,
        create_dynamic_map(false, 7, 8).unwrap(),
        create_linear_map(true, 8, true).unwrap(),
        create_normal_map(true),
        create_fp8_map(true, 4, 3, 8).unwrap(),
        create_fp8_map(true, 5, 2, 8).unwrap(),
        lopsided,
        // too close for any table of exponents
        std::array::from_fn(|i| f32::from_bits(0x3f00_0000 + i as u32)),
        [0.0; 256],
    ]
}

/// Codes, scales and values of every 8-bit op.
type Result8 = (Vec<u8>, Vec<u32>, Vec<u8>, u32, Vec<u8>, Vec<u8>, Vec<u8>);

fn run_8bit<T: Float>(input: &[T], map: &[f32; 256], block_size: usize, execution: Execution) -> Result8 {
    let n = input.len();
    let mut codes = vec![0xa5; n];
    let mut absmax = vec![-1.0; n.div_ceil(block_size)];
    quantize_blockwise(input, map, block_size, &mut codes, &mut absmax, execution);
    let mut values = vec![T::default(); n];
    dequantize_blockwise(&codes, &absmax, map, block_size, &mut values, execution);
    let mut whole = vec![0xa5; n];
    let scale = quantize(input, map, &mut whole, execution);
    let mut plain = vec![0xa5; n];
    quantize_no_absmax(input, map, &mut plain, execution);
    let mut whole_values = vec![T::default(); n];
    dequantize(&whole, scale, map, &mut whole_values, execution);
    (codes, bits(&absmax), values.to_bytes(), scale.to_bits(), whole, plain, whole_values.to_bytes())
}

fn check_8bit<T: Float>(n: usize, block_size: usize, seed: u64) {
    let mut input = elements::<T>(n, seed);
    if seed.is_multiple_of(2) {
        // a whole tensor with a NaN has no codes to compare
        input.iter_mut().for_each(|x| *x = if x.to_f32().is_finite() { *x } else { T::from_f32(0.5) });
    }
    for (i, map) in maps().iter().enumerate() {
        let expected = run_8bit(&input, map, block_size, SCALAR);
        for execution in others(n) {
            let found = run_8bit(&input, map, block_size, execution);
            assert!(found == expected, "map {i} {block_size} n = {n} seed = {seed} {execution:?}");
        }
    }
}

#[test]
fn paths_of_8bit_agree_at_every_size() {
    for block_size in [64, 256, 4096] {
        for n in [1, 17, block_size - 1, block_size, block_size + 1, 2 * block_size + 77] {
            check_8bit::<f32>(n, block_size, n as u64);
            check_8bit::<f16>(n, block_size, n as u64 + 1);
            check_8bit::<bf16>(n, block_size, n as u64 + 2);
        }
    }
}

#[test]
fn paths_of_8bit_agree_where_threads_share_the_work() {
    check_8bit::<f32>(66_003, 256, 4);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn paths_agree_on_random_sizes_and_bits(n in 0usize..9000, seed: u64, shift in 0u32..7) {
        check_4bit::<f32>(n, 64 << shift, seed);
        check_4bit::<f16>(n, 64 << shift, seed);
        check_4bit::<bf16>(n, 32, seed);
        check_8bit::<f32>(n, 64 << shift, seed);
    }
}
