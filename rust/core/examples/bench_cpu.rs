//! Times of the CPU ops in milliseconds, the least of many runs, on one thread and on two, outputs given.
//!
//! `cargo run --release --example bench_cpu [REPEATS]`; `QBITS_CPU` chooses the instructions.

use half::bf16;
use qbits_core::codebook::{Codebook4, DYNAMIC_SIGNED, create_linear_map};
use qbits_core::cpu::{
    Absmax, Execution, Weight4, dequantize_4bit, dequantize_blockwise, gemm_4bit, quantize_4bit,
    quantize_blockwise,
};
use std::time::Instant;

const N: usize = 4 << 20;
const BLOCK_SIZE: usize = 64;
/// Rows and columns of the weight of the products.
const SIDE: usize = 4096;

fn time_ms(name: &str, repeats: usize, mut run: impl FnMut(Execution)) -> qbits_core::Result<()> {
    print!("{name:44}");
    for threads in [1, 2] {
        let execution = Execution::new(threads)?;
        let mut best = f64::INFINITY;
        for _ in 0..repeats {
            let start = Instant::now();
            run(execution);
            best = best.min(start.elapsed().as_secs_f64() * 1e3);
        }
        print!("{best:10.3}");
    }
    println!();
    Ok(())
}

/// Room for `n` elements that begin at a cache line, as torch's memory does.
fn buffer<T: Clone + Default>(n: usize) -> (Vec<T>, usize) {
    let memory = vec![T::default(); n + 64];
    let begin = memory.as_ptr().align_offset(64);
    (memory, begin)
}

/// Uniform in [-1, 1) and squared with its sign: reproducible, near zero more often than not.
fn weights(n: usize) -> Vec<f32> {
    let mut state = 5u32;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            let u = state as i32 as f32 * 2f32.powi(-31);
            u * u.abs()
        })
        .collect()
}

fn main() -> qbits_core::Result<()> {
    let repeats = std::env::args().nth(1).and_then(|repeats| repeats.parse().ok()).unwrap_or(50);
    let input = weights(N);
    let halves: Vec<bf16> = input.iter().map(|&x| bf16::from_f32(x)).collect();
    let mut packed = vec![0; N / 2];
    let mut absmax = vec![0.0; N / BLOCK_SIZE];
    let mut codes = vec![0; N];
    let (mut values, begin) = buffer::<f32>(N);
    let values = &mut values[begin..][..N];
    let (mut half_values, begin) = buffer::<bf16>(N);
    let half_values = &mut half_values[begin..][..N];
    println!("{:44}{:>10}{:>10}", Execution::new(1)?.isa.name(), "1 thread", "2 threads");
    for codebook in [Codebook4::Fp4, Codebook4::Nf4] {
        time_ms(&format!("quantize_4bit {} float32", codebook.name()), repeats, |execution| {
            quantize_4bit(&input, codebook, BLOCK_SIZE, &mut packed, &mut absmax, execution);
        })?;
    }
    time_ms("quantize_4bit nf4 bfloat16", repeats, |execution| {
        quantize_4bit(&halves, Codebook4::Nf4, BLOCK_SIZE, &mut packed, &mut absmax, execution);
    })?;
    let scales = Absmax::Plain(&absmax);
    time_ms("dequantize_4bit nf4 float32", repeats, |execution| {
        dequantize_4bit(&packed, scales, Codebook4::Nf4, BLOCK_SIZE, values, execution);
    })?;
    time_ms("dequantize_4bit nf4 bfloat16", repeats, |execution| {
        dequantize_4bit(&packed, scales, Codebook4::Nf4, BLOCK_SIZE, half_values, execution);
    })?;
    let mut scales_8bit = vec![0.0; N / 256];
    for (name, map) in [("linear", create_linear_map(true, 8, true)?), ("dynamic", DYNAMIC_SIGNED)] {
        time_ms(&format!("quantize_blockwise {name} float32"), repeats, |execution| {
            quantize_blockwise(&input, &map, 256, &mut codes, &mut scales_8bit, execution);
        })?;
    }
    time_ms("dequantize_blockwise float32", repeats, |execution| {
        dequantize_blockwise(&codes, &scales_8bit, &DYNAMIC_SIGNED, 256, values, execution);
    })?;
    time_ms("dequantize_blockwise bfloat16", repeats, |execution| {
        dequantize_blockwise(&codes, &scales_8bit, &DYNAMIC_SIGNED, 256, half_values, execution);
    })?;

    let input = weights(SIDE * SIDE);
    let mut packed = vec![0; SIDE * SIDE / 2];
    let mut absmax = vec![0.0; SIDE * SIDE / BLOCK_SIZE];
    quantize_4bit(&input, Codebook4::Nf4, BLOCK_SIZE, &mut packed, &mut absmax, Execution::new(2)?);
    let weight = Weight4 {
        packed: &packed,
        absmax: Absmax::Plain(&absmax),
        rows: SIDE,
        columns: SIDE,
        codebook: Codebook4::Nf4,
        block_size: BLOCK_SIZE,
    };
    for tokens in [1, 2, 4, 8, 16, 64, 256] {
        let mut output = vec![0.0f32; tokens * SIDE];
        let input = &input[..tokens * SIDE];
        time_ms(&format!("gemm_4bit nf4 float32 M = {tokens}"), repeats.div_ceil(tokens), |execution| {
            gemm_4bit(input, weight, None, &mut output, execution);
        })?;
    }
    Ok(())
}
