//! Launches against the recorder: what is refused, what reaches the driver, and in which context.

use super::*;
use crate::cuda::recorder::{Machine, Recorder};

/// The parameters of `copy_float32_64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct CopyParams {
    input: u64,
    output: u64,
    n: i64,
}

// SAFETY: repr(C), three fields of eight bytes without padding.
unsafe impl Params for CopyParams {}

const OP: &str = "copy";
const SYMBOL: Symbol = Symbol { family: "copy", dtype: Some(Dtype::Float32), codebook: "", number: 64 };
const PLAN: Launch = Launch::new(SYMBOL, 10, 256);
const PARAMS: CopyParams = CopyParams { input: 0x10, output: 0x20, n: 640 };

fn machine() -> Machine {
    Machine::h200().with_kernels(&[("copy_float32_64", 24)])
}

fn stream(device: i32) -> Stream {
    Stream { handle: 0x77 as *mut c_void, device }
}

fn launch_copy(plan: Launch, device: i32) -> Result<()> {
    // SAFETY: the recorder runs nothing.
    unsafe { launch(OP, &plan, &PARAMS, stream(device)) }
}

fn message(result: Result<()>) -> String {
    result.unwrap_err().message
}

#[test]
fn symbols_join_what_they_have() {
    let symbol =
        Symbol { family: "quantize_4bit", dtype: Some(Dtype::Bfloat16), codebook: "nf4", number: 64 };
    assert_eq!(symbol.to_string(), "quantize_4bit_bfloat16_nf4_64");
    assert_eq!(Symbol { dtype: None, codebook: "", ..symbol }.to_string(), "quantize_4bit_64");
    assert_eq!(Symbol { number: 0, ..symbol }.to_string(), "quantize_4bit_bfloat16_nf4");
    assert_eq!(PLAN.to_string(), "copy_float32_64<<<10, 256, 0>>>");
    let clustered = Launch { grid_y: 3, cluster: 2, dependent: true, ..PLAN };
    assert_eq!(clustered.to_string(), "copy_float32_64<<<10 x 3, 256, 0, cluster 2, dependent>>>");
}

#[test]
fn a_launch_reaches_the_driver_as_planned() {
    let recorder = Recorder::install(machine());
    launch_copy(Launch { shared_bytes: 4096, ..PLAN }, 0).unwrap();
    let launches = recorder.launches();
    assert_eq!(launches.len(), 1);
    let launched = &launches[0];
    assert_eq!((launched.kernel.as_str(), launched.grid, launched.threads), ("copy_float32_64", 10, 256));
    assert_eq!((launched.shared_bytes, launched.stream, launched.device), (4096, 0x77, 0));
    let expected: Vec<u8> = [0x10, 0x20, 640_u64].iter().flat_map(|word| word.to_ne_bytes()).collect();
    assert_eq!(launched.params, expected);
}

#[test]
fn clusters_and_overlap_reach_the_driver_as_attributes() {
    let recorder = Recorder::install(machine());
    for (cluster, dependent) in [(1, false), (5, false), (1, true), (2, true)] {
        launch_copy(Launch { cluster, dependent, ..PLAN }, 0).unwrap();
        let launched = recorder.launches().pop().unwrap();
        assert_eq!((launched.cluster, launched.dependent, launched.grid), (cluster, dependent, 10));
    }
}

#[test]
fn a_kernel_that_waits_is_a_dependent_one_only_where_it_was_compiled_for_hopper() {
    for (ptx_version, waits) in [(80, true), (90, false), (90, true), (100, true)] {
        let recorder = Recorder::install(Machine { ptx_version, ..machine() });
        launch_copy(Launch { waits, ..PLAN }, 0).unwrap();
        assert_eq!(recorder.launches()[0].dependent, waits && ptx_version >= 90, "{ptx_version}, {waits}");
    }
}

#[test]
fn a_cluster_beyond_the_device_is_refused() {
    let mut machine = machine();
    let recorder = Recorder::install(machine.clone());
    launch_copy(Launch { grid: 16, cluster: 8, ..PLAN }, 0).unwrap();
    let expected = "qbits::copy: cluster of copy_float32_64 must be at most 8, got 16";
    assert_eq!(message(launch_copy(Launch { grid: 16, cluster: 16, ..PLAN }, 0)), expected);
    assert_eq!(recorder.launches().len(), 1);
    machine.devices[0].max_cluster = 1;
    let recorder = Recorder::install(machine);
    let expected = "qbits::copy: cluster of copy_float32_64 must be at most 1, got 2";
    assert_eq!(message(launch_copy(Launch { cluster: 2, ..PLAN }, 0)), expected);
    assert_eq!(recorder.launches(), []);
}

#[test]
fn a_grid_that_clusters_do_not_fill_is_refused() {
    let recorder = Recorder::install(machine());
    for cluster in [0, 4] {
        let rule = "qbits::copy: grid of copy_float32_64 must be a multiple of its cluster";
        let expected = format!("{rule} of {cluster}, got 10");
        assert_eq!(message(launch_copy(Launch { cluster, ..PLAN }, 0)), expected);
    }
    assert_eq!(recorder.launches(), []);
}

#[test]
fn a_dependent_launch_is_refused_before_hopper() {
    let mut machine = machine();
    machine.devices[0].capability = (8, 9);
    let recorder = Recorder::install(machine);
    let expected = "qbits::copy: a dependent launch of copy_float32_64 must have compute capability 9.0 or more, \
                    got 8.9";
    assert_eq!(message(launch_copy(Launch { dependent: true, ..PLAN }, 0)), expected);
    assert_eq!(recorder.launches(), []);
}

#[test]
fn a_second_launch_asks_for_the_context_and_launches_and_nothing_else() {
    let recorder = Recorder::install(machine());
    recorder.set_current(Some(0));
    launch_copy(PLAN, 0).unwrap();
    let num_calls = recorder.calls().len();
    launch_copy(PLAN, 0).unwrap();
    assert_eq!(recorder.calls()[num_calls..], ["cuCtxGetCurrent", "cuLaunchKernelEx"]);
}

#[test]
fn an_empty_grid_is_not_launched_and_needs_no_driver() {
    let recorder = Recorder::install(Machine::h200().failing("cuInit", 100));
    launch_copy(Launch { grid: 0, ..PLAN }, 0).unwrap();
    assert_eq!(recorder.calls(), [""; 0]);
}

#[test]
fn no_device_is_an_error_of_the_driver() {
    let _recorder = Recorder::install(machine().failing("cuInit", 100));
    let expected =
        "qbits::copy: cuInit must succeed, got CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected";
    assert_eq!(message(launch_copy(PLAN, 0)), expected);
}

#[test]
fn a_grid_beyond_the_device_is_refused() {
    let recorder = Recorder::install(machine());
    launch_copy(Launch { grid: 2_147_483_647, ..PLAN }, 0).unwrap();
    // 2^32 + 1 must not wrap to 1
    for grid in [2_147_483_648, 4_294_967_297] {
        let expected = format!("qbits::copy: grid of copy_float32_64 must be at most 2147483647, got {grid}");
        assert_eq!(message(launch_copy(Launch { grid, ..PLAN }, 0)), expected);
    }
    assert_eq!(recorder.launches().len(), 1);
}

#[test]
fn a_grid_in_two_dimensions_reaches_the_driver_within_its_limit() {
    let recorder = Recorder::install(machine());
    launch_copy(Launch { grid_y: 65_535, ..PLAN }, 0).unwrap();
    assert_eq!((recorder.launches()[0].grid, recorder.launches()[0].grid_y), (10, 65_535));
    for grid_y in [0, 65_536] {
        let expected =
            format!("qbits::copy: grid_y of copy_float32_64 must be from 1 to 65535, got {grid_y}");
        assert_eq!(message(launch_copy(Launch { grid_y, ..PLAN }, 0)), expected);
    }
    assert_eq!(recorder.launches().len(), 1);
}

#[test]
fn too_many_threads_are_refused() {
    let recorder = Recorder::install(Machine { kernel_max_threads: 256, ..machine() });
    launch_copy(PLAN, 0).unwrap();
    let expected = "qbits::copy: threads of copy_float32_64 must be at most 256, got 257";
    assert_eq!(message(launch_copy(Launch { threads: 257, ..PLAN }, 0)), expected);
    assert_eq!(recorder.launches().len(), 1);
}

#[test]
fn no_threads_are_refused() {
    let _recorder = Recorder::install(machine());
    let expected = "qbits::copy: threads of copy_float32_64 must be at least 1, got 0";
    assert_eq!(message(launch_copy(Launch { threads: 0, ..PLAN }, 0)), expected);
}

#[test]
fn registers_limit_the_threads() {
    let mut machine = machine();
    // 32 registers of 512 threads are all that there are
    machine.devices[0].registers_per_block = 32 * 512;
    let _recorder = Recorder::install(machine);
    launch_copy(Launch { threads: 512, ..PLAN }, 0).unwrap();
    let expected = "qbits::copy: threads of copy_float32_64 must be at most 512, got 513";
    assert_eq!(message(launch_copy(Launch { threads: 513, ..PLAN }, 0)), expected);
}

#[test]
fn too_much_shared_memory_is_refused() {
    let recorder = Recorder::install(machine());
    // the recorded kernel has 1024 static bytes
    let most = 232_448 - 1024;
    launch_copy(Launch { shared_bytes: most, ..PLAN }, 0).unwrap();
    assert_eq!(recorder.opted_in(), most as i32);
    let expected = "qbits::copy: shared_bytes of copy_float32_64 must be at most 231424, got 231425";
    assert_eq!(message(launch_copy(Launch { shared_bytes: most + 1, ..PLAN }, 0)), expected);
    assert_eq!(recorder.launches().len(), 1);
}

#[test]
fn a_mirror_of_another_size_is_refused() {
    let recorder = Recorder::install(machine().with_kernels(&[("copy_float32_64", 32)]));
    let expected =
        "qbits::copy: the parameters of copy_float32_64 must have 32 bytes, as the kernel does, got 24";
    assert_eq!(message(launch_copy(PLAN, 0)), expected);
    assert_eq!(recorder.launches(), []);
}

#[test]
fn the_context_of_the_stream_is_made_current_and_restored() {
    let recorder = Recorder::install(Machine { devices: Machine::with_devices(2).devices, ..machine() });
    recorder.set_current(Some(0));
    launch_copy(PLAN, 1).unwrap();
    assert_eq!(recorder.launches()[0].device, 1);
    assert_eq!(recorder.current(), Some(0));
}

#[test]
fn the_context_is_restored_after_a_failed_launch() {
    let devices = Machine::with_devices(2).devices;
    let recorder = Recorder::install(Machine { devices, ..machine() }.failing("cuLaunchKernelEx", 1));
    recorder.set_current(Some(0));
    let expected = "qbits::copy: cuLaunchKernelEx(copy_float32_64<<<10, 256, 0>>>) must succeed, got \
                    CUDA_ERROR_INVALID_VALUE: invalid argument";
    assert_eq!(message(launch_copy(PLAN, 1)), expected);
    assert_eq!(recorder.current(), Some(0));
}

#[test]
fn each_device_is_prepared_once() {
    let recorder = Recorder::install(Machine { devices: Machine::with_devices(2).devices, ..machine() });
    for device in [0, 1, 0, 1] {
        launch_copy(PLAN, device).unwrap();
    }
    let count = |name| recorder.calls().iter().filter(|call| **call == name).count();
    assert_eq!(
        (count("cuLibraryLoadData"), count("cuKernelSetAttribute"), count("cuLaunchKernelEx")),
        (1, 2, 4)
    );
    let devices: Vec<i32> = recorder.launches().iter().map(|launched| launched.device).collect();
    assert_eq!(devices, [0, 1, 0, 1]);
}

#[test]
fn threads_that_launch_at_once_load_once() {
    let recorder = Recorder::install(machine());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                recorder.enter_thread();
                launch_copy(PLAN, 0).unwrap();
            });
        }
    });
    assert_eq!(recorder.launches().len(), 8);
    assert_eq!(recorder.calls().iter().filter(|call| **call == "cuLibraryLoadData").count(), 1);
}

fn full() -> Machine {
    let mut machine = machine();
    machine.settings.full_check = true;
    machine
}

#[test]
fn full_check_names_a_fault_where_it_happened() {
    let recorder = Recorder::install(full().failing("cuStreamSynchronize", 700));
    let stream = crate::cuda::current_stream_for(OP, 0).unwrap();
    // SAFETY: the recorder runs nothing.
    let fault = unsafe { launch(OP, &PLAN, &PARAMS, stream) }.unwrap_err();
    assert_eq!(fault.kind, ErrorKind::Driver);
    let expected = "qbits::copy: copy_float32_64<<<10, 256, 0>>> must succeed, got \
                    CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered";
    assert_eq!(fault.message, expected);
    assert_eq!(recorder.launches().len(), 1);
}

#[test]
fn full_check_does_not_wait_during_a_capture() {
    let recorder = Recorder::install(Machine { is_capturing: true, ..full() });
    let null = Stream { handle: std::ptr::null_mut(), device: 0 };
    // SAFETY: the recorder runs nothing.
    unsafe { launch(OP, &PLAN, &PARAMS, null) }.unwrap();
    assert_eq!(recorder.launches().len(), 1);
    assert!(!recorder.calls().contains(&"cuStreamSynchronize"));
}

#[test]
fn full_check_refuses_the_stream_of_another_device() {
    let recorder = Recorder::install(Machine { devices: Machine::with_devices(2).devices, ..full() });
    let mut other = crate::cuda::current_stream_for(OP, 1).unwrap();
    other.device = 0;
    // SAFETY: the recorder runs nothing.
    let error = unsafe { launch(OP, &PLAN, &PARAMS, other) }.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Device);
    let expected = "qbits::copy: stream must belong to the primary context of cuda:0, got 0x1 of another";
    assert_eq!(error.message, expected);
    assert_eq!(recorder.launches(), []);
}

#[test]
fn without_full_check_nothing_waits() {
    let recorder = Recorder::install(machine());
    launch_copy(PLAN, 0).unwrap();
    assert!(!full_check());
    let slow = ["cuStreamSynchronize", "cuStreamGetCtx", "cuPointerGetAttributes"];
    assert!(!recorder.calls().iter().any(|call| slow.contains(call)));
}

fn check_one(data: u64, num_bytes: usize) -> Result<()> {
    check_memory(OP, &[Memory { name: "packed", data: data as *const u8, num_bytes }], stream(0))
}

#[test]
fn memory_of_the_device_passes() {
    let recorder = Recorder::install(full());
    assert!(full_check());
    recorder.add_allocation(0x1000, 256, 0);
    check_one(0x1000, 256).unwrap();
    check_one(0x1080, 128).unwrap();
    check_one(0, 0).unwrap();
}

#[test]
fn memory_that_is_mapped_piece_by_piece_passes() {
    let recorder = Recorder::install(full());
    recorder.add_allocation(0x1000, 256, 0);
    recorder.add_allocation(0x1100, 256, 0);
    check_one(0x1010, 400).unwrap();
}

#[test]
fn memory_that_the_driver_does_not_know_is_refused() {
    let _recorder = Recorder::install(full());
    let expected = "qbits::copy: packed must be memory of cuda:0, got 0x1000, which the driver does not know";
    assert_eq!(message(check_one(0x1000, 1)), expected);
}

#[test]
fn memory_of_another_device_is_refused() {
    let recorder = Recorder::install(full());
    recorder.add_allocation(0x1000, 256, 1);
    let expected = "qbits::copy: packed must be memory of cuda:0, got 0x1000 on cuda:1";
    assert_eq!(message(check_one(0x1000, 1)), expected);
}

#[test]
fn memory_that_is_too_short_is_refused() {
    let recorder = Recorder::install(full());
    recorder.add_allocation(0x1000, 256, 0);
    recorder.add_allocation(0x1100, 256, 1);
    let expected = "qbits::copy: packed must have 257 bytes of memory behind 0x1000, got 256";
    assert_eq!(message(check_one(0x1000, 257)), expected);
    let expected = "qbits::copy: packed must have 300 bytes of memory behind 0x1080, got 128";
    assert_eq!(message(check_one(0x1080, 300)), expected);
}
