//! Quantizes a weight to nf4 from Rust alone, decodes it, and multiplies with it.
//!
//! `cargo run --release --example quantize`

use qbits_core::codebook::Codebook4;
use qbits_core::cpu::{Absmax, Execution, Weight4, dequantize_4bit, gemm_4bit, quantize_4bit};

const ROWS: usize = 256;
const COLUMNS: usize = 512;
const BLOCK_SIZE: usize = 64;

fn main() -> qbits_core::Result<()> {
    let weight: Vec<f32> = (0..ROWS * COLUMNS).map(|i| (i as f32 * 0.37).sin() / 16.0).collect();
    let execution = Execution::new(2)?;

    let mut packed = vec![0; weight.len().div_ceil(2)];
    let mut absmax = vec![0.0; weight.len().div_ceil(BLOCK_SIZE)];
    quantize_4bit(&weight, Codebook4::Nf4, BLOCK_SIZE, &mut packed, &mut absmax, execution);

    let scales = Absmax::Plain(&absmax);
    let mut decoded = vec![0.0f32; weight.len()];
    dequantize_4bit(&packed, scales, Codebook4::Nf4, BLOCK_SIZE, &mut decoded, execution);
    let noise: f32 = weight.iter().zip(&decoded).map(|(x, y)| (x - y).powi(2)).sum();
    let signal: f32 = weight.iter().map(|x| x.powi(2)).sum();

    let input: Vec<f32> = (0..COLUMNS).map(|i| (i as f32 * 0.11).cos()).collect();
    let mut output = vec![0.0f32; ROWS];
    let quantized = Weight4 {
        packed: &packed,
        absmax: scales,
        rows: ROWS,
        columns: COLUMNS,
        codebook: Codebook4::Nf4,
        block_size: BLOCK_SIZE,
    };
    gemm_4bit(&input, quantized, None, &mut output, execution);

    println!("instructions: {}", execution.isa.name());
    println!("bytes: {} -> {}", 4 * weight.len(), packed.len() + 4 * absmax.len());
    println!("signal to quantization noise: {:.1} dB", 10.0 * (signal / noise).log10());
    println!("output[..4]: {:?}", &output[..4]);
    Ok(())
}
