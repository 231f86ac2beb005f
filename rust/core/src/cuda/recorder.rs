//! Stands in for libcuda in tests: devices of any kind, calls that fail on request, and a record of every
//! launch.

mod calls;

use super::driver::{Refusal, Status};
use super::module::Aligned;
use super::settings::Settings;
use super::{H200, Image, KernelInfo, Limits, Runtime, images};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{c_int, c_uint};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// The machine that a test wants.
#[derive(Clone)]
pub(crate) struct Machine {
    pub devices: Vec<Limits>,
    pub images: &'static [Image],
    pub driver_version: c_int,
    /// Threads that the driver says every kernel allows, unless its launch bounds allow fewer.
    pub kernel_max_threads: u32,
    /// What the driver says that every kernel was compiled for.
    pub ptx_version: c_int,
    /// A capture in global mode is in progress on every stream.
    pub is_capturing: bool,
    pub settings: Settings,
    pub failures: HashMap<&'static str, Status>,
}

impl Machine {
    /// One H200 with the images of this build.
    pub fn h200() -> Self {
        Self::with_devices(1)
    }

    /// Several of them.
    pub fn with_devices(num_devices: i32) -> Self {
        Self {
            devices: (0..num_devices).map(|ordinal| Limits { ordinal, ..H200 }).collect(),
            images: images(),
            driver_version: 13_000,
            kernel_max_threads: 1024,
            ptx_version: 90,
            is_capturing: false,
            settings: Settings::default(),
            failures: HashMap::new(),
        }
    }

    /// Instead of this build's images one with these symbols and parameter sizes, built for 80 and 90a.
    pub fn with_kernels(self, kernels: &[(&'static str, u32)]) -> Self {
        self.with_image(&["80", "90a"], kernels)
    }

    /// Instead of this build's images one that was built for `archs`.
    pub fn with_image(mut self, archs: &'static [&'static str], kernels: &[(&'static str, u32)]) -> Self {
        static BYTES: Aligned<[u8; 64]> = Aligned([0; 64]);
        let info = |&(name, param_bytes)| {
            let max_threads = 1024;
            KernelInfo { name, registers: 32, shared_bytes: 1024, param_bytes, max_threads }
        };
        let kernels: &'static [KernelInfo] = kernels.iter().map(info).collect::<Vec<_>>().leak();
        self.images = vec![Image { name: "recorded", archs, kernels, bytes: &BYTES }].leak();
        self
    }

    /// Every call of this name returns `status`.
    pub fn failing(mut self, call: &'static str, status: Status) -> Self {
        self.failures.insert(call, status);
        self
    }
}

/// One cuLaunchKernelEx.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Launched {
    pub kernel: String,
    pub grid: u32,
    pub grid_y: u32,
    pub cluster: u32,
    pub dependent: bool,
    pub threads: u32,
    pub shared_bytes: u32,
    pub stream: usize,
    /// Whose context was current.
    pub device: i32,
    pub params: Vec<u8>,
}

struct State {
    machine: Machine,
    calls: Vec<&'static str>,
    launches: Vec<Launched>,
    /// Start, bytes, device.
    allocations: Vec<(u64, u64, i32)>,
    /// What memory was set to, in order.
    fills: Vec<(Range<u64>, u8)>,
    /// Device of each stream that was made; their handles count from 1.
    streams: Vec<i32>,
    /// Largest dynamic shared memory that was opted into.
    opted_in: c_int,
}

struct Stand {
    state: Mutex<State>,
    runtime: OnceLock<std::result::Result<Runtime, Refusal>>,
}

thread_local! {
    static STAND: RefCell<Option<&'static Stand>> = const { RefCell::new(None) };
    /// The context that is current on this thread, as the driver keeps it.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
    static CAPTURE_MODE: Cell<c_uint> = const { Cell::new(0) };
}

/// Everything that was ever installed, so that a leak checker finds it reachable.
static STANDS: Mutex<Vec<&'static Stand>> = Mutex::new(Vec::new());

/// An installed machine: it answers every driver call of this thread until it is dropped.
pub(crate) struct Recorder(&'static Stand);

impl Recorder {
    pub fn install(machine: Machine) -> Self {
        let state = State {
            machine,
            calls: Vec::new(),
            launches: Vec::new(),
            allocations: Vec::new(),
            fills: Vec::new(),
            streams: Vec::new(),
            opted_in: 0,
        };
        let stand: &'static Stand =
            Box::leak(Box::new(Stand { state: Mutex::new(state), runtime: OnceLock::new() }));
        STANDS.lock().unwrap_or_else(PoisonError::into_inner).push(stand);
        let recorder = Self(stand);
        recorder.enter_thread();
        recorder
    }

    /// Answers the calls of this thread too. Like a fresh thread's, its context and its capture mode start
    /// anew.
    pub fn enter_thread(&self) {
        STAND.set(Some(self.0));
        CURRENT.set(0);
        CAPTURE_MODE.set(0);
    }

    pub fn calls(&self) -> Vec<&'static str> {
        self.0.state().calls.clone()
    }

    pub fn launches(&self) -> Vec<Launched> {
        self.0.state().launches.clone()
    }

    pub fn opted_in(&self) -> c_int {
        self.0.state().opted_in
    }

    /// Forgets that a call was to fail.
    pub fn succeed(&self, call: &str) {
        self.0.state().machine.failures.remove(call);
    }

    /// From now on every call of this name returns `status`.
    pub fn fail(&self, call: &'static str, status: Status) {
        self.0.state().machine.failures.insert(call, status);
    }

    /// Tells the driver of memory.
    pub fn add_allocation(&self, start: u64, num_bytes: u64, device: i32) {
        self.0.state().allocations.push((start, num_bytes, device));
    }

    pub fn allocations(&self) -> Vec<(u64, u64, i32)> {
        self.0.state().allocations.clone()
    }

    /// A kernel changes the byte at an address.
    pub fn scribble(&self, address: u64) {
        let mut state = self.0.state();
        let byte = !state.byte_at(address);
        state.fills.push((address..address + 1, byte));
    }

    /// Makes a device's context current on this thread, or none.
    pub fn set_current(&self, device: Option<i32>) {
        CURRENT.set(device.map_or(0, context_of));
    }

    pub fn current(&self) -> Option<i32> {
        device_of(CURRENT.get())
    }

    pub fn capture_mode(&self) -> c_uint {
        CAPTURE_MODE.get()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        STAND.set(None);
    }
}

/// The runtime of this thread's recorder.
pub(super) fn runtime() -> Option<&'static std::result::Result<Runtime, Refusal>> {
    let stand = STAND.with_borrow(|stand| *stand)?;
    Some(stand.runtime.get_or_init(|| {
        let images = stand.state().machine.images;
        Runtime::start(calls::DRIVER, images)
    }))
}

/// The settings of this thread's recorder.
pub(super) fn settings() -> Option<Settings> {
    let stand = STAND.with_borrow(|stand| *stand)?;
    Some(stand.state().machine.settings)
}

impl Stand {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Contexts, libraries, kernels and streams are small numbers in a pointer's clothes.
fn context_of(device: i32) -> usize {
    0x1000 + device as usize
}

fn device_of(context: usize) -> Option<i32> {
    context.checked_sub(0x1000).map(|device| device as i32)
}

impl State {
    /// Image and kernel of a handle.
    fn kernel(&self, handle: usize) -> Option<&'static KernelInfo> {
        let (image, kernel) = ((handle >> 16).checked_sub(1)?, (handle & 0xffff).checked_sub(1)?);
        self.machine.images.get(image)?.kernels.get(kernel)
    }

    /// Memory holds what it was last set to.
    fn byte_at(&self, address: u64) -> u8 {
        self.fills.iter().rev().find(|(range, _)| range.contains(&address)).map_or(0, |(_, byte)| *byte)
    }

    /// What a driver does not do during a capture, unless the thread relaxed its mode.
    fn forbids_unsafe_calls(&self) -> bool {
        self.machine.is_capturing && CAPTURE_MODE.get() != 2
    }
}
