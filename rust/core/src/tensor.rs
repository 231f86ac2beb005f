//! Tensors as the backends see them: borrowed memory with a dtype, a shape and a device. No Python, no driver.

use std::fmt;

/// Element types that qbits knows. The names are torch's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Dtype {
    Uint8,
    Int8,
    Int32,
    Int64,
    Float16,
    Bfloat16,
    Float32,
    Float64,
    Bool,
    Uint16,
}

/// Every dtype, in the order of their names' table.
pub const DTYPES: &[Dtype] = &[
    Dtype::Uint8,
    Dtype::Int8,
    Dtype::Int32,
    Dtype::Int64,
    Dtype::Float16,
    Dtype::Bfloat16,
    Dtype::Float32,
    Dtype::Float64,
    Dtype::Bool,
    Dtype::Uint16,
];

impl Dtype {
    /// torch's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Uint8 => "uint8",
            Self::Int8 => "int8",
            Self::Int32 => "int32",
            Self::Int64 => "int64",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
            Self::Float32 => "float32",
            Self::Float64 => "float64",
            Self::Bool => "bool",
            Self::Uint16 => "uint16",
        }
    }

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::Uint8 | Self::Int8 | Self::Bool => 1,
            Self::Float16 | Self::Bfloat16 | Self::Uint16 => 2,
            Self::Int32 | Self::Float32 => 4,
            Self::Int64 | Self::Float64 => 8,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where memory lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// Host memory.
    Cpu,
    /// Memory of the CUDA device with this ordinal.
    Cuda(i32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Most dimensions that an argument may have.
pub const MAX_RANK: usize = 8;

/// A borrowed, contiguous tensor. The lender keeps the memory alive for the time of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// First element; null only where there are no elements.
    pub data: *mut u8,
    /// Element type.
    pub dtype: Dtype,
    /// Where `data` points to.
    pub device: Device,
    rank: usize,
    dims: [i64; MAX_RANK],
    len: i64,
    /// Row-major without gaps, ignoring dimensions of size 1.
    pub is_contiguous: bool,
    /// The lender forbids writing.
    pub is_read_only: bool,
}

// SAFETY: a tensor describes memory and touches none; whoever turns it into slices promises that access is ordered.
unsafe impl Send for Tensor {}
// SAFETY: as for Send.
unsafe impl Sync for Tensor {}

impl Tensor {
    /// A contiguous, writable tensor. `shape` has at most [`MAX_RANK`] dimensions.
    ///
    /// # Panics
    /// With more dimensions.
    pub fn new(data: *mut u8, dtype: Dtype, device: Device, shape: &[i64]) -> Self {
        let (mut dims, mut len) = ([1; MAX_RANK], 1i64);
        for (dim, size) in dims[..shape.len()].iter_mut().zip(shape) {
            *dim = *size;
            len = len.saturating_mul(*size);
        }
        Self { data, dtype, device, rank: shape.len(), dims, len, is_contiguous: true, is_read_only: false }
    }

    /// Sizes of the dimensions.
    #[inline]
    pub fn shape(&self) -> &[i64] {
        &self.dims[..self.rank]
    }

    /// Number of elements; the largest number where they are more.
    #[inline]
    pub fn len(&self) -> i64 {
        self.len
    }

    /// No elements.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of all elements.
    #[inline]
    pub fn num_bytes(&self) -> usize {
        self.len() as usize * self.dtype.size()
    }

    /// The elements of a tensor in host memory.
    ///
    /// # Safety
    /// `data` must point to `len()` initialized elements of `T` that nobody writes for `'a`.
    ///
    /// # Panics
    /// If the device is not the CPU or `T` has another size than the dtype.
    pub unsafe fn as_slice<'a, T>(&self) -> &'a [T] {
        assert!(self.device == Device::Cpu && size_of::<T>() == self.dtype.size(), "a host tensor of T");
        if self.is_empty() {
            return &[];
        }
        // SAFETY: the caller promises `len()` initialized elements of T, unwritten for 'a.
        unsafe { std::slice::from_raw_parts(self.data.cast(), self.len() as usize) }
    }

    /// The elements of a tensor in host memory, to be written.
    ///
    /// # Safety
    /// As [`Tensor::as_slice`], and nobody else may read or write the elements for `'a`.
    ///
    /// # Panics
    /// As [`Tensor::as_slice`].
    pub unsafe fn as_slice_mut<'a, T>(&self) -> &'a mut [T] {
        assert!(self.device == Device::Cpu && size_of::<T>() == self.dtype.size(), "a host tensor of T");
        if self.is_empty() {
            return &mut [];
        }
        // SAFETY: the caller promises exclusive access to `len()` elements of T for 'a.
        unsafe { std::slice::from_raw_parts_mut(self.data.cast(), self.len() as usize) }
    }
}
