//! Fabricated foreign tensors: CPU and CUDA, owned and borrowed, well-formed and not. Run under valgrind in CI.

use super::*;
use proptest::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

fn dl_tensor(shape: &mut [i64], strides: Option<&mut [i64]>) -> DlTensor {
    DlTensor {
        data: std::ptr::without_provenance_mut(0x1000),
        device: DlDevice { device_type: DEVICE_CUDA, device_id: 3 },
        ndim: shape.len() as i32,
        dtype: DlDataType { code: 4, bits: 16, lanes: 1 },
        shape: shape.as_mut_ptr(),
        strides: strides.map_or(std::ptr::null_mut(), <[i64]>::as_mut_ptr),
        byte_offset: 6,
    }
}

fn view(tensor: &DlTensor) -> Result<Tensor, Refusal> {
    // SAFETY: the tests build shape and strides of `ndim` numbers.
    unsafe { tensor.view(FLAG_READ_ONLY) }
}

#[test]
fn a_cuda_tensor_is_read_with_offset_flags_and_shape() {
    let tensor = view(&dl_tensor(&mut [2, 3], None)).expect("legal");
    assert_eq!(
        (tensor.device, tensor.dtype, tensor.shape()),
        (Device::Cuda(3), Dtype::Bfloat16, &[2, 3][..])
    );
    assert_eq!((tensor.data as usize, tensor.is_contiguous, tensor.is_read_only), (0x1006, true, true));
}

#[test]
fn strides_of_size_one_and_of_empty_tensors_say_nothing() {
    let is_contiguous = |shape: &mut [i64], strides: &mut [i64]| {
        view(&dl_tensor(shape, Some(strides))).expect("legal").is_contiguous
    };
    assert!(is_contiguous(&mut [2, 1, 3], &mut [3, 77, 1]));
    assert!(is_contiguous(&mut [0, 5], &mut [9, 9]));
    assert!(!is_contiguous(&mut [2, 3], &mut [1, 2]));
    assert!(!is_contiguous(&mut [2, 3], &mut [0, 1]));
}

#[test]
fn foreign_types_devices_and_ranks_are_refused() {
    let refused = |change: fn(&mut DlTensor)| {
        let mut shape = [2, 3];
        let mut tensor = dl_tensor(&mut shape, None);
        change(&mut tensor);
        let refusal = view(&tensor).expect_err("must be refused");
        (refusal.kind, format!("must {}, got {}", refusal.rule, refusal.got))
    };
    assert_eq!(
        refused(|t| t.dtype.lanes = 4),
        (
            ErrorKind::Dtype,
            "must have a dtype that qbits knows, got DLPack type code 4 with 16 bits and 4 lanes".into()
        )
    );
    assert_eq!(refused(|t| t.dtype.code = 5).0, ErrorKind::Dtype); // complex
    assert_eq!(
        refused(|t| t.device.device_type = 0x7fff_ffff),
        (ErrorKind::Device, "must be on the CPU or a CUDA device, got DLPack device type 2147483647".into())
    );
    assert_eq!(refused(|t| t.ndim = 9).0, ErrorKind::Shape);
    assert_eq!(refused(|t| t.ndim = -1).0, ErrorKind::Shape);
    assert_eq!(refused(|t| t.shape = std::ptr::null_mut()).0, ErrorKind::Value);
}

static NUM_DELETED: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" fn delete(managed: *mut DlManagedTensorVersioned) {
    NUM_DELETED.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the test boxed it, and a deleter runs once.
    drop(unsafe { Box::from_raw(managed) });
}

#[test]
fn an_owned_tensor_is_deleted_once_and_a_foreign_version_is_not_read() {
    let managed = Box::new(DlManagedTensorVersioned {
        version: DlVersion { major: 2, minor: 0 },
        manager_ctx: std::ptr::null_mut(),
        deleter: Some(delete),
        flags: u64::MAX,
        dl_tensor: DlTensor { shape: std::ptr::without_provenance_mut(8), ..dl_tensor(&mut [1], None) },
    });
    let owned = Owned::Versioned(NonNull::from(Box::leak(managed)));
    // SAFETY: a live managed tensor; its major version says that the rest must not be read.
    let refusal = unsafe { owned.view() }.expect_err("version 2");
    assert_eq!((refusal.rule, refusal.got.as_str()), ("speak DLPack version 1", "version 2.0"));
    assert_eq!(NUM_DELETED.load(Ordering::SeqCst), 0);
    drop(owned);
    assert_eq!(NUM_DELETED.load(Ordering::SeqCst), 1);
}

#[test]
fn the_exchange_table_of_our_major_version_is_found_in_the_list() {
    let head = |major, prev_api| ExchangeHeader { version: DlVersion { major, minor: 0 }, prev_api };
    let mut api = ExchangeApi {
        header: head(1, std::ptr::null_mut()),
        allocate: None,
        from_object: None,
        to_object: None,
        borrow: None,
        current_stream: None,
    };
    let newer = head(2, (&raw mut api).cast());
    // SAFETY: both tables live until the end of the test, longer than the reference is used.
    let found = unsafe { ExchangeApi::find(&newer) }.expect("version 1 stands second");
    assert!(std::ptr::eq(found, &api));
    // SAFETY: a list of one header without a predecessor.
    assert!(unsafe { ExchangeApi::find(&head(3, std::ptr::null_mut())) }.is_none());
}

proptest! {
    /// Any numbers in the struct give a tensor or a refusal, never a panic.
    #[test]
    fn any_numbers_are_read_or_refused(
        shape in proptest::collection::vec(any::<i64>(), 0..9), device_type in any::<i32>(), code in any::<u8>(),
        bits in any::<u8>(), lanes in any::<u16>(), byte_offset in any::<u64>(), has_strides in any::<bool>(),
    ) {
        let mut strides = shape.clone();
        let mut shape = shape;
        let mut tensor = dl_tensor(&mut shape, has_strides.then_some(&mut strides[..]));
        tensor.device.device_type = device_type;
        tensor.dtype = DlDataType { code, bits, lanes };
        tensor.byte_offset = byte_offset;
        let _ = view(&tensor);
    }

    /// Plausible tensors are read whatever their strides are, and contiguity is what torch says.
    #[test]
    fn contiguity_is_row_major_without_gaps(dims in proptest::collection::vec(0i64..4, 0..5), swap in any::<bool>()) {
        let mut shape = dims.clone();
        let mut strides: Vec<i64> =
            (0..dims.len()).map(|i| dims[i + 1..].iter().product::<i64>().max(1)).collect();
        if swap { strides.reverse(); }
        let expected = dims.contains(&0) || dims.iter().enumerate().all(|(i, size)| {
            *size == 1 || strides[i] == dims[i + 1..].iter().product::<i64>()
        });
        let tensor = view(&dl_tensor(&mut shape, Some(&mut strides))).expect("legal");
        prop_assert_eq!(tensor.is_contiguous, expected);
    }
}
