//! Plans and launches of every op, without a GPU: they name kernels that the build holds, and pass what they read.

use crate::backend::{Backend, Cuda, OPS};
use crate::cuda::recorder::{Machine, Recorder};
use crate::cuda::{Family, Stream, images, kernel_info};
use crate::spec::{Bind, Role, Value};
use crate::tensor::{Device, Dtype, Tensor};
use std::collections::BTreeSet;

/// A device tensor at an address that nobody reads.
fn tensor(address: usize, dtype: Dtype, shape: &[i64]) -> Tensor {
    Tensor::new(std::ptr::without_provenance_mut(address), dtype, Device::Cuda(0), shape)
}

fn stream() -> Stream {
    Stream { handle: std::ptr::without_provenance_mut(0x40), device: 0 }
}

fn cuda() -> Cuda {
    Cuda { stream: stream(), weights_are_ready: false }
}

/// Every legal combination of choices for `op`, with `n` elements, or M, N and K.
fn calls(op: &crate::backend::Op, n: i64, [m, rows, k]: [i64; 3]) -> Vec<Vec<Value<'static>>> {
    let compiled = (op.compiled)();
    let mut calls: Vec<Vec<Value<'static>>> = vec![Vec::new()];
    for (i, arg) in compiled.spec.args.iter().enumerate() {
        let address = 0x1000_0000 * (i + 1);
        let choices: Vec<Value<'static>> = match arg.role {
            Role::Int if arg.name == "N" => vec![Value::Int(rows)],
            Role::Int if arg.name == "K" => vec![Value::Int(k)],
            Role::Int => vec![Value::Int(n)],
            Role::Float => vec![Value::Float(6.0)],
            Role::OneOf(choices) => choices.iter().map(|choice| Value::Int(*choice)).collect(),
            Role::OneOfStr(choices) => choices.iter().map(|choice| Value::Str(choice)).collect(),
            Role::OneOfDtype(choices) => choices.iter().map(|choice| Value::Dtype(*choice)).collect(),
            Role::In(dtypes, _) | Role::Flat(dtypes, _) => {
                dtypes.iter().map(|dtype| Value::Tensor(tensor(address, *dtype, &[]))).collect()
            }
            Role::Optional(dtypes, _) | Role::OptionalFlat(dtypes, _) => {
                let given = dtypes.iter().map(|dtype| Value::Tensor(tensor(address, *dtype, &[])));
                given.chain([Value::Absent]).collect()
            }
            Role::Out(..) | Role::Scratch(_) => vec![Value::Absent],
        };
        calls = (calls.into_iter())
            .flat_map(|call| choices.iter().map(move |choice| [call.clone(), vec![*choice]].concat()))
            .collect();
    }
    calls.into_iter().filter_map(|call| sized(op, call, n, [m, rows, k])).collect()
}

/// The call with tensors of the right sizes, or None where its rules forbid it.
fn sized(
    op: &crate::backend::Op,
    mut call: Vec<Value<'static>>,
    n: i64,
    [m, rows, k]: [i64; 3],
) -> Option<Vec<Value<'static>>> {
    let compiled = (op.compiled)();
    let int = |name: &str, call: &[Value]| {
        compiled.spec.args.iter().zip(call).find_map(|(arg, value)| match value {
            Value::Int(number) if arg.name == name => Some(*number),
            _ => None,
        })
    };
    let block_size = int("block_size", &call).unwrap_or(1);
    let n = int("N", &call).map_or(n, |rows| rows * k);
    let blocks = (n + block_size - 1) / block_size;
    for (i, arg) in compiled.spec.args.iter().enumerate() {
        let address = 0x1000_0000 * (i + 1);
        if let Value::Tensor(given) = call[i] {
            let shape = match arg.role {
                Role::In(_, text) | Role::Optional(_, text) => {
                    let size = |symbol: &str| match symbol.trim_start_matches(['*', ' ']) {
                        "M" => m,
                        "N" => rows,
                        "K" => k,
                        other => panic!("a size of {other}"),
                    };
                    text.split(',').map(size).collect()
                }
                Role::Flat(_, "M") | Role::OptionalFlat(_, "M") => vec![m],
                Role::Flat(_, "N") | Role::OptionalFlat(_, "N") => vec![rows],
                Role::Flat(_, "256") | Role::OptionalFlat(_, "256") => vec![256],
                Role::Flat(_, "1") | Role::OptionalFlat(_, "1") => vec![1],
                Role::Flat(_, text) if text.contains("block_size") => vec![blocks],
                Role::OptionalFlat(..) => vec![(blocks + 255) / 256],
                Role::Flat(_, text) if text.starts_with("ceil_div") => vec![(n + 1) / 2],
                _ => vec![n],
            };
            call[i] = Value::Tensor(tensor(address, given.dtype, &shape));
        }
    }
    let symbols = compiled.check_inputs(&call).ok()?;
    for (i, arg) in compiled.spec.args.iter().enumerate() {
        if matches!(arg.role, Role::Out(..) | Role::Scratch(_)) {
            let output = compiled.output(i, &call, &symbols).expect("checked");
            call[i] = Value::Tensor(tensor(0x1000_0000 * (i + 1), output.dtype, output.shape()));
        }
    }
    compiled.check_outputs(&call, &symbols).expect("sized as the declaration says");
    Some(call)
}

#[test]
fn every_legal_call_launches_kernels_of_this_build_with_their_parameters() {
    if images().is_empty() {
        return; // QBITS_CUDA=0: there is nothing that a plan could name
    }
    let mut launched = BTreeSet::new();
    for op in OPS {
        let name = (op.compiled)().spec.name;
        // From 256 columns on: kernels of a Hopper GPU whose copy engine cuts the rows into boxes. From 4224 rows on: large
        // tiles, where small ones would not fit the device at once.
        let short = [[1, 64], [5, 128], [9, 64], [9, 63], [2, 8], [1, 63], [1, 8]];
        let boxes = [1, 2, 3, 5].map(|m| [[m, 1024], [m, 9216]]).concat();
        let many = [[9, 1024], [17, 64], [33, 64], [65, 64], [129, 64]];
        // Every number of vectors for which rows have a kernel of their own.
        let long = [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 40_000].map(|k| [2, k]);
        let small = [&short[..], &boxes, &many, &long].concat().into_iter().map(|[m, k]| [m, 104, k]);
        let tall = [1, 5, 9, 17, 33, 65, 129, 300].map(|m| [m, 9000, 64]);
        let tall = tall.into_iter().chain([[200, 8000, 64]]).map(|sizes| (sizes, None));
        let tall = tall.chain([([100, 9000, 64], Some(Family::Large))]);
        // Tiles of each size and each division of K, and sums beyond 32 bits.
        let codes = [
            [1, 4096, 64],
            [1, 14336, 64],
            [1, 16384, 64],
            [64, 4096, 64],
            [64, 14336, 64],
            [128, 4096, 2048],
            [256, 8192, 2048],
            [300, 8192, 64],
            [4096, 4096, 64],
            [1, 104, 131_072],
        ];
        let own: Vec<_> = match name {
            "gemm_4bit" => tall.collect(),
            _ if name.starts_with("gemm_int8") => {
                let by_mma = [[9, 104, 64], [300, 8192, 64]].map(|sizes| (sizes, Some(Family::Mma)));
                codes.into_iter().map(|sizes| (sizes, None)).chain(by_mma).collect()
            }
            _ => Vec::new(),
        };
        for (sizes @ [_, _, k], forced) in small.map(|sizes| (sizes, None)).chain(own) {
            for call in calls(op, 100 * k, sizes) {
                if sizes[2] > 131_071 && call.iter().any(|value| matches!(value, Value::Dtype(Dtype::Int32)))
                {
                    continue; // refused
                }
                let mut machine = Machine::h200();
                machine.settings.force_family = forced;
                let recorder = Recorder::install(machine);
                // SAFETY: the recorder stands in for the driver: no address is read.
                let result = unsafe { (op.run)(&call, &Backend::Cuda(cuda())) };
                result.unwrap_or_else(|error| panic!("{name}: {error}"));
                let launches = recorder.launches();
                assert!(!launches.is_empty(), "{name} must launch");
                for launch in launches {
                    let info = kernel_info(&launch.kernel).expect("a launch needs a kernel of the build");
                    assert_eq!(info.param_bytes, launch.params.len() as u32, "{}", launch.kernel);
                    let halves = if launch.kernel.starts_with("gemm_4bit_skinny_rows") { 2 } else { 1 };
                    let fits = [info.max_threads, info.max_threads / halves].contains(&launch.threads);
                    assert!(fits, "{}: {} of {} threads", launch.kernel, launch.threads, info.max_threads);
                    assert!(launch.grid > 0 && launch.stream == 0x40);
                    launched.insert(launch.kernel);
                }
            }
        }
    }
    let all: BTreeSet<String> =
        images().iter().flat_map(|image| image.kernels.iter().map(|kernel| kernel.name.to_owned())).collect();
    let unused: Vec<_> = all.difference(&launched).collect();
    assert!(unused.is_empty(), "kernels that no plan selects: {unused:?}");
}

#[test]
fn empty_tensors_launch_nothing_but_their_scalars() {
    for op in OPS {
        let compiled = (op.compiled)();
        for call in calls(op, 0, [0, 100, 0]).into_iter().take(3) {
            if compiled.spec.name.starts_with("gemm_4bit") {
                continue; // N = 100 and K = 0 with M = 0: covered by the early return
            }
            let recorder = Recorder::install(Machine::h200());
            // SAFETY: as above.
            let result = unsafe { (op.run)(&call, &Backend::Cuda(cuda())) };
            let is_empty = |i: usize| matches!(call[i], Value::Tensor(output) if output.is_empty());
            if compiled.outputs().all(is_empty) {
                result.expect("nothing to do");
                assert!(recorder.launches().is_empty(), "{}", compiled.spec.name);
            }
        }
    }
}

#[test]
fn grids_stay_within_the_limit_and_kernels_walk_on() {
    use crate::ops::blockwise_4bit::Quantize4bit;
    if images().is_empty() {
        return;
    }
    let n = 1i64 << 44;
    let call = [
        Value::Tensor(tensor(1 << 50, Dtype::Float32, &[n])),
        Value::Str("nf4"),
        Value::Int(64),
        Value::Tensor(tensor(1 << 51, Dtype::Uint8, &[n / 2])),
        Value::Tensor(tensor(1 << 52, Dtype::Float32, &[n / 64])),
    ];
    let recorder = Recorder::install(Machine::h200());
    Quantize4bit::compiled().check_inputs(&call).expect("legal");
    // SAFETY: the recorder stands in for the driver.
    unsafe { (OPS[0].run)(&call, &Backend::Cuda(cuda())) }.expect("launched");
    assert_eq!(recorder.launches()[0].grid, (1 << 31) - 1);
}
