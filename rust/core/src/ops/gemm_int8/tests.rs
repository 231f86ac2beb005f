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
    let large = if is_built("gemm_int8_sm90") { Family::Large } else { Family::Simt };
    let skinny = if is_built("gemm_int8_skinny_sm90") { Family::SkinnySm90 } else { Family::Simt };
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
    assert_eq!(problem(4096, 4096, 4096).fastest(&ampere, Some(Family::Large)), Family::Simt);
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
