//! The CUDA backend below the ops: driver, devices, kernel images, and the checked launch.

mod canaries;
mod device;
mod driver;
mod launch;
mod module;
mod settings;
mod stream;
mod tensor_map;

#[cfg(test)]
mod build_rules;
#[cfg(test)]
pub(crate) mod recorder;

pub use canaries::run_between_canaries;
#[cfg(test)]
pub(crate) use device::H200;
pub use device::{Limits, device_name, driver_version, is_available, limits, num_devices, with_context};
pub use launch::{Launch, MAX_GRID_Y, Memory, Params, Symbol, check_memory, full_check, launch};
pub use module::{ARCHS, Image, KernelInfo, SOURCE_HASH, has_kernels, images, kernel_info};
pub use settings::{Family, forced_family, forces_triton};
pub use stream::{Allocation, Event, Stream, current_stream_for, synchronize};
pub use tensor_map::{MAX_MAP_RANK, Promotion, Swizzle, TensorMap, Tiled};

use crate::{Dtype, Result};
use device::Gpus;
use driver::{Driver, Refusal};
use module::Modules;
use std::sync::OnceLock;

/// Everything that lives as long as the process: the driver, its devices and what was loaded onto them.
struct Runtime {
    driver: Driver,
    gpus: Gpus,
    modules: Modules,
}

// SAFETY: the only members that are not Send and Sync by themselves are driver handles (contexts, libraries,
// kernels, streams). They are process-wide names, and the driver takes them from any thread.
unsafe impl Send for Runtime {}
// SAFETY: as above.
unsafe impl Sync for Runtime {}

impl Runtime {
    fn start(driver: Driver, images: &'static [Image]) -> std::result::Result<Self, Refusal> {
        let num_devices = driver.start()?;
        Ok(Self { driver, gpus: Gpus::new(num_devices), modules: Modules::new(images) })
    }
}

/// The runtime, started at the first call; in tests that of the recorder, where one is installed. A refusal
/// is final: the driver does not change its mind within a process.
fn runtime(op: &str) -> Result<&'static Runtime> {
    #[cfg(test)]
    if let Some(runtime) = recorder::runtime() {
        return runtime.as_ref().map_err(|refusal| refusal.error(op));
    }
    static RUNTIME: OnceLock<std::result::Result<Runtime, Refusal>> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| Runtime::start(Driver::load()?, images()));
    runtime.as_ref().map_err(|refusal| refusal.error(op))
}
