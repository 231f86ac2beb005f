//! The only reader of foreign C structs: DLPack tensors, owned or borrowed, and the C exchange API.
//! Layouts of DLPack 1.x (dmlc/dlpack, include/dlpack/dlpack.h); sizes and offsets are checked at compile time.

use crate::error::ErrorKind;
use crate::tensor::{Device, Dtype, MAX_RANK, Tensor};
use std::ffi::{c_char, c_int, c_void};
use std::mem::offset_of;
use std::ptr::NonNull;

/// DLPack's number for host memory.
pub const DEVICE_CPU: i32 = 1;
/// DLPack's number for CUDA memory.
pub const DEVICE_CUDA: i32 = 2;
/// DLPack's number for pinned host memory, which the CPU reads like any other.
pub const DEVICE_CUDA_HOST: i32 = 3;
/// Flag: the lender forbids writing.
pub const FLAG_READ_ONLY: u64 = 1;
/// The major version whose structs stand below.
pub const MAJOR_VERSION: u32 = 1;

/// Device type and ordinal. Integers, never a Rust enum: foreign memory may hold any value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct DlDevice {
    pub device_type: i32,
    pub device_id: i32,
}

/// Element type: a code, its bits and lanes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct DlDataType {
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

/// Version of a struct's layout.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct DlVersion {
    pub major: u32,
    pub minor: u32,
}

/// A view of somebody's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct DlTensor {
    pub data: *mut c_void,
    pub device: DlDevice,
    pub ndim: i32,
    pub dtype: DlDataType,
    pub shape: *mut i64,
    pub strides: *mut i64, // null: contiguous
    pub byte_offset: u64,
}

/// The unversioned owning form (capsule `dltensor`).
#[repr(C)]
#[derive(Debug)]
#[allow(missing_docs)]
pub struct DlManagedTensor {
    pub dl_tensor: DlTensor,
    pub manager_ctx: *mut c_void,
    pub deleter: Option<unsafe extern "C" fn(*mut DlManagedTensor)>,
}

/// The versioned owning form (capsule `dltensor_versioned`).
#[repr(C)]
#[derive(Debug)]
#[allow(missing_docs)]
pub struct DlManagedTensorVersioned {
    pub version: DlVersion,
    pub manager_ctx: *mut c_void,
    pub deleter: Option<unsafe extern "C" fn(*mut DlManagedTensorVersioned)>,
    pub flags: u64,
    pub dl_tensor: DlTensor,
}

/// Head of every version of the exchange API.
#[repr(C)]
#[derive(Debug)]
#[allow(missing_docs)]
pub struct ExchangeHeader {
    pub version: DlVersion,
    pub prev_api: *mut ExchangeHeader, // of an older major version, or null
}

/// Reports an allocation failure: context, kind, message.
pub type SetError = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char);

/// Functions that exchange tensors without Python calls. Each returns 0, or -1 with a Python error set.
#[repr(C)]
#[derive(Debug)]
#[allow(missing_docs)]
pub struct ExchangeApi {
    pub header: ExchangeHeader,
    /// prototype, result, context of the error, the error's reporter
    pub allocate: Option<
        unsafe extern "C" fn(
            *mut DlTensor,
            *mut *mut DlManagedTensorVersioned,
            *mut c_void,
            SetError,
        ) -> c_int,
    >,
    pub from_object: Option<unsafe extern "C" fn(*mut c_void, *mut *mut DlManagedTensorVersioned) -> c_int>,
    /// takes ownership of the tensor
    pub to_object: Option<unsafe extern "C" fn(*mut DlManagedTensorVersioned, *mut *mut c_void) -> c_int>,
    /// fills a view that is valid while the object lives
    pub borrow: Option<unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> c_int>,
    /// device type, ordinal, result
    pub current_stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int>,
}

// SAFETY: DLPack demands static tables whose functions may be called from any thread.
unsafe impl Sync for ExchangeApi {}
// SAFETY: as for Sync.
unsafe impl Send for ExchangeApi {}

const _: () = {
    assert!(size_of::<DlDevice>() == 8 && size_of::<DlDataType>() == 4 && size_of::<DlVersion>() == 8);
    assert!(
        size_of::<DlTensor>() == 48 && offset_of!(DlTensor, ndim) == 16 && offset_of!(DlTensor, dtype) == 20
    );
    assert!(offset_of!(DlTensor, shape) == 24 && offset_of!(DlTensor, strides) == 32);
    assert!(offset_of!(DlTensor, byte_offset) == 40);
    assert!(size_of::<DlManagedTensor>() == 64 && offset_of!(DlManagedTensor, deleter) == 56);
    assert!(size_of::<DlManagedTensorVersioned>() == 80 && offset_of!(DlManagedTensorVersioned, flags) == 24);
    assert!(offset_of!(DlManagedTensorVersioned, dl_tensor) == 32);
    assert!(size_of::<ExchangeApi>() == 56 && offset_of!(ExchangeApi, borrow) == 40);
    assert!(offset_of!(ExchangeApi, current_stream) == 48);
};

impl ExchangeApi {
    /// The table of our major version in the list that starts at `header`, if there is one.
    ///
    /// # Safety
    /// `header` must be null or the head of a list of exchange tables that live for the rest of the process.
    pub unsafe fn find(mut header: *const ExchangeHeader) -> Option<&'static Self> {
        // SAFETY: the caller promises that each header in the list is null or valid for ever.
        while let Some(head) = unsafe { header.as_ref() } {
            if head.version.major == MAJOR_VERSION {
                // SAFETY: a header with our major version is the start of an `ExchangeApi`.
                return unsafe { header.cast::<Self>().as_ref() };
            }
            header = head.prev_api;
        }
        None
    }
}

/// Why a foreign tensor cannot be an argument: the kind of the error, what it must be, and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Refusal {
    pub kind: ErrorKind,
    pub rule: &'static str,
    pub got: String,
}

impl Refusal {
    fn new(kind: ErrorKind, rule: &'static str, got: impl Into<String>) -> Self {
        Self { kind, rule, got: got.into() }
    }
}

/// DLPack's type code of a dtype, and back.
const TYPE_CODES: &[(Dtype, u8, u8)] = &[
    (Dtype::Uint8, 1, 8),
    (Dtype::Int8, 0, 8),
    (Dtype::Int32, 0, 32),
    (Dtype::Int64, 0, 64),
    (Dtype::Float16, 2, 16),
    (Dtype::Bfloat16, 4, 16),
    (Dtype::Float32, 2, 32),
    (Dtype::Float64, 2, 64),
    (Dtype::Bool, 6, 8),
    (Dtype::Uint16, 1, 16),
];

impl From<Dtype> for DlDataType {
    fn from(dtype: Dtype) -> Self {
        let (_, code, bits) =
            *TYPE_CODES.iter().find(|entry| entry.0 == dtype).expect("every dtype stands in the table");
        Self { code, bits, lanes: 1 }
    }
}

impl From<Device> for DlDevice {
    fn from(device: Device) -> Self {
        match device {
            Device::Cpu => Self { device_type: DEVICE_CPU, device_id: 0 },
            Device::Cuda(ordinal) => Self { device_type: DEVICE_CUDA, device_id: ordinal },
        }
    }
}

fn dtype_of(dtype: DlDataType) -> Result<Dtype, Refusal> {
    let found = TYPE_CODES.iter().find(|(_, code, bits)| (*code, *bits) == (dtype.code, dtype.bits));
    match (found, dtype.lanes) {
        (Some((dtype, ..)), 1) => Ok(*dtype),
        _ => Err(Refusal::new(
            ErrorKind::Dtype,
            "have a dtype that qbits knows",
            format!("DLPack type code {} with {} bits and {} lanes", dtype.code, dtype.bits, dtype.lanes),
        )),
    }
}

fn device_of(device: DlDevice) -> Result<Device, Refusal> {
    match device.device_type {
        DEVICE_CPU | DEVICE_CUDA_HOST => Ok(Device::Cpu),
        DEVICE_CUDA => Ok(Device::Cuda(device.device_id)),
        other => Err(Refusal::new(
            ErrorKind::Device,
            "be on the CPU or a CUDA device",
            format!("DLPack device type {other}"),
        )),
    }
}

impl DlTensor {
    /// The tensor that this view describes. Nothing but the struct, its shape and its strides is read.
    ///
    /// # Safety
    /// `shape` and, unless null, `strides` must point to `ndim` numbers.
    pub unsafe fn view(&self, flags: u64) -> Result<Tensor, Refusal> {
        let device = device_of(self.device)?;
        let dtype = dtype_of(self.dtype)?;
        let rank = usize::try_from(self.ndim).ok().filter(|rank| *rank <= MAX_RANK);
        let Some(rank) = rank else {
            let got = format!("{} dimensions", self.ndim);
            return Err(Refusal::new(ErrorKind::Shape, "have at most 8 dimensions", got));
        };
        if rank > 0 && self.shape.is_null() {
            return Err(Refusal::new(ErrorKind::Value, "have a shape", "a null pointer"));
        }
        // SAFETY: the caller promises `ndim` numbers behind `shape`.
        let shape = if rank == 0 { &[] } else { unsafe { std::slice::from_raw_parts(self.shape, rank) } };
        let len =
            shape.iter().try_fold(1i64, |len, size| if *size < 0 { None } else { len.checked_mul(*size) });
        if len.and_then(|len| len.checked_mul(dtype.size() as i64)).is_none() {
            let got = format!("shape {shape:?}");
            return Err(Refusal::new(ErrorKind::Shape, "have fewer than 2^63 bytes", got));
        }
        let mut data = self.data.cast::<u8>();
        if !data.is_null() {
            data = data.wrapping_add(self.byte_offset as usize);
        }
        let mut tensor = Tensor::new(data, dtype, device, shape);
        tensor.is_read_only = flags & FLAG_READ_ONLY != 0;
        if !self.strides.is_null() && rank > 0 {
            // SAFETY: the caller promises `ndim` numbers behind strides that are not null.
            let strides = unsafe { std::slice::from_raw_parts(self.strides, rank) };
            tensor.is_contiguous = is_contiguous(shape, strides);
        }
        Ok(tensor)
    }
}

/// Row-major without gaps. Strides of dimensions of size 1 say nothing.
fn is_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let mut expected = 1i64;
    for (size, stride) in shape.iter().zip(strides).rev() {
        if *size != 1 {
            if *stride != expected {
                return false;
            }
            expected = expected.saturating_mul(*size);
        }
    }
    true
}

/// A foreign tensor that we own: its deleter runs once, on drop, on whichever thread that happens.
#[derive(Debug)]
pub enum Owned {
    /// Capsule `dltensor`.
    Unversioned(NonNull<DlManagedTensor>),
    /// Capsule `dltensor_versioned`.
    Versioned(NonNull<DlManagedTensorVersioned>),
}

impl Owned {
    /// The tensor, or why it cannot be an argument. Of a foreign major version nothing but the version is read.
    ///
    /// # Safety
    /// The pointer must stand on a live managed tensor of the form that the variant names.
    pub unsafe fn view(&self) -> Result<Tensor, Refusal> {
        match self {
            // SAFETY: a live managed tensor by the caller's promise; DLPack demands valid shape and strides.
            Self::Unversioned(managed) => unsafe { managed.as_ref().dl_tensor.view(0) },
            Self::Versioned(managed) => {
                // SAFETY: the version stands first in every major version of the struct.
                let version = unsafe { std::ptr::addr_of!((*managed.as_ptr()).version).read() };
                if version.major != MAJOR_VERSION {
                    let got = format!("version {}.{}", version.major, version.minor);
                    return Err(Refusal::new(ErrorKind::Value, "speak DLPack version 1", got));
                }
                // SAFETY: our major version, so the whole struct has our layout.
                let managed = unsafe { managed.as_ref() };
                // SAFETY: DLPack demands that shape and strides of a managed tensor are valid.
                unsafe { managed.dl_tensor.view(managed.flags) }
            }
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: we own the managed tensor, its deleter stands at the same offset in all versions of its form,
        // and this is the only call of it.
        unsafe {
            match self {
                Self::Unversioned(managed) => {
                    if let Some(deleter) = managed.as_ref().deleter {
                        deleter(managed.as_ptr());
                    }
                }
                Self::Versioned(managed) => {
                    if let Some(deleter) = managed.as_ref().deleter {
                        deleter(managed.as_ptr());
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
