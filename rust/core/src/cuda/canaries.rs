//! Outputs between canaries, for `QBITS_CHECK=full`: an op that writes outside of one is told with the argument.

use super::launch::is_capturing;
use super::{Allocation, Stream, runtime, synchronize};
use crate::spec::{Role, Spec, Value};
use crate::tensor::Tensor;
use crate::{Error, ErrorKind, Result};

/// Bytes before and behind each output, whose alignment they keep.
const CANARY_BYTES: usize = 512;
/// What they hold, and what an output holds until it is written.
const CANARY: u8 = 0xA5;

/// Memory that takes the place of an output while the op runs.
struct Guarded {
    name: &'static str,
    output: Tensor,
    allocation: Allocation,
    /// Bytes before the output's place.
    first: usize,
}

impl Guarded {
    /// # Safety
    /// As [`Allocation::new`].
    unsafe fn new(op: &str, name: &'static str, output: Tensor, stream: Stream) -> Result<Self> {
        let first = CANARY_BYTES + output.data as usize % CANARY_BYTES;
        let num_bytes = first + output.num_bytes() + CANARY_BYTES;
        // SAFETY: the caller promises the stream; the memory is as long as what is filled.
        let allocation = unsafe {
            let allocation = Allocation::new(op, num_bytes, stream)?;
            allocation.fill(op, CANARY, stream)?;
            allocation
        };
        Ok(Self { name, output, allocation, first })
    }

    fn place(&self) -> Tensor {
        let mut place = self.output;
        place.data = self.allocation.data().wrapping_add(self.first);
        place
    }

    /// Looks at the canaries, then hands what was written to the caller's output.
    ///
    /// # Safety
    /// As [`Allocation::new`]; the output is live memory of the stream's device.
    unsafe fn finish(&self, op: &str, stream: Stream) -> Result<()> {
        let behind = self.first + self.output.num_bytes();
        let (mut before_bytes, mut behind_bytes) = (vec![0; self.first], vec![0; CANARY_BYTES]);
        // SAFETY: the caller promises the stream; both ranges lie within the allocation.
        unsafe {
            self.allocation.read(op, 0, &mut before_bytes, stream)?;
            self.allocation.read(op, behind, &mut behind_bytes, stream)?;
        }
        let is_written = |byte: &u8| *byte != CANARY;
        let distance = (before_bytes.iter().rev().position(is_written).map(|index| (index + 1, "before")))
            .or_else(|| behind_bytes.iter().position(is_written).map(|index| (index + 1, "behind")));
        if let Some((distance, side)) = distance {
            let (name, num_bytes) = (self.name, self.output.num_bytes());
            let rule = format!("{name} must be written within its {num_bytes} bytes");
            let message = format!("qbits::{op}: {rule}, got a write {distance} bytes {side} them");
            return Err(Error::new(ErrorKind::Driver, message));
        }
        // SAFETY: the output holds as many bytes as its place does.
        unsafe { self.allocation.copy_to(op, self.first, self.output.data, self.output.num_bytes(), stream) }
    }
}

/// Calls `run` with every output and workspace in poisoned memory of its own, between canaries, and copies the outputs
/// to where the caller wants them. During a capture, where nothing may be allocated or waited for, `run` gets the
/// caller's values.
///
/// # Safety
/// `stream.handle` must be a live stream of the device's primary context, or null, and the memory of the values live.
///
/// # Errors
/// Those of `run`; and the first output beside which something was written.
pub unsafe fn run_between_canaries(
    spec: &Spec,
    values: &[Value<'_>],
    stream: Stream,
    run: impl FnOnce(&[Value<'_>]) -> Result<()>,
) -> Result<()> {
    let op = spec.name;
    let runtime = runtime(op)?;
    let driver = &runtime.driver;
    let is_capturing = {
        let _entered = runtime.gpu(op, stream.device)?.enter(driver, op)?;
        is_capturing(driver, stream)
    };
    if is_capturing {
        return run(values);
    }
    let mut guarded = Vec::new();
    let mut placed = values.to_vec();
    for (arg, value) in spec.args.iter().zip(&mut placed) {
        let Value::Tensor(tensor) = value else { continue };
        if matches!(arg.role, Role::Out(..) | Role::Scratch(_)) && !tensor.is_empty() {
            // SAFETY: the caller's promise.
            let guard = unsafe { Guarded::new(op, arg.name, *tensor, stream) }?;
            *tensor = guard.place();
            guarded.push(guard);
        }
    }
    run(&placed)?;
    // SAFETY: the caller's promise. The memory outlives the work on it: dropping an allocation waits for the device.
    unsafe {
        guarded.iter().try_for_each(|guard| guard.finish(op, stream))?;
        synchronize(op, stream)
    }
}

#[cfg(test)]
mod tests {
    use super::super::current_stream_for;
    use super::super::recorder::{Machine, Recorder};
    use super::*;
    use crate::ops::blockwise_4bit::Quantize4bit;
    use crate::tensor::{Device, Dtype};

    /// Where the recorder puts the first allocation.
    const FIRST: u64 = 0x10_0000_0000;

    fn full() -> Machine {
        let mut machine = Machine::h200();
        machine.settings.full_check = true;
        machine
    }

    /// quantize_4bit of 64 floats: packed at an odd address, absmax behind it.
    fn values() -> Vec<Value<'static>> {
        let tensor = |data: usize, dtype, len| {
            Value::Tensor(Tensor::new(data as *mut u8, dtype, Device::Cuda(0), &[len]))
        };
        vec![
            tensor(0x1000, Dtype::Float32, 64),
            Value::Str("nf4"),
            Value::Int(64),
            tensor(0x2003, Dtype::Uint8, 32),
            tensor(0x3000, Dtype::Float32, 1),
        ]
    }

    fn run(scribble: Option<u64>, recorder: &Recorder) -> Result<Vec<usize>> {
        let mut seen = Vec::new();
        let stream = current_stream_for("op", 0).unwrap();
        // SAFETY: the recorder touches no memory of a device.
        unsafe {
            run_between_canaries(&Quantize4bit::SPEC, &values(), stream, |values| {
                seen.extend(values.iter().filter_map(|value| match value {
                    Value::Tensor(tensor) => Some(tensor.data as usize),
                    _ => None,
                }));
                scribble.into_iter().for_each(|address| recorder.scribble(address));
                Ok(())
            })
        }?;
        Ok(seen)
    }

    #[test]
    fn outputs_move_and_inputs_stay() {
        let recorder = Recorder::install(full());
        let seen = run(None, &recorder).unwrap();
        assert_eq!(seen, [0x1000, FIRST as usize + 515, FIRST as usize + 0x1_0000_0000 + 512]);
        let copies = recorder.calls().iter().filter(|call| **call == "cuMemcpyDtoDAsync").count();
        assert_eq!((copies, recorder.allocations().len()), (2, 0));
    }

    #[test]
    fn a_write_beside_an_output_is_told() {
        for (address, output, num_bytes, place) in [
            (FIRST + 514, "packed", 32, "1 bytes before"),
            (FIRST, "packed", 32, "515 bytes before"),
            (FIRST + 515 + 32, "packed", 32, "1 bytes behind"),
            (FIRST + 0x1_0000_0000 + 512 + 4 + 511, "absmax", 4, "512 bytes behind"),
        ] {
            let recorder = Recorder::install(full());
            let message = run(Some(address), &recorder).unwrap_err().message;
            assert_eq!(
                message,
                format!(
                    "qbits::quantize_4bit: {output} must be written within its {num_bytes} bytes, got a write {place} them"
                )
            );
            assert_eq!(recorder.allocations(), []);
        }
    }

    #[test]
    fn within_an_output_anything_may_be_written() {
        let recorder = Recorder::install(full());
        run(Some(FIRST + 515), &recorder).unwrap();
        run(Some(FIRST + 515 + 31), &recorder).unwrap();
    }

    #[test]
    fn a_capture_gets_the_callers_memory() {
        let recorder = Recorder::install(Machine { is_capturing: true, ..full() });
        assert_eq!(run(None, &recorder).unwrap(), [0x1000, 0x2003, 0x3000]);
    }
}
