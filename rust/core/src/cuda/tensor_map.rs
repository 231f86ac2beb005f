//! Tensor maps: what the bulk copies of a kernel must know of a matrix, encoded by the driver and passed by value.

use super::{Dtype, runtime};
use crate::Result;
use cudarc::driver::sys::{
    CUtensorMapDataType as DataType, CUtensorMapL2promotion as L2Promotion, CUtensorMapSwizzle as CuSwizzle,
};
use std::ffi::c_uint;

/// Most dimensions of a map.
pub const MAX_MAP_RANK: usize = 5;

/// The driver's own encoding of a map: a field of kernels' parameters.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TensorMap(pub(super) [u64; 16]);

const _: () = assert!(size_of::<TensorMap>() == 128 && align_of::<TensorMap>() == 64);

/// How a box lies in shared memory: 16-byte pieces are exchanged within a span, against bank conflicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Row after row.
    None,
    /// Within 32 bytes.
    Bytes32,
    /// Within 64 bytes.
    Bytes64,
    /// Within 128 bytes.
    Bytes128,
}

/// What L2 fetches from memory where a box needs some of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promotion {
    /// A line.
    Bytes128,
    /// Two lines.
    Bytes256,
}

/// A matrix in global memory, and the box of it that one copy moves. Dimensions count from the innermost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiled<const RANK: usize> {
    /// First element, on a multiple of 16 bytes.
    pub data: *const u8,
    /// Of the elements.
    pub dtype: Dtype,
    /// Elements of each dimension.
    pub dims: [u64; RANK],
    /// Bytes from one index to the next, a multiple of 16; the innermost, of one element, is not read.
    pub strides: [u64; RANK],
    /// Elements of a box in each dimension, at most 256.
    pub box_dims: [u32; RANK],
    /// Of the box in shared memory.
    pub swizzle: Swizzle,
}

impl<const RANK: usize> Tiled<RANK> {
    /// Encodes the map. Elements outside of the matrix are read as zero, and are not written.
    ///
    /// # Errors
    /// When the driver refuses: an address, a stride or a box that the copy engine cannot use.
    pub fn encode(&self, op: &str) -> Result<TensorMap> {
        self.encode_promoting(op, Promotion::Bytes256)
    }

    /// As [`Self::encode`], with what L2 fetches.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_promoting(&self, op: &str, promotion: Promotion) -> Result<TensorMap> {
        const { assert!(RANK >= 1 && RANK <= MAX_MAP_RANK) };
        let driver = &runtime(op)?.driver;
        let dtype = match self.dtype {
            Dtype::Uint8 | Dtype::Int8 | Dtype::Bool => DataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            Dtype::Uint16 => DataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
            Dtype::Float16 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Dtype::Bfloat16 => DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Dtype::Int32 => DataType::CU_TENSOR_MAP_DATA_TYPE_INT32,
            Dtype::Float32 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            Dtype::Int64 => DataType::CU_TENSOR_MAP_DATA_TYPE_INT64,
            Dtype::Float64 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
        };
        let swizzle = match self.swizzle {
            Swizzle::None => CuSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::Bytes32 => CuSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::Bytes64 => CuSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::Bytes128 => CuSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let promotion = match promotion {
            Promotion::Bytes128 => L2Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            Promotion::Bytes256 => L2Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        };
        let mut map = TensorMap::default();
        // SAFETY: a map of the size and alignment of CUtensorMap; arrays of RANK entries, of which the driver reads
        // RANK, and RANK - 1 strides; the address is encoded, not read.
        let status = unsafe {
            (driver.encode_tiled)(
                &mut map,
                dtype as c_uint,
                RANK as u32,
                self.data.cast_mut().cast(),
                self.dims.as_ptr(),
                self.strides.as_ptr().add(1),
                self.box_dims.as_ptr(),
                [1u32; RANK].as_ptr(),
                0, // no interleave
                swizzle as c_uint,
                promotion as c_uint,
                0, // zeros outside
            )
        };
        driver.check(op, "cuTensorMapEncodeTiled", status)?;
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::recorder::{Machine, Recorder};

    const MATRIX: Tiled<2> = Tiled {
        data: 0x1000 as *const u8,
        dtype: Dtype::Bfloat16,
        dims: [4096, 100],
        strides: [2, 8192],
        box_dims: [64, 128],
        swizzle: Swizzle::Bytes128,
    };

    #[test]
    fn a_matrix_reaches_the_driver_as_it_is() {
        let _recorder = Recorder::install(Machine::h200());
        let map = MATRIX.encode("op").unwrap();
        // address, bfloat16, 128-byte swizzle, 256-byte promotion; dimensions, stride, box
        assert_eq!(map.0[..9], [0x1000, 9, 3, 3, 4096, 100, 8192, 64, 128]);
        let rows = Tiled {
            data: MATRIX.data,
            dtype: Dtype::Uint8,
            dims: [640],
            strides: [1],
            box_dims: [256],
            swizzle: Swizzle::None,
        };
        assert_eq!(rows.encode("op").unwrap().0[..6], [0x1000, 0, 0, 3, 640, 256]);
        assert_eq!(rows.encode_promoting("op", Promotion::Bytes128).unwrap().0[3], 2);
    }

    #[test]
    fn what_the_copy_engine_cannot_use_is_refused() {
        let _recorder = Recorder::install(Machine::h200());
        let refused =
            "qbits::op: cuTensorMapEncodeTiled must succeed, got CUDA_ERROR_INVALID_VALUE: invalid argument";
        for bad in [
            Tiled { data: 0x1008 as *const u8, ..MATRIX },
            Tiled { strides: [2, 8200], ..MATRIX },
            Tiled { box_dims: [128, 128], ..MATRIX }, // 256 bytes in a row of a 128-byte swizzle
            Tiled { box_dims: [64, 257], ..MATRIX },
            Tiled { dims: [4096, 0], ..MATRIX },
        ] {
            assert_eq!(bad.encode("op").unwrap_err().message, refused, "{bad:?}");
        }
    }
}
