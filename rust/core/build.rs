//! Compiles `cuda/*.cu` into one fatbin each and writes `images.rs`: the fatbins, their kernels, and a hash
//! of the sources.
//!
//! `QBITS_CUDA=0` builds without kernels. `QBITS_CUDA_ARCHS` is a list like `80,90a`, or `release`; without
//! it the GPUs of the machine decide. ARCHITECTURE.md says where nvcc is looked for.

#[path = "src/cuda/build_rules.rs"]
mod build_rules;

use build_rules::{
    FNV_START, Kernel, archs, archs_of_source, fnv1a, included, nvcc_flags, read_params, read_report,
};
use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;

type Result<T> = std::result::Result<T, String>;
/// Paths within a folder, and what the files hold.
type Files = BTreeMap<String, Vec<u8>>;

const VARIABLES: &[&str] = &[
    "QBITS_CUDA",
    "QBITS_CUDA_ARCHS",
    "QBITS_NVCC",
    "NVCC",
    "CUDA_HOME",
    "CUDA_PATH",
    "PYO3_PYTHON",
    "PYTHONPATH",
];

/// A compiled source.
struct Image {
    stem: String,
    archs: Vec<String>,
    fatbin: PathBuf,
    kernels: BTreeMap<String, Kernel>,
}

fn main() -> ExitCode {
    for variable in VARIABLES {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("qbits cannot be built: {sentence}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR").ok_or("cargo must set CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR").ok_or("cargo must set OUT_DIR")?);
    let (cuda, src) = (root.join("../../cuda"), root.join("src"));
    for path in [&cuda, &src, &root.join("build.rs")] {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    let device_code = sources(&cuda)?;
    let source_hash = device_code
        .iter()
        .chain(&sources(&src)?)
        .fold(FNV_START, |hash, (name, text)| fnv1a(fnv1a(hash, name.as_bytes()), text));
    let (archs, images) = if wants_cuda()? { compile(&cuda, &device_code, &out)? } else { (vec![], vec![]) };
    write_images(&out.join("images.rs"), source_hash, &archs, &images)
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Kernels are the default wherever NVIDIA has a driver.
fn wants_cuda() -> Result<bool> {
    match variable("QBITS_CUDA").as_deref() {
        None => Ok(matches!(variable("CARGO_CFG_TARGET_OS").as_deref(), Some("linux" | "windows"))),
        Some("0") => Ok(false),
        Some("1") => Ok(true),
        Some(other) => Err(format!("QBITS_CUDA must be 0 or 1, got {other}")),
    }
}

/// Every file of a folder and its subfolders.
fn sources(folder: &Path) -> Result<Files> {
    let unreadable = |path: &Path, error| format!("{} must be readable, got {error}", path.display());
    let mut files = Files::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(current) = folders.pop() {
        for entry in fs::read_dir(&current).map_err(|error| unreadable(&current, error))? {
            let path = entry.map_err(|error| unreadable(&current, error))?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy().replace('\\', "/");
                files.insert(name, fs::read(&path).map_err(|error| unreadable(&path, error))?);
            }
        }
    }
    Ok(files)
}

/// The compiler, from where it may be, in this order. The wheel precedes `PATH`: it is the pinned one.
fn find_nvcc() -> Result<PathBuf> {
    let executable = format!("nvcc{}", env::consts::EXE_SUFFIX);
    for name in ["QBITS_NVCC", "NVCC"] {
        if let Some(path) = variable(name) {
            let found = if Path::new(&path).is_file() { Some(path.clone().into()) } else { on_path(&path) };
            return found.ok_or_else(|| format!("{name} must be the path of nvcc, got {path}"));
        }
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).map(PathBuf::from);
    let within = homes
        .chain(nvidia_wheel())
        .map(|home| home.join("bin").join(&executable))
        .find(|path| path.is_file());
    within.or_else(|| on_path(&executable)).ok_or_else(|| {
        "nvcc must be in QBITS_NVCC, NVCC, CUDA_HOME, CUDA_PATH, the Python package nvidia-cuda-nvcc or \
         PATH, got none; QBITS_CUDA=0 builds for the CPU only"
            .into()
    })
}

fn on_path(executable: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(executable)).find(|path| path.is_file())
}

/// The folder of the package `nvidia.cu13` in the Python that the extension is built for.
fn nvidia_wheel() -> Vec<PathBuf> {
    let python = variable("PYO3_PYTHON").unwrap_or_else(|| "python3".into());
    let script = "import nvidia.cu13 as package; print(*package.__path__, sep='\\n')";
    let output = Command::new(python).args(["-c", script]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().map(PathBuf::from).collect()
}

/// Compute capabilities of the GPUs in this machine, one a line; nothing without a driver.
fn gpus() -> String {
    let output =
        Command::new("nvidia-smi").args(["--query-gpu=compute_cap", "--format=csv,noheader"]).output();
    let output = output.ok().filter(|output| output.status.success());
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

/// Compiles every source that the architectures ask for, as many at a time as there are cores.
fn compile(cuda: &Path, device_code: &Files, out: &Path) -> Result<(Vec<String>, Vec<Image>)> {
    let gpus = gpus();
    let archs = archs(variable("QBITS_CUDA_ARCHS").as_deref(), &gpus.lines().collect::<Vec<_>>())?;
    let mut jobs: Vec<&str> = device_code.keys().filter_map(|name| name.strip_suffix(".cu")).collect();
    jobs.retain(|stem| !archs_of_source(stem, &archs).is_empty());
    if jobs.is_empty() {
        return Ok((archs, vec![]));
    }
    let compiler = Compiler::new(cuda, out, device_code)?;
    let (jobs, done) = (Mutex::new(jobs), Mutex::new(Vec::new()));
    let next = || jobs.lock().ok().and_then(|mut jobs| jobs.pop());
    let work = || {
        while let Some(stem) = next() {
            let image = compiler.image(stem, &archs);
            if let Ok(mut done) = done.lock() {
                done.push(image);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let images = done.into_inner().map_err(|_| "a compiling thread must not panic")?;
    let (images, refusals): (Vec<_>, Vec<_>) = images.into_iter().partition(Result::is_ok);
    if !refusals.is_empty() {
        return Err(refusals.into_iter().filter_map(Result::err).collect::<Vec<_>>().join("\n"));
    }
    let mut images: Vec<Image> = images.into_iter().flatten().collect();
    images.sort_by(|one, other| one.stem.cmp(&other.stem));
    Ok((archs, images))
}

/// nvcc, and what it needs for every source.
struct Compiler<'a> {
    nvcc: PathBuf,
    /// Hash of what the compiler says of its version.
    version_hash: u64,
    cuda: &'a Path,
    device_code: &'a Files,
    out: &'a Path,
}

impl<'a> Compiler<'a> {
    fn new(cuda: &'a Path, out: &'a Path, device_code: &'a Files) -> Result<Self> {
        let nvcc = find_nvcc()?;
        println!("cargo:rerun-if-changed={}", nvcc.display());
        let version = Command::new(&nvcc).arg("--version").output();
        let version =
            version.map_err(|error| format!("nvcc ({}) must start, got {error}", nvcc.display()))?;
        Ok(Self { nvcc, version_hash: fnv1a(FNV_START, &version.stdout), cuda, device_code, out })
    }

    /// The source's fatbin: the one at hand, where source, headers, flags and compiler are still the same.
    fn image(&self, stem: &str, archs: &[String]) -> Result<Image> {
        let archs = archs_of_source(stem, archs);
        let source = format!("{stem}.cu");
        let text_of =
            |name: &str| self.device_code.get(name).map(|text| String::from_utf8_lossy(text).into_owned());
        let text = text_of(&source).unwrap_or_default();
        let flags = nvcc_flags(&text, &archs);
        let headers = included(&text, text_of);
        let hash = headers
            .iter()
            .chain([&source])
            .fold(self.version_hash, |hash, name| fnv1a(hash, &self.device_code[name]));
        let key = format!("{hash:016x} {} {}", self.nvcc.display(), flags.join(" "));
        let (fatbin, record) =
            (self.out.join(format!("{stem}.fatbin")), self.out.join(format!("{stem}.kernels")));
        let recorded = fs::read_to_string(&record).ok().filter(|_| fatbin.is_file());
        let kernels = match recorded.and_then(|recorded| read_record(&recorded, &key)) {
            Some(kernels) => kernels,
            None => {
                let compiled = self.run(stem, &flags, &fatbin);
                let kernels = compiled.map_err(|sentence| format!("cuda/{source}: {sentence}"))?;
                write(&record, &record_of(&key, &kernels))?;
                kernels
            }
        };
        Ok(Image {
            stem: stem.into(),
            archs: archs.iter().map(|arch| arch.to_string()).collect(),
            fatbin,
            kernels,
        })
    }

    /// Runs nvcc and reads what it says about the kernels.
    fn run(&self, stem: &str, flags: &[String], fatbin: &Path) -> Result<BTreeMap<String, Kernel>> {
        let kept = self.out.join(format!("{stem}.kept"));
        let _ = fs::remove_dir_all(&kept);
        let io = |error: std::io::Error| error.to_string();
        fs::create_dir_all(&kept).map_err(io)?;
        let mut command = Command::new(&self.nvcc);
        command.args(flags).args(["--keep", "--keep-dir"]).arg(&kept).arg("-o").arg(fatbin);
        let output = command.arg(self.cuda.join(format!("{stem}.cu"))).output().map_err(io)?;
        let report = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            let (nvcc, printed) = (self.nvcc.display(), String::from_utf8_lossy(&output.stdout));
            let hint = if report.contains("host compiler") { " (nvcc needs g++)" } else { "" };
            return Err(format!("{nvcc} must succeed{hint}, got {}\n{printed}{report}", output.status));
        }
        let mut kernels = read_report(&report)?;
        for (name, ptx) in sources(&kept)? {
            if name.ends_with(".ptx") {
                read_params(&String::from_utf8_lossy(&ptx), &mut kernels)?;
            }
        }
        fs::remove_dir_all(&kept).map_err(io)?;
        Ok(kernels)
    }
}

/// The key of a compilation, then a line for each kernel.
fn record_of(key: &str, kernels: &BTreeMap<String, Kernel>) -> String {
    kernels.iter().fold(format!("{key}\n"), |mut text, (name, kernel)| {
        let Kernel { registers, shared_bytes, param_bytes, max_threads } = kernel;
        let _ = writeln!(text, "{name} {registers} {shared_bytes} {param_bytes} {max_threads}");
        text
    })
}

/// The kernels of a record, if it was made under the same key.
fn read_record(record: &str, key: &str) -> Option<BTreeMap<String, Kernel>> {
    let mut lines = record.lines();
    if lines.next()? != key {
        return None;
    }
    let kernel = |line: &str| {
        let (name, numbers) = line.split_once(' ')?;
        let mut numbers = numbers.split(' ').map_while(|number| number.parse().ok());
        let kernel = Kernel {
            registers: numbers.next()?,
            shared_bytes: numbers.next()?,
            param_bytes: numbers.next()?,
            max_threads: numbers.next()?,
        };
        Some((name.to_string(), kernel))
    };
    lines.map(kernel).collect()
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| format!("{} must be writable, got {error}", path.display()))
}

/// The Rust source that embeds everything.
fn write_images(path: &Path, source_hash: u64, archs: &[String], images: &[Image]) -> Result<()> {
    let items = images.iter().fold(String::new(), |mut items, image| {
        let Image { stem, archs, fatbin, kernels } = image;
        let kernels = kernels.iter().fold(String::new(), |mut kernels, (name, kernel)| {
            let Kernel { registers, shared_bytes, param_bytes, max_threads } = kernel;
            let first = format!("registers: {registers}, shared_bytes: {shared_bytes}");
            let rest = format!("param_bytes: {param_bytes}, max_threads: {max_threads}");
            let _ = writeln!(kernels, "        KernelInfo {{ name: {name:?}, {first}, {rest} }},");
            kernels
        });
        let bytes = format!("&Aligned(*include_bytes!({:?}))", fatbin.display().to_string());
        let _ = writeln!(
            items,
            "    Image {{ name: {stem:?}, archs: &{archs:?}, bytes: {bytes}, kernels: &[\n{kernels}    ] }},"
        );
        items
    });
    let text = format!(
        "/// What this build's kernels were compiled for, as nvcc spells it.\n\
         pub const ARCHS: &[&str] = &{archs:?};\n\
         /// Of the files that decide what a kernel computes and how it is launched.\n\
         pub const SOURCE_HASH: &str = \"{source_hash:016x}\";\n\
         static IMAGES: &[Image] = &[\n{items}];\n"
    );
    write(path, &text)
}
