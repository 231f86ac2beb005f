//! The functions that stand in for libcuda's, one for each call of the driver's table.

use super::{CAPTURE_MODE, CURRENT, Launched, STAND, State, context_of, device_of};
use crate::cuda::driver::{Driver, SUCCESS, Status};
use crate::cuda::{Image, Limits, MAX_MAP_RANK, TensorMap};
use cudarc::driver::sys::{
    self, CUdevice_attribute as DeviceAttribute, CUfunction_attribute as KernelAttribute,
};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// CUDA_ERROR_INVALID_VALUE.
const INVALID_VALUE: Status = 1;

const NOT_INITIALIZED: Status = 3;
const INVALID_DEVICE: Status = 101;
const INVALID_CONTEXT: Status = 201;
const INVALID_HANDLE: Status = 400;
const NOT_FOUND: Status = 500;
const CAPTURE_UNSUPPORTED: Status = 900;

/// Records the call and answers it, unless it was told to fail.
fn answer(call: &'static str, answer: impl FnOnce(&mut State) -> Status) -> Status {
    let Some(stand) = STAND.with_borrow(|stand| *stand) else { return NOT_INITIALIZED };
    let mut state = stand.state();
    state.calls.push(call);
    match state.machine.failures.get(call) {
        Some(status) => *status,
        None => answer(&mut state),
    }
}

/// Writes an answer where the caller wants it.
///
/// # Safety
/// `place` is valid for a write, as it would have to be for libcuda.
unsafe fn put<T>(place: *mut T, value: T) -> Status {
    // SAFETY: by the function's contract.
    unsafe { place.write(value) };
    SUCCESS
}

/// Functions of libcuda: `name(arguments) = "symbol", |state| answer`. Bodies write through their
/// out-pointers, which is sound for the reason that it is in libcuda: the caller passes valid ones.
macro_rules! stand_ins {
    ($($field:ident($($argument:ident: $type:ty),*) = $symbol:literal, |$state:ident| $body:expr;)*) => {
        $(#[allow(unused_unsafe)] // not every body writes
        unsafe extern "C" fn $field($($argument: $type),*) -> Status {
            // SAFETY: the callers under test pass valid pointers, as they must to libcuda.
            answer($symbol, |$state: &mut State| unsafe { $body })
        })*
        pub(super) const DRIVER: Driver = Driver { error_name, error_string, $($field,)* };
    };
}

stand_ins! {
    init(_flags: c_uint) = "cuInit", |_state| SUCCESS;
    driver_version(version: *mut c_int) = "cuDriverGetVersion", |state| {
        put(version, state.machine.driver_version)
    };
    device_count(count: *mut c_int) = "cuDeviceGetCount", |state| {
        put(count, state.machine.devices.len() as c_int)
    };
    device_get(device: *mut sys::CUdevice, ordinal: c_int) = "cuDeviceGet", |state| {
        if (ordinal as usize) < state.machine.devices.len() { put(device, ordinal) } else { INVALID_DEVICE }
    };
    device_name(name: *mut c_char, bytes: c_int, device: sys::CUdevice) = "cuDeviceGetName", |_state| {
        let text = format!("Recorded GPU {device}\0");
        assert!(text.len() <= bytes as usize);
        text.bytes().enumerate().for_each(|(index, byte)| { put(name.add(index), byte as c_char); });
        SUCCESS
    };
    device_attribute(
        value: *mut c_int, attribute: c_uint, device: sys::CUdevice
    ) = "cuDeviceGetAttribute", |state| {
        put(value, device_attribute_of(&state.machine.devices[device as usize], attribute))
    };
    device_total_bytes(bytes: *mut usize, device: sys::CUdevice) = "cuDeviceTotalMem", |state| {
        put(bytes, state.machine.devices[device as usize].total_bytes)
    };
    primary_context_retain(
        context: *mut sys::CUcontext, device: sys::CUdevice
    ) = "cuDevicePrimaryCtxRetain", |_state| {
        put(context, context_of(device) as sys::CUcontext)
    };
    context_get_current(context: *mut sys::CUcontext) = "cuCtxGetCurrent", |_state| {
        put(context, CURRENT.get() as sys::CUcontext)
    };
    context_set_current(context: sys::CUcontext) = "cuCtxSetCurrent", |_state| {
        CURRENT.set(context as usize);
        SUCCESS
    };
    exchange_capture_mode(mode: *mut c_uint) = "cuThreadExchangeStreamCaptureMode", |_state| {
        put(mode, CAPTURE_MODE.replace(mode.read()))
    };
    library_load_data(
        library: *mut sys::CUlibrary, code: *const c_void, _options: *mut c_void, _values: *mut c_void,
        _num: c_uint, _library_options: *mut c_void, _library_values: *mut c_void, _num_library: c_uint
    ) = "cuLibraryLoadData", |state| {
        let is_code = |image: &Image| std::ptr::eq(image.bytes.0.as_ptr().cast(), code);
        let found = state.machine.images.iter().position(is_code);
        match found {
            _ if state.forbids_unsafe_calls() => CAPTURE_UNSUPPORTED,
            Some(index) if (code as usize).is_multiple_of(64) => put(library, (index + 1) as sys::CUlibrary),
            _ => INVALID_VALUE,
        }
    };
    library_get_kernel(
        kernel: *mut sys::CUkernel, library: sys::CUlibrary, name: *const c_char
    ) = "cuLibraryGetKernel", |state| {
        let name = CStr::from_ptr(name).to_string_lossy();
        let kernels = state.machine.images[library as usize - 1].kernels;
        match kernels.iter().position(|info| info.name == name) {
            Some(index) => put(kernel, ((library as usize) << 16 | (index + 1)) as sys::CUkernel),
            None => NOT_FOUND,
        }
    };
    kernel_get_function(
        function: *mut sys::CUfunction, kernel: sys::CUkernel
    ) = "cuKernelGetFunction", |state| {
        match CURRENT.get() {
            0 => INVALID_CONTEXT,
            _ if state.forbids_unsafe_calls() => CAPTURE_UNSUPPORTED,
            _ => put(function, kernel.cast()),
        }
    };
    kernel_param_info(
        kernel: sys::CUkernel, index: usize, offset: *mut usize, bytes: *mut usize
    ) = "cuKernelGetParamInfo", |state| {
        match state.kernel(kernel as usize) {
            Some(info) if index == 0 => {
                put(offset, 0);
                put(bytes, info.param_bytes as usize)
            }
            Some(_) => INVALID_VALUE,
            None => INVALID_HANDLE,
        }
    };
    kernel_get_attribute(
        value: *mut c_int, attribute: c_uint, kernel: sys::CUkernel, _device: sys::CUdevice
    ) = "cuKernelGetAttribute", |state| {
        const REGISTERS: c_uint = KernelAttribute::CU_FUNC_ATTRIBUTE_NUM_REGS as c_uint;
        const SHARED: c_uint = KernelAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES as c_uint;
        const THREADS: c_uint = KernelAttribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK as c_uint;
        const PTX_VERSION: c_uint = KernelAttribute::CU_FUNC_ATTRIBUTE_PTX_VERSION as c_uint;
        match (state.kernel(kernel as usize), attribute) {
            (None, _) => INVALID_HANDLE,
            (Some(info), REGISTERS) => put(value, info.registers as c_int),
            (Some(info), SHARED) => put(value, info.shared_bytes as c_int),
            (Some(info), THREADS) => {
                put(value, info.max_threads.min(state.machine.kernel_max_threads) as c_int)
            }
            (Some(_), PTX_VERSION) => put(value, state.machine.ptx_version),
            _ => INVALID_VALUE,
        }
    };
    kernel_set_attribute(
        attribute: c_uint, value: c_int, _kernel: sys::CUkernel, device: sys::CUdevice
    ) = "cuKernelSetAttribute", |state| {
        const DYNAMIC: c_uint = KernelAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as c_uint;
        let most = state.machine.devices[device as usize].shared_bytes_optin as c_int;
        if attribute != DYNAMIC || value > most {
            return INVALID_VALUE;
        }
        state.opted_in = state.opted_in.max(value);
        SUCCESS
    };
    launch_kernel(
        config: *const sys::CUlaunchConfig, function: sys::CUfunction, params: *mut *mut c_void,
        _extra: *mut *mut c_void
    ) = "cuLaunchKernelEx", |state| {
        let (Some(info), Some(device)) = (state.kernel(function as usize), device_of(CURRENT.get())) else {
            return INVALID_HANDLE;
        };
        let config = config.read();
        let (cluster, dependent) = attributes_of(&config);
        state.launches.push(Launched {
            kernel: info.name.into(),
            grid: config.gridDimX,
            grid_y: config.gridDimY,
            cluster,
            dependent,
            threads: config.blockDimX,
            shared_bytes: config.sharedMemBytes,
            stream: config.hStream as usize,
            device,
            params: std::slice::from_raw_parts(params.read().cast(), info.param_bytes as usize).to_vec(),
        });
        SUCCESS
    };
    pointer_attributes(
        count: c_uint, attributes: *mut c_uint, data: *mut *mut c_void, address: sys::CUdeviceptr
    ) = "cuPointerGetAttributes", |state| {
        assert_eq!(count, 4);
        let held = |(start, bytes, _): &&(u64, u64, i32)| (*start..*start + *bytes).contains(&address);
        let (start, bytes, device) = state.allocations.iter().find(held).copied().unwrap_or((0, 0, -2));
        let wanted = std::slice::from_raw_parts(attributes, 4);
        assert_eq!(wanted, [9, 11, 12, 8], "ordinal, start, bytes, managed");
        put(data.read().cast::<i32>(), device);
        put(data.add(1).read().cast::<u64>(), start);
        put(data.add(2).read().cast::<u64>(), bytes)
    };
    stream_create(stream: *mut sys::CUstream, _flags: c_uint) = "cuStreamCreate", |state| {
        let Some(device) = device_of(CURRENT.get()) else { return INVALID_CONTEXT };
        state.streams.push(device);
        put(stream, state.streams.len() as sys::CUstream)
    };
    stream_context(stream: sys::CUstream, context: *mut sys::CUcontext) = "cuStreamGetCtx", |state| {
        // a null stream is the current context's
        let made_on = (stream as usize).checked_sub(1).and_then(|index| state.streams.get(index).copied());
        put(context, made_on.map_or(CURRENT.get(), context_of) as sys::CUcontext)
    };
    stream_is_capturing(_stream: sys::CUstream, capturing: *mut c_uint) = "cuStreamIsCapturing", |state| {
        put(capturing, c_uint::from(state.machine.is_capturing))
    };
    stream_synchronize(_stream: sys::CUstream) = "cuStreamSynchronize", |state| {
        if state.machine.is_capturing { CAPTURE_UNSUPPORTED } else { SUCCESS }
    };
    stream_wait_event(
        _stream: sys::CUstream, _event: sys::CUevent, _flags: c_uint
    ) = "cuStreamWaitEvent", |_state| SUCCESS;
    event_create(event: *mut sys::CUevent, _flags: c_uint) = "cuEventCreate", |_state| {
        put(event, 1 as sys::CUevent)
    };
    event_record(_event: sys::CUevent, _stream: sys::CUstream) = "cuEventRecord", |_state| SUCCESS;
    event_destroy(_event: sys::CUevent) = "cuEventDestroy", |_state| SUCCESS;
    encode_tiled(
        map: *mut TensorMap, dtype: c_uint, rank: u32, address: *mut c_void, dims: *const u64,
        strides: *const u64, box_dims: *const u32, element_strides: *const u32, interleave: c_uint,
        swizzle: c_uint, l2_promotion: c_uint, fill: c_uint
    ) = "cuTensorMapEncodeTiled", |_state| {
        let rank = rank as usize;
        assert!((1..=MAX_MAP_RANK).contains(&rank) && (map as usize).is_multiple_of(64));
        let (dims, box_dims) = (slice(dims, rank), slice(box_dims, rank));
        let strides = slice(strides, rank - 1);
        assert_eq!((slice(element_strides, rank), interleave, fill), (&[1; MAX_MAP_RANK][..rank], 0, 0));
        match is_tiled_map(dtype, address as usize, dims, strides, box_dims, swizzle) {
            false => INVALID_VALUE,
            true => {
                let head = [address as u64, u64::from(dtype), u64::from(swizzle), u64::from(l2_promotion)];
                let box_dims = box_dims.iter().map(|size| u64::from(*size));
                let words = head.into_iter().chain(dims.iter().copied()).chain(strides.iter().copied());
                let mut written = TensorMap::default();
                written.0.iter_mut().zip(words.chain(box_dims)).for_each(|(word, value)| *word = value);
                put(map, written)
            }
        }
    };
    memory_alloc_async(
        address: *mut sys::CUdeviceptr, bytes: usize, _stream: sys::CUstream
    ) = "cuMemAllocAsync", |state| {
        let Some(device) = device_of(CURRENT.get()) else { return INVALID_CONTEXT };
        let start = 0x10_0000_0000 + 0x1_0000_0000 * state.allocations.len() as u64;
        state.allocations.push((start, bytes as u64, device));
        put(address, start)
    };
    memory_set(
        address: sys::CUdeviceptr, byte: u8, bytes: usize, _stream: sys::CUstream
    ) = "cuMemsetD8Async", |state| {
        state.fills.push((address..address + bytes as u64, byte));
        SUCCESS
    };
    memory_copy(
        _to: sys::CUdeviceptr, _from: sys::CUdeviceptr, _bytes: usize, _stream: sys::CUstream
    ) = "cuMemcpyDtoDAsync", |_state| SUCCESS;
    memory_read(
        to: *mut c_void, from: sys::CUdeviceptr, bytes: usize, _stream: sys::CUstream
    ) = "cuMemcpyDtoHAsync", |state| {
        (0..bytes).for_each(|index| { put(to.cast::<u8>().add(index), state.byte_at(from + index as u64)); });
        SUCCESS
    };
    context_synchronize() = "cuCtxSynchronize", |_state| SUCCESS;
    memory_free(address: sys::CUdeviceptr) = "cuMemFree_v2", |state| {
        let before = state.allocations.len();
        state.allocations.retain(|(start, ..)| *start != address);
        if state.allocations.len() < before { SUCCESS } else { INVALID_VALUE }
    };
}

/// `len` numbers of the caller.
///
/// # Safety
/// As for libcuda: there are as many.
unsafe fn slice<'a, T>(data: *const T, len: usize) -> &'a [T] {
    if len == 0 {
        &[]
    } else {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(data, len) }
    }
}

/// What libcuda accepts (cuTensorMapEncodeTiled, without interleave), as far as qbits asks for it.
fn is_tiled_map(
    dtype: c_uint,
    address: usize,
    dims: &[u64],
    strides: &[u64],
    box_dims: &[u32],
    swizzle: c_uint,
) -> bool {
    let element_bytes = match dtype {
        0 => 1,         // uint8
        1 | 6 | 9 => 2, // uint16, float16, bfloat16
        2 | 3 | 7 => 4, // uint32, int32, float32
        _ => return false,
    };
    let inner_bytes = u64::from(box_dims[0]) * element_bytes;
    let span = [u64::MAX, 32, 64, 128][swizzle as usize];
    address.is_multiple_of(16)
        && dims.iter().all(|size| (1..=1 << 32).contains(size))
        && strides.iter().all(|bytes| bytes.is_multiple_of(16) && *bytes < 1 << 40)
        && box_dims.iter().all(|size| (1..=256).contains(size))
        && inner_bytes.is_multiple_of(16)
        && inner_bytes <= span
}

/// Blocks of a cluster, and whether the launch may overlap earlier work. An attribute twice, or another one, is a mistake.
///
/// # Safety
/// `config` holds as many attributes as it says.
unsafe fn attributes_of(config: &sys::CUlaunchConfig) -> (u32, bool) {
    use sys::CUlaunchAttributeID as Id;
    let (mut cluster, mut dependent) = (None, None);
    for index in 0..config.numAttrs as usize {
        // SAFETY: the caller's promise; the id says which field of the union was written.
        let previous = unsafe {
            let attribute = config.attrs.add(index).read();
            match attribute.id {
                Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION => {
                    assert_eq!((attribute.value.clusterDim.y, attribute.value.clusterDim.z), (1, 1));
                    cluster.replace(attribute.value.clusterDim.x)
                }
                Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION => {
                    dependent.replace(attribute.value.programmaticStreamSerializationAllowed as u32)
                }
                other => panic!("no launch of qbits has {other:?}"),
            }
        };
        assert_eq!(previous, None, "each attribute once");
    }
    (cluster.unwrap_or(1), dependent.unwrap_or(0) != 0)
}

fn device_attribute_of(limits: &Limits, attribute: c_uint) -> c_int {
    use DeviceAttribute as A;
    let table: [(A, i64); 8] = [
        (A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, limits.capability.0.into()),
        (A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, limits.capability.1.into()),
        (A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, limits.num_sms.into()),
        (A::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, limits.max_threads_per_block.into()),
        (A::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, limits.registers_per_block.into()),
        (A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, limits.shared_bytes_optin.into()),
        (A::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, limits.max_grid_x as i64),
        (A::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH, (limits.max_cluster > 1).into()),
    ];
    let found = table.iter().find(|(known, _)| *known as c_uint == attribute);
    found.map_or(0, |(_, value)| *value as c_int)
}

/// Names and words, as libcuda has them.
const WORDS: &[(Status, &CStr, &CStr)] = &[
    (1, c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
    (2, c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
    (100, c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected"),
    (200, c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid"),
    (209, c"CUDA_ERROR_NO_BINARY_FOR_GPU", c"no kernel image is available for execution on the device"),
    (500, c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
    (700, c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered"),
    (999, c"CUDA_ERROR_UNKNOWN", c"unknown error"),
];

fn words(
    status: Status,
    place: *mut *const c_char,
    choose: fn(&(Status, &'static CStr, &'static CStr)) -> &'static CStr,
) -> Status {
    match WORDS.iter().find(|(known, ..)| *known == status) {
        // SAFETY: the caller passes a valid place, as it must to libcuda.
        Some(entry) => unsafe { put(place, choose(entry).as_ptr()) },
        None => INVALID_VALUE,
    }
}

unsafe extern "C" fn error_name(status: Status, name: *mut *const c_char) -> Status {
    words(status, name, |entry| entry.1)
}

unsafe extern "C" fn error_string(status: Status, text: *mut *const c_char) -> Status {
    words(status, text, |entry| entry.2)
}
