//! Edges: zeros, NaN, Inf, subnormals, huge values, ties, odd and empty inputs.

use super::*;
use crate::codebook::{Codebook4, DYNAMIC_SIGNED, create_dynamic_map};
use crate::cpu::{
    Absmax, dequantize_4bit, dequantize_no_absmax, pack_4bit, quantize, quantize_4bit, quantize_absmax,
    quantize_blockwise, quantize_no_absmax, unpack_4bit,
};

fn block(first: &[f32], rest: f32) -> Vec<f32> {
    first.iter().copied().chain(std::iter::repeat(rest)).take(64).collect()
}

#[test]
fn quantize_4bit_gives_the_golden_bytes_at_the_edges() {
    let power = |exponent: i32| 2f64.powi(exponent) as f32;
    let cases = [
        (vec![0.0; 64], "77".repeat(32), "00".repeat(32), "00000000"),
        (block(&[f32::NAN], 1.0), "77".repeat(32), "00".repeat(32), "0000c07f"),
        (block(&[f32::NEG_INFINITY], 1.0), "77".repeat(32), "00".repeat(32), "0000807f"),
        (vec![1e-40; 64], "77".repeat(32), "00".repeat(32), "00000000"),
        (vec![1.0, -1.0, 0.5, -0.25, 0.125], "f0c497".into(), "3b5f60".into(), "0000803f"),
        (vec![3e38, -1e38, 1e38, -3e38], "f4b0".into(), "3c4b".into(), "e6b1617f"),
        (vec![power(-126), -power(-127), power(-128), 0.0], "f2a7".into(), "3d70".into(), "00008000"),
        (
            floats("0000803fd81c59bf71783abdfffa223dda895c3f00fb223d"),
            "f067e8".into(),
            "3b9131".into(),
            "0000803f",
        ),
        (
            floats("0000803fb9aa2a3b0000b03d5055153fb9aa2abb0000b0bd505515bf5f7089b0"),
            "f78d7627".into(),
            "301589d8".into(),
            "0000803f",
        ),
    ];
    for execution in executions() {
        for (input, nf4, fp4, scale) in &cases {
            for (codebook, expected) in [(Codebook4::Nf4, nf4), (Codebook4::Fp4, fp4)] {
                let mut packed = vec![0; input.len().div_ceil(2)];
                let mut absmax = [0.0];
                quantize_4bit(input, codebook, 64, &mut packed, &mut absmax, execution);
                assert_eq!(hex(&packed), *expected, "{input:?} {codebook:?} {execution:?}");
                assert_eq!(hex(&absmax.to_bytes()), *scale);
            }
        }
    }
}

#[test]
fn quantize_blockwise_gives_the_golden_codes_at_ties_and_zeros() {
    let mut input = floats("0000803f0000683e6666763e6666823ecdcc90be9a9989be0000000000000080");
    let unsigned = create_dynamic_map(false, 7, 8).unwrap();
    for execution in executions() {
        let mut codes = [0; 8];
        let mut absmax = [0.0];
        quantize_blockwise(&input, &DYNAMIC_SIGNED, 256, &mut codes, &mut absmax, execution);
        assert_eq!(hex(&codes), "ffc8c8ca32347f7f");
        // once more where whole vectors are at work
        input.resize(256, 0.0);
        let mut codes = [0; 256];
        quantize_blockwise(&input, &DYNAMIC_SIGNED, 256, &mut codes, &mut absmax, execution);
        assert_eq!(hex(&codes[..9]), "ffc8c8ca32347f7f7f");
        input.truncate(8);
        for (map, code) in [(&DYNAMIC_SIGNED, 127), (&unsigned, 0)] {
            quantize_blockwise(&[0.0; 256], map, 256, &mut codes, &mut absmax, execution);
            assert_eq!((codes, absmax), ([code; 256], [0.0]));
        }
    }
}

#[test]
fn empty_tensors_have_no_codes() {
    for execution in executions() {
        quantize_4bit::<f32>(&[], Codebook4::Nf4, 64, &mut [], &mut [], execution);
        dequantize_4bit::<f32>(&[], Absmax::Plain(&[]), Codebook4::Nf4, 64, &mut [], execution);
        quantize_blockwise::<f32>(&[], &DYNAMIC_SIGNED, 64, &mut [], &mut [], execution);
        pack_4bit(&[], Codebook4::Nf4, &mut [], execution);
        unpack_4bit(&[], &mut [], execution);
        assert_eq!(quantize_absmax(&[], &mut [], &mut [], execution), 0.0);
        assert_eq!(quantize::<f32>(&[], &DYNAMIC_SIGNED, &mut [], execution), 0.0);
    }
}

#[test]
fn pack_4bit_takes_low_halves_and_pads_with_the_zero_code() {
    for execution in executions() {
        for (codebook, last) in [(Codebook4::Nf4, 0x57), (Codebook4::Fp4, 0x50), (Codebook4::Af4, 0x58)] {
            let mut packed = [0; 2];
            pack_4bit(&[0xf3, 0x1c, 5], codebook, &mut packed, execution);
            assert_eq!(packed, [0x3c, last]);
            let mut codes = [0; 3];
            unpack_4bit(&packed, &mut codes, execution);
            assert_eq!(codes, [3, 12, 5]);
        }
    }
}

#[test]
fn quantize_divides_by_the_absmax_of_the_whole_tensor() {
    let input: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1000) as f32 / 337.0 - 1.5).collect();
    let absmax = input.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let thresholds = crate::codebook::Thresholds::new(&DYNAMIC_SIGNED);
    let expected: Vec<u8> = input.iter().map(|x| thresholds.encode(x / absmax)).collect();
    for execution in executions() {
        let mut codes = vec![0; 1000];
        assert_eq!(quantize(&input, &DYNAMIC_SIGNED, &mut codes, execution), absmax);
        assert_eq!(codes, expected);
        let bad = [&input[..], &[f32::INFINITY]].concat();
        let mut codes = vec![0; 1001];
        assert_eq!(quantize(&bad, &DYNAMIC_SIGNED, &mut codes, execution), f32::INFINITY);
        assert!(codes.iter().all(|&code| code == 127));
    }
}

#[test]
fn quantize_no_absmax_saturates_and_takes_nan_for_zero() {
    let special =
        [2.0, -2.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN, 0.0, -0.0, 1e-45, f32::MAX];
    let expected = [255, 0, 255, 0, 127, 127, 127, 127, 127, 255];
    for execution in executions() {
        // ten at the end, and ten in every place of a vector
        for shift in [0, 3, 6, 64] {
            let input = [&vec![0.5; shift], &special[..], &[-0.5; 64]].concat();
            let mut codes = vec![0; input.len()];
            quantize_no_absmax(&input, &DYNAMIC_SIGNED, &mut codes, execution);
            assert_eq!(codes[shift..shift + 10], expected, "{execution:?}");
            let mut output = vec![0.0f32; input.len()];
            dequantize_no_absmax(&codes, &DYNAMIC_SIGNED, &mut output, execution);
            assert!(output.iter().zip(&codes).all(|(&y, &code)| y == DYNAMIC_SIGNED[usize::from(code)]));
        }
    }
}

#[test]
fn blocks_with_nan_or_inf_decode_to_nan() {
    for execution in executions() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut packed = [0; 64];
            let mut absmax = [0.0; 2];
            let input = [block(&[0.25, bad], 1.0), block(&[], 2.0)].concat();
            quantize_4bit(&input, Codebook4::Nf4, 64, &mut packed, &mut absmax, execution);
            let mut output = [0.0f32; 128];
            dequantize_4bit(&packed, Absmax::Plain(&absmax), Codebook4::Nf4, 64, &mut output, execution);
            assert!(output[..64].iter().all(|y| y.is_nan()) && output[64..] == [2.0; 64]);
        }
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn results_do_not_depend_on_the_callers_float_environment() {
    // the largest subnormals of a block whose scale is normal, and a scale whose inverse is subnormal
    let input = [block(&[1e-38, 1e-40, -2e-39], 3e-40), block(&[3e38], 1e38)].concat();
    let run = |execution| {
        let mut packed = [0; 64];
        let mut absmax = [0.0; 2];
        quantize_4bit(&input, Codebook4::Nf4, 64, &mut packed, &mut absmax, execution);
        let mut output = [0.0f32; 128];
        dequantize_4bit(&packed, Absmax::Plain(&absmax), Codebook4::Nf4, 64, &mut output, execution);
        (packed, absmax, output.map(f32::to_bits))
    };
    for execution in executions() {
        let expected = run(execution);
        let flushing = 0x1f80u32 | 0x8040;
        let mut after = 0u32;
        // SAFETY: both instructions touch the given word only; no float is computed before the default is back.
        let found = unsafe {
            std::arch::asm!("ldmxcsr [{}]", in(reg) &flushing, options(nostack));
            let found = run(execution);
            std::arch::asm!("stmxcsr [{}]", in(reg) &mut after, options(nostack));
            std::arch::asm!("ldmxcsr [{}]", in(reg) &0x1f80u32, options(nostack));
            found
        };
        assert_eq!(after & 0x8040, 0x8040, "the caller's setting came back");
        assert!(found == expected, "{execution:?}");
    }
}
