//! The dispatch rule, and the product that the tests of the families plan.

use super::*;
use crate::cuda::recorder::{Machine, Recorder};
use crate::cuda::{H200, Stream};
use crate::tensor::Device;

/// A device tensor at an address that nobody reads.
pub fn tensor(address: usize, dtype: Dtype, shape: &[i64]) -> Tensor {
    Tensor::new(std::ptr::without_provenance_mut(address), dtype, Device::Cuda(0), shape)
}

/// A call on tensors at addresses that nobody reads.
fn call(m: i64, n: i64, k: i64, dtype: Dtype) -> GemmInt8 {
    let scales =
        |address, length| (dtype != Dtype::Int32).then(|| tensor(address, Dtype::Float32, &[length]));
    GemmInt8 {
        input: tensor(0x1000, Dtype::Int8, &[m, k]),
        weight: tensor(0x2000, Dtype::Int8, &[n, k]),
        input_scales: scales(0x3000, m),
        weight_scales: scales(0x4000, n),
        weight_scale: None,
        bias: None,
        dtype,
        output: tensor(0x6000, dtype, &[m, n]),
    }
}

/// Its product.
pub fn product(m: i64, n: i64, k: i64, dtype: Dtype) -> Product {
    call(m, n, k, dtype).product().unwrap()
}

#[test]
fn the_rule_names_a_family_that_fits() {
    let problem = |m, n, k| product(m, n, k, Dtype::Bfloat16).problem();
    let large = if is_built("gemm_int8_sm90") { Family::Large } else { Family::Mma };
    let skinny = if is_built("gemm_int8_skinny_sm90") { Family::SkinnySm90 } else { Family::Mma };
    for ((m, n, k), family) in [
        ((1, 4096, 4096), skinny),
        ((64, 28672, 8192), skinny),
        ((65, 28672, 8192), large),
        ((256, 8192, 8192), skinny), // 64 large tiles, 132 multiprocessors
        ((512, 8192, 8192), large),
        ((512, 5120, 1280), large), // K is too short to be divided
        ((1024, 1280, 5120), skinny),
        ((4096, 4096, 4100), Family::Simt), // rows of codes off 16 bytes
        ((4096, 4096, 131_072), Family::Simt),
    ] {
        assert_eq!(problem(m, n, k).fastest(&H200, None), family, "{m} x {n} x {k}");
    }
    let ampere = Limits { capability: (8, 0), ..H200 };
    assert_eq!(problem(4096, 4096, 4096).fastest(&ampere, Some(Family::Large)), Family::Mma);
    assert_eq!(problem(4096, 4096, 4096).fastest(&H200, Some(Family::SkinnySm90)), skinny);
    assert_eq!(problem(1, 4096, 4096).fastest(&H200, Some(Family::Large)), large);
    assert_eq!(problem(1, 4096, 4096).fastest(&H200, Some(Family::Simt)), Family::Simt);
}

#[test]
fn kernels_that_wait_themselves_are_launched_as_dependent_ones() {
    let stream = Stream { handle: std::ptr::null_mut(), device: 0 };
    for m in [1, 64, 4096] {
        for weights_are_ready in [false, true].into_iter().filter(|_| is_built("gemm_int8_sm90")) {
            let recorder = Recorder::install(Machine::h200());
            let op = call(m, 4096, 4096, Dtype::Bfloat16);
            // SAFETY: the recorder stands in for the driver: no address is read.
            unsafe { Cuda { stream, weights_are_ready }.run(&op) }.unwrap();
            let launches = recorder.launches();
            assert_eq!((launches.len(), launches[0].dependent), (1, true), "{}", launches[0].kernel);
        }
    }
}

#[test]
fn older_gpus_multiply_by_tensor_cores_where_these_can() {
    let problem = product(300, 4096, 4096, Dtype::Bfloat16).problem();
    let fastest = |problem: Problem, capability| problem.fastest(&Limits { capability, ..H200 }, None);
    assert_eq!(fastest(problem, (7, 5)), Family::Simt);
    assert_eq!(fastest(problem, (8, 0)), Family::Mma);
    assert_eq!(fastest(problem, (12, 0)), Family::Mma);
    for odd in [
        Problem { k: 4095, ..problem },
        Problem { k: 131_072, ..problem },
        Problem { is_aligned: false, ..problem },
        Problem { has_outliers: true, dtype: Dtype::Float32, ..problem },
    ] {
        assert_eq!(fastest(odd, (8, 0)), Family::Simt, "{odd:?}");
        assert_eq!(odd.fastest(&H200, Some(Family::Mma)), fastest(odd, (9, 0)));
    }
    assert_eq!(problem.fastest(&H200, Some(Family::Mma)), Family::Mma);
}

#[test]
fn plans_cover_the_output_with_tiles() {
    let plan = |m, n| mma::plan(&product(m, n, 64, Dtype::Float16), &H200);
    assert_eq!((plan(1, 4096).symbol.number, plan(1, 4096).grid), (32, 128));
    assert_eq!((plan(64, 100).symbol.number, plan(64, 100).grid), (32, 8));
    assert_eq!((plan(300, 4096).symbol.number, plan(300, 4096).grid), (128, 96));
    assert_eq!((plan(200, 200).symbol.number, plan(200, 200).grid), (32, 49));
    assert_eq!(simt::plan(&product(65, 64, 3, Dtype::Float16)).grid, 2);
    assert_eq!(simt::plan(&product(65, 64, 131_072, Dtype::Float16)).symbol.family, "gemm_int8_simt_long");
}
