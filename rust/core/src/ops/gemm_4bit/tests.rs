//! The dispatch rule, and the product that the tests of the families plan.

use super::*;
use crate::cuda::recorder::{Machine, Recorder};
use crate::cuda::{H200, Stream};
use crate::tensor::Device;

/// A device tensor at an address that nobody reads.
pub fn tensor(address: usize, dtype: Dtype, shape: &[i64]) -> Tensor {
    Tensor::new(std::ptr::without_provenance_mut(address), dtype, Device::Cuda(0), shape)
}

/// A product of tensors at addresses that nobody reads.
pub fn product(m: i64, n: i64, k: i64, block_size: i64, is_nested: bool) -> Gemm4bit {
    let blocks = n * k / block_size;
    let nested = |address, length| is_nested.then(|| tensor(address, Dtype::Float32, &[length]));
    Gemm4bit {
        input: tensor(0x1000, Dtype::Bfloat16, &[m, k]),
        packed: tensor(0x2000, Dtype::Uint8, &[n * k / 2]),
        absmax: tensor(0x3000, if is_nested { Dtype::Uint8 } else { Dtype::Float32 }, &[blocks]),
        N: n,
        K: k,
        codebook: "nf4",
        block_size,
        bias: None,
        absmax_scale: nested(0x4000, (blocks + 255) / 256),
        absmax_offset: nested(0x5000, 1),
        absmax_codebook: None,
        output: tensor(0x6000, Dtype::Bfloat16, &[m, n]),
    }
}

#[test]
fn the_rule_names_a_family_that_fits_or_declines() {
    let problem = product(1, 4096, 4096, 64, false).problem();
    let fastest = |m, capability| {
        let limits = Limits { capability, ..H200 };
        Problem { m, ..problem }.fastest(Some(&limits), None).name()
    };
    assert_eq!(Problem { m: 8, ..problem }.fastest(None, None), Way::Cpu);
    assert_eq!(Problem { m: 1000, ..problem }.fastest(None, None), Way::Dequantize);
    assert_eq!((fastest(1, (7, 5)), fastest(9, (7, 5))), ("simt", "dequantize"));
    assert_eq!((fastest(1, (8, 0)), fastest(33, (8, 0))), ("skinny", "dequantize"));
    assert_eq!((fastest(1, (10, 0)), fastest(33, (12, 0))), ("skinny", "dequantize"));
    for (m, image, family) in
        [(1, "gemm_4bit_skinny_sm90", "skinny_sm90"), (100, "gemm_4bit_mid_sm90", "mid")]
    {
        assert_eq!(fastest(m, (9, 0)) == family, is_built(image));
    }
}

#[test]
fn a_forced_family_counts_wherever_it_can_run() {
    let problem = product(200, 4096, 4096, 64, false).problem();
    let forced = |problem: Problem, family| problem.fastest(Some(&H200), Some(family)).name();
    assert_eq!(forced(problem, Family::Simt), "simt");
    assert_eq!(forced(problem, Family::Skinny), "skinny");
    let float = Problem { m: 3, dtype: Dtype::Float32, ..problem };
    assert_eq!(forced(float, Family::Skinny), "simt");
    assert_eq!(float.family(&H200, Some(Family::Mid)), Family::Simt);
    assert_eq!(Problem { m: 100, ..float }.fastest(Some(&H200), None), Way::Dequantize);
    assert_eq!(Problem { m: 100, ..float }.family(&H200, None), Family::Simt);
}

#[test]
fn kernels_that_wait_themselves_are_launched_as_dependent_ones() {
    let stream = Stream { handle: std::ptr::null_mut(), device: 0 };
    for (m, k, image) in [
        (1, 4096, "gemm_4bit_skinny_sm90"),
        (40, 4096, "gemm_4bit_mid_sm90"),
        (300, 4096, "gemm_4bit_large_sm90"),
    ] {
        for weights_are_ready in [false, true].into_iter().filter(|_| is_built(image)) {
            let recorder = Recorder::install(Machine::h200());
            // SAFETY: the recorder stands in for the driver: no address is read.
            unsafe { Cuda { stream, weights_are_ready }.run(&product(m, 4096, k, 64, false)) }.unwrap();
            let launches = recorder.launches();
            assert_eq!((launches.len(), launches[0].dependent), (1, true), "{}", launches[0].kernel);
        }
    }
    if is_built("gemm_4bit_skinny") {
        let recorder = Recorder::install(Machine::h200());
        // SAFETY: as above.
        unsafe { Cuda { stream, weights_are_ready: true }.run(&product(1, 100, 72, 64, false)) }.unwrap();
        assert!(!recorder.launches()[0].dependent, "these kernels do not wait");
    }
}

#[test]
fn more_rows_than_a_grid_can_hold_are_refused() {
    if !is_built("gemm_4bit_skinny") {
        return;
    }
    let stream = Stream { handle: std::ptr::null_mut(), device: 0 };
    let recorder = Recorder::install(Machine::h200());
    let most = 8 * ((1 << 31) - 1);
    // SAFETY: the recorder stands in for the driver: no address is read.
    let run = |n| unsafe { Cuda { stream, weights_are_ready: false }.run(&product(1, n, 8, 64, false)) };
    run(most).unwrap();
    assert_eq!(recorder.launches().len(), 1);
    assert_eq!(
        run(most + 8).unwrap_err().to_string(),
        "qbits::gemm_4bit: grid of gemm_4bit_skinny_words_bfloat16_1 must be at most 2147483647, got 2147483648"
    );
}
