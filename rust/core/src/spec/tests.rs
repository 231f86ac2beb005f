//! The checks that follow from a declaration, each with its whole message.

use super::*;
use crate::error::{ErrorKind, Result};
use crate::ops::blockwise_4bit::{Dequantize4bit, Quantize4bit};
use crate::ops::gemm_4bit::Gemm4bit;
use crate::tensor::Device;
use proptest::prelude::*;

/// A tensor over an address that nobody reads.
fn tensor(address: usize, dtype: Dtype, shape: &[i64]) -> Tensor {
    Tensor::new(std::ptr::without_provenance_mut(address), dtype, Device::Cpu, shape)
}

fn quantize<'a>(input: Tensor, codebook: &'a str, block_size: i64) -> [Value<'a>; 5] {
    let blocks = if block_size > 0 { (input.len() + block_size - 1) / block_size } else { 0 };
    [
        Value::Tensor(input),
        Value::Str(codebook),
        Value::Int(block_size),
        Value::Tensor(tensor(0x10_0000, Dtype::Uint8, &[(input.len() + 1) / 2])),
        Value::Tensor(tensor(0x20_0000, Dtype::Float32, &[blocks])),
    ]
}

fn check<O: Bind>(values: &[Value]) -> Result<()> {
    let symbols = O::compiled().check_inputs(values)?;
    O::compiled().check_outputs(values, &symbols)
}

fn message<O: Bind>(values: &[Value]) -> (ErrorKind, String) {
    let error = check::<O>(values).expect_err("the call must be refused");
    (error.kind, error.message)
}

fn input() -> Tensor {
    tensor(0x1000, Dtype::Float32, &[10, 10])
}

#[test]
fn a_legal_call_is_bound_with_its_values() {
    let values = quantize(input(), "fp4", 64);
    check::<Quantize4bit>(&values).expect("legal");
    let op = Quantize4bit::from_checked(&values);
    assert_eq!((op.input.len(), op.codebook, op.block_size), (100, "fp4", 64));
}

#[test]
fn refusals_of_inputs_name_argument_rule_and_value() {
    let int = tensor(0x1000, Dtype::Int32, &[100]);
    assert_eq!(
        message::<Quantize4bit>(&quantize(int, "nf4", 64)),
        (
            ErrorKind::Dtype,
            "qbits::quantize_4bit: input must have dtype float32, float16 or bfloat16, got int32".into()
        )
    );
    assert_eq!(
        message::<Quantize4bit>(&quantize(input(), "nf4", 100)).1,
        "qbits::quantize_4bit: block_size must be one of [32, 64, 128, 256, 512, 1024, 2048, 4096], got 100"
    );
    assert_eq!(
        message::<Quantize4bit>(&quantize(input(), "int3", 64)).1,
        "qbits::quantize_4bit: codebook must be one of [\"nf4\", \"fp4\", \"af4\"], got \"int3\""
    );
    let mut strided = input();
    strided.is_contiguous = false;
    assert_eq!(
        message::<Quantize4bit>(&quantize(strided, "nf4", 64)).1,
        "qbits::quantize_4bit: input must be contiguous, got a strided view of shape [10, 10]"
    );
    assert_eq!(
        message::<Quantize4bit>(&quantize(tensor(0, Dtype::Float32, &[4]), "nf4", 64)).0,
        ErrorKind::Traced
    );
    assert_eq!(
        message::<Quantize4bit>(&quantize(tensor(0x1002, Dtype::Float32, &[4]), "nf4", 64)).1,
        "qbits::quantize_4bit: input must start on a multiple of 4 bytes, got an address 2 past one"
    );
}

#[test]
fn values_of_the_wrong_kind_are_refused_by_their_type() {
    let mut values = quantize(input(), "nf4", 64);
    values[0] = Value::Other("list");
    assert_eq!(
        message::<Quantize4bit>(&values),
        (ErrorKind::Type, "qbits::quantize_4bit: input must be a tensor, got list".into())
    );
    values = quantize(input(), "nf4", 64);
    values[2] = Value::Other("float");
    assert_eq!(
        message::<Quantize4bit>(&values).1,
        "qbits::quantize_4bit: block_size must be an int, got float"
    );
    values[2] = Value::Int(64);
    values[1] = Value::Absent;
    assert_eq!(message::<Quantize4bit>(&values).1, "qbits::quantize_4bit: codebook must be a str, got None");
    assert_eq!(
        message::<Quantize4bit>(&values[..3]).1,
        "qbits::quantize_4bit: the call must have 5 arguments, got 3"
    );
}

#[test]
fn refusals_of_outputs_name_argument_rule_and_value() {
    let mut values = quantize(input(), "nf4", 64);
    values[3] = Value::Tensor(tensor(0x10_0000, Dtype::Uint8, &[51]));
    assert_eq!(
        message::<Quantize4bit>(&values).1,
        "qbits::quantize_4bit: packed must have ceil_div(n, 2) = 50 elements, got 51"
    );
    values[3] = Value::Tensor(tensor(0x10_0000, Dtype::Int8, &[50]));
    assert_eq!(
        message::<Quantize4bit>(&values).1,
        "qbits::quantize_4bit: packed must have dtype uint8, got int8"
    );
    let mut read_only = tensor(0x10_0000, Dtype::Uint8, &[50]);
    read_only.is_read_only = true;
    values[3] = Value::Tensor(read_only);
    assert_eq!(
        message::<Quantize4bit>(&values).1,
        "qbits::quantize_4bit: packed must be writable, got read-only memory"
    );
    values[3] = Value::Tensor(tensor(0x1000 + 390, Dtype::Uint8, &[50]));
    assert_eq!(
        message::<Quantize4bit>(&values).1,
        "qbits::quantize_4bit: packed must not share memory with input, got 10 common bytes"
    );
}

#[test]
fn tensors_on_two_devices_are_refused() {
    let mut values = quantize(input(), "nf4", 64);
    let elsewhere = Tensor::new(std::ptr::without_provenance_mut(4), Dtype::Float32, Device::Cuda(1), &[2]);
    values[4] = Value::Tensor(elsewhere);
    assert_eq!(
        message::<Quantize4bit>(&values),
        (ErrorKind::Device, "qbits::quantize_4bit: absmax must be on cpu like input, got cuda:1".into())
    );
}

fn dequantize(absmax: Dtype, scale: bool, offset: bool) -> [Value<'static>; 10] {
    let given = |is_given: bool, address, n| match is_given {
        true => Value::Tensor(tensor(address, Dtype::Float32, &[n])),
        false => Value::Absent,
    };
    [
        Value::Tensor(tensor(0x1000, Dtype::Uint8, &[50])),
        Value::Tensor(tensor(0x2000, absmax, &[2])),
        Value::Int(100),
        Value::Str("nf4"),
        Value::Int(64),
        Value::Dtype(Dtype::Bfloat16),
        given(scale, 0x3000, 1),
        given(offset, 0x4000, 1),
        Value::Absent,
        Value::Tensor(tensor(0x5000, Dtype::Bfloat16, &[100])),
    ]
}

#[test]
fn nested_statistics_come_together_and_decide_the_dtype_of_absmax() {
    check::<Dequantize4bit>(&dequantize(Dtype::Float32, false, false)).expect("plain");
    check::<Dequantize4bit>(&dequantize(Dtype::Uint8, true, true)).expect("nested");
    assert_eq!(
        message::<Dequantize4bit>(&dequantize(Dtype::Uint8, true, false)).1,
        "qbits::dequantize_4bit: absmax_scale must come together with absmax_offset, got no absmax_offset"
    );
    assert_eq!(
        message::<Dequantize4bit>(&dequantize(Dtype::Uint8, false, false)).1,
        "qbits::dequantize_4bit: absmax must have dtype float32 without absmax_scale, got uint8"
    );
    assert_eq!(
        message::<Dequantize4bit>(&dequantize(Dtype::Float32, true, true)).1,
        "qbits::dequantize_4bit: absmax must have dtype uint8 with absmax_scale, got float32"
    );
}

fn gemm(shape: &[i64], n: i64, k: i64, bias: &[i64]) -> [Value<'static>; 12] {
    let len = n.saturating_mul(k);
    [
        Value::Tensor(tensor(0x1000, Dtype::Float16, shape)),
        Value::Tensor(tensor(0x10_0000, Dtype::Uint8, &[(len.min(1 << 40) + 1) / 2])),
        Value::Tensor(tensor(0x20_0000, Dtype::Float32, &[(len.min(1 << 40) + 63) / 64])),
        Value::Int(n),
        Value::Int(k),
        Value::Str("nf4"),
        Value::Int(64),
        Value::Tensor(tensor(0x30_0000, Dtype::Float32, bias)),
        Value::Absent,
        Value::Absent,
        Value::Absent,
        Value::Tensor(tensor(
            0x40_0000,
            Dtype::Float16,
            &[&shape[..shape.len().saturating_sub(1)], &[n]].concat(),
        )),
    ]
}

#[test]
fn dimensions_are_matched_with_the_given_numbers() {
    check::<Gemm4bit>(&gemm(&[3, 8], 5, 8, &[5])).expect("legal");
    assert_eq!(
        message::<Gemm4bit>(&gemm(&[3, 9], 5, 8, &[5])).1,
        "qbits::gemm_4bit: input must have shape [*M, K] = [3, 8], got [3, 9]"
    );
    assert_eq!(
        message::<Gemm4bit>(&gemm(&[24], 5, 8, &[5])).1,
        "qbits::gemm_4bit: input must have shape [*M, K] = [8], got [24]"
    );
    assert_eq!(
        message::<Gemm4bit>(&gemm(&[], 5, 8, &[5])).1,
        "qbits::gemm_4bit: input must have at least 1 dimension [*M, K], got shape []"
    );
    assert_eq!(
        message::<Gemm4bit>(&gemm(&[3, 8], 5, 8, &[6])).1,
        "qbits::gemm_4bit: bias must have shape [N] = [5], got [6]"
    );
    assert_eq!(
        message::<Gemm4bit>(&gemm(&[3, 8], -1, 8, &[5])).1,
        "qbits::gemm_4bit: N must be at least 0, got -1"
    );
    assert_eq!(
        message::<Gemm4bit>(&gemm(&[1, 1 << 40], 1 << 40, 1 << 40, &[5])).1,
        "qbits::gemm_4bit: packed must have fewer than 2^63 bytes, \
         got [ceil_div(N * K, 2)] with K = 1099511627776, N = 1099511627776, block_size = 64"
    );
}

#[test]
fn outputs_are_described_before_they_exist() {
    let values = gemm(&[3, 8], 5, 8, &[5]);
    let compiled = Gemm4bit::compiled();
    let symbols = compiled.check_inputs(&values[..12]).expect("legal");
    let output = compiled.output(11, &values, &symbols).expect("fits");
    assert_eq!((output.shape(), output.dtype), (&[3, 5][..], Dtype::Float16));
    for (input, due) in [(&[8][..], &[5][..]), (&[2, 0, 3, 8], &[2, 0, 3, 5])] {
        let values = gemm(input, 5, 8, &[5]);
        let symbols = compiled.check_inputs(&values).expect("legal");
        compiled.check_outputs(&values, &symbols).expect("legal");
        assert_eq!(compiled.output(11, &values, &symbols).expect("fits").shape(), due);
    }
}

proptest! {
    /// Whatever the numbers are, the checks answer; they never panic and never accept a wrong length.
    #[test]
    fn any_sizes_are_accepted_or_refused(n in -4i64..1 << 62, k in -4i64..1 << 62, m in 0i64..1 << 40, len in 0i64..1 << 62) {
        let mut values = gemm(&[m, k.max(0)], n, k, &[n.max(0)]);
        values[1] = Value::Tensor(tensor(0x10_0000, Dtype::Uint8, &[len]));
        if check::<Gemm4bit>(&values).is_ok() {
            prop_assert_eq!(Some(len), n.checked_mul(k).map(|nk| nk / 2 + nk % 2));
        }
    }
}
