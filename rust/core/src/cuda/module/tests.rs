//! Preparation of kernels against the recorder: images that do not fit, loads that fail, first use in a
//! capture.

use super::*;
use crate::Dtype;
use crate::cuda::recorder::{Machine, Recorder};
use crate::cuda::runtime;

const OP: &str = "copy";
const SYMBOL: Symbol = Symbol { family: "copy", dtype: Some(Dtype::Float32), codebook: "", number: 64 };

fn machine() -> Machine {
    Machine::h200().with_kernels(&[("copy_float32_64", 24)])
}

fn prepare(symbol: Symbol, device: i32) -> Result<Kernel> {
    let runtime = runtime(OP)?;
    runtime.kernel(OP, symbol, runtime.gpu(OP, device)?)
}

fn refusal(symbol: Symbol) -> Error {
    prepare(symbol, 0).err().unwrap()
}

#[test]
fn machine_code_fits_its_generation() {
    for (arch, fitting, others) in [
        ("80", &[(8, 0), (8, 6), (8, 9)][..], &[(7, 5), (9, 0)][..]),
        ("86", &[(8, 6), (8, 9)], &[(8, 0), (9, 0)]),
        ("90a", &[(9, 0)], &[(8, 9), (10, 0)]),
        ("100f", &[(10, 0), (10, 3)], &[(9, 0), (12, 0)]),
        ("120", &[(12, 0), (12, 1)], &[(10, 0)]),
        ("compute_80", &[(8, 0), (9, 0), (12, 1)], &[(7, 5)]),
        ("nonsense", &[], &[(9, 0)]),
    ] {
        assert!(fitting.iter().all(|capability| arch_fits(arch, *capability)), "{arch}");
        assert!(!others.iter().any(|capability| arch_fits(arch, *capability)), "{arch}");
    }
}

#[test]
fn a_kernel_is_told_with_its_own_limits() {
    let _recorder = Recorder::install(Machine { kernel_max_threads: 512, ..machine() });
    let kernel = prepare(SYMBOL, 0).unwrap();
    assert_eq!((kernel.param_bytes, kernel.max_threads), (24, 512));
    assert_eq!(kernel.max_dynamic_shared_bytes, 232_448 - 1024);
}

#[test]
fn a_gpu_that_no_image_fits_is_refused_before_loading() {
    let mut machine = machine();
    machine.devices[0].capability = (7, 0);
    let recorder = Recorder::install(machine);
    let error = refusal(SYMBOL);
    assert_eq!(error.kind, ErrorKind::UnsupportedHardware);
    let expected = "qbits::copy: the GPU must have an image of the kernel copy_float32_64, got compute \
                    capability 7.0 (this build holds the kernel for: 80, 90a)";
    assert_eq!(error.message, expected);
    assert!(!recorder.calls().contains(&"cuLibraryLoadData"));
}

#[test]
fn a_kernel_that_was_not_built_is_refused() {
    let _recorder = Recorder::install(machine());
    let error = refusal(Symbol { family: "gemm_4bit_sm90", ..SYMBOL });
    assert_eq!(error.kind, ErrorKind::UnsupportedHardware);
    let expected = "qbits::copy: the GPU must have an image of the kernel gemm_4bit_sm90_float32_64, got \
                    compute capability 9.0 (this build holds the kernel for: none)";
    assert_eq!(error.message, expected);
}

#[test]
fn a_build_without_kernels_says_so() {
    let _recorder = Recorder::install(Machine { images: &[], ..machine() });
    let expected = "qbits::copy: this build of qbits must hold CUDA kernels, got one made for the CPU only";
    assert_eq!(refusal(SYMBOL).message, expected);
}

#[test]
fn an_image_that_fails_to_load_is_told_and_tried_again() {
    let recorder = Recorder::install(machine().failing("cuLibraryLoadData", 200));
    let error = refusal(SYMBOL);
    assert_eq!(error.kind, ErrorKind::Driver);
    let expected = "qbits::copy: cuLibraryLoadData(recorded) must succeed, got CUDA_ERROR_INVALID_IMAGE: \
                    device kernel image is invalid";
    assert_eq!(error.message, expected);
    recorder.succeed("cuLibraryLoadData");
    assert!(prepare(SYMBOL, 0).is_ok());
}

#[test]
fn an_image_that_the_driver_has_no_code_for_is_unsupported_hardware() {
    let _recorder = Recorder::install(machine().failing("cuLibraryLoadData", 209));
    let error = refusal(SYMBOL);
    assert_eq!(error.kind, ErrorKind::UnsupportedHardware);
    let expected = "qbits::copy: the driver must load the image recorded (built for 80, 90a), got \
                    CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution on the device, \
                    with compute capability 9.0";
    assert_eq!(error.message, expected);
}

#[test]
fn a_symbol_that_the_image_lacks_is_told() {
    let _recorder = Recorder::install(machine().failing("cuLibraryGetKernel", 500));
    let expected = "qbits::copy: cuLibraryGetKernel(copy_float32_64) must succeed, got CUDA_ERROR_NOT_FOUND: \
                    named symbol not found";
    assert_eq!(refusal(SYMBOL).message, expected);
}

#[test]
fn a_driver_that_fails_at_any_step_is_told() {
    for call in [
        "cuThreadExchangeStreamCaptureMode",
        "cuCtxGetCurrent",
        "cuCtxSetCurrent",
        "cuKernelGetFunction",
        "cuKernelGetAttribute",
        "cuKernelSetAttribute",
        "cuKernelGetParamInfo",
    ] {
        let recorder = Recorder::install(machine().failing(call, 999));
        let error = refusal(SYMBOL);
        assert_eq!(error.kind, ErrorKind::Driver);
        assert!(error.message.starts_with(&format!("qbits::copy: {call}")), "{}", error.message);
        assert!(
            error.message.ends_with("must succeed, got CUDA_ERROR_UNKNOWN: unknown error"),
            "{}",
            error.message
        );
        assert_eq!((recorder.current(), recorder.capture_mode()), (None, 0));
    }
}

#[test]
fn more_static_shared_memory_than_the_device_has_is_refused() {
    let mut machine = machine();
    machine.devices[0].shared_bytes_optin = 1000;
    let _recorder = Recorder::install(machine);
    let expected = "qbits::copy: copy_float32_64 must fit into the device's shared memory of 1000 bytes, got \
                    1024 static bytes";
    assert_eq!(refusal(SYMBOL).message, expected);
}

#[test]
fn first_use_within_a_capture_relaxes_its_mode_and_restores_it() {
    let recorder = Recorder::install(Machine { is_capturing: true, ..machine() });
    prepare(SYMBOL, 0).unwrap();
    assert_eq!(recorder.capture_mode(), 0);
    let calls = recorder.calls();
    let exchanges: Vec<usize> =
        (0..calls.len()).filter(|index| calls[*index] == "cuThreadExchangeStreamCaptureMode").collect();
    let load = calls.iter().position(|call| *call == "cuLibraryLoadData").unwrap();
    assert!(exchanges.len() == 2 && exchanges[0] < load && load < exchanges[1], "{calls:?}");
}

#[test]
fn without_the_relaxed_mode_a_capture_would_refuse_the_load() {
    // that the recorder is as strict as the driver, so that the test above can fail
    let recorder = Recorder::install(Machine { is_capturing: true, ..machine() });
    let runtime = runtime(OP).unwrap();
    let gpu = runtime.gpu(OP, 0).unwrap();
    let error = load(&runtime.driver, OP, &runtime.modules.images[0], gpu).unwrap_err();
    assert!(error.message.ends_with("got CUresult 900, which the driver does not name"), "{}", error.message);
    assert_eq!(recorder.launches(), []);
}

#[test]
fn the_mode_is_restored_when_the_load_fails() {
    let recorder =
        Recorder::install(Machine { is_capturing: true, ..machine() }.failing("cuLibraryLoadData", 200));
    refusal(SYMBOL);
    assert_eq!(recorder.capture_mode(), 0);
}

#[test]
fn symbols_that_differ_in_one_part_are_different_kernels() {
    let _recorder = Recorder::install(machine().with_kernels(&[
        ("copy_float32_64", 1),
        ("copy_float32_128", 2),
        ("copy_float16_64", 3),
        ("copy_float32_nf4_64", 4),
        ("copy_64", 5),
        ("copy_float32", 6),
    ]));
    let symbols = [
        SYMBOL,
        Symbol { number: 128, ..SYMBOL },
        Symbol { dtype: Some(Dtype::Float16), ..SYMBOL },
        Symbol { codebook: "nf4", ..SYMBOL },
        Symbol { dtype: None, ..SYMBOL },
        Symbol { number: 0, ..SYMBOL },
    ];
    for _ in 0..2 {
        let sizes: Vec<usize> =
            symbols.iter().map(|symbol| prepare(*symbol, 0).unwrap().param_bytes).collect();
        assert_eq!(sizes, [1, 2, 3, 4, 5, 6]);
    }
}

#[test]
fn this_build_is_whole() {
    for image in images() {
        assert!(!image.kernels.is_empty(), "{} has no kernel", image.name);
        assert_eq!(image.bytes.0.as_ptr().align_offset(64), 0);
        // the first word of a fatbin
        assert_eq!(image.bytes.0[..4], 0xBA55_ED50_u32.to_le_bytes());
        assert!(image.archs.iter().all(|arch| ARCHS.contains(arch)));
        for kernel in image.kernels {
            assert!(kernel_info(kernel.name).is_some_and(|info| std::ptr::eq(info, kernel)));
            assert!(kernel.param_bytes > 0 && kernel.registers > 0 && kernel.max_threads >= 32);
        }
    }
    assert_eq!(SOURCE_HASH.len(), 16);
    assert!(kernel_info("no_such_kernel").is_none());
}
