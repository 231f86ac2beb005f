//! Tests of the CPU kernels: golden vectors, edges, and every path against the scalar one.

mod edges;
mod gemm;
mod gemm_int8;
mod golden;
mod int8;
mod paths;
mod threads;

use super::{Execution, Float, Isa};
use half::bf16;
use sha2::{Digest, Sha256};

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(|digit| !digit.is_ascii_whitespace()).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn floats(hex: &str) -> Vec<f32> {
    bytes(hex).chunks(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
}

fn bfloats(hex: &str) -> Vec<bf16> {
    bytes(hex).chunks(2).map(|word| bf16::from_le_bytes(word.try_into().unwrap())).collect()
}

/// Little-endian memory of elements.
trait ToBytes {
    fn to_bytes(&self) -> Vec<u8>;
}

impl<T: Float> ToBytes for [T] {
    fn to_bytes(&self) -> Vec<u8> {
        let size = T::DTYPE.size();
        // to_f32 is exact, and the high half of a bfloat16's float32 is the bfloat16 itself
        self.iter()
            .flat_map(|x| match size {
                4 => x.to_f32().to_le_bytes().to_vec(),
                _ if T::DTYPE == crate::Dtype::Bfloat16 => x.to_f32().to_le_bytes()[2..].to_vec(),
                _ => half::f16::from_f32(x.to_f32()).to_le_bytes().to_vec(),
            })
            .collect()
    }
}

/// Every instruction set of this machine, on one thread.
fn executions() -> impl Iterator<Item = Execution> {
    Isa::available().map(|isa| Execution { isa, threads: 1 })
}
