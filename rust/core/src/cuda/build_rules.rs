//! What the build script decides without a compiler at hand: architectures, flags, and what ptxas' report
//! allows. A module of build.rs, and of the crate's tests.

use std::collections::{BTreeMap, BTreeSet};

/// What a wheel for everybody holds: machine code for every generation, and PTX for those to come.
const RELEASE_ARCHS: &str = "75,80,86,89,90a,100,120,compute_80";
/// Where the machine has no GPU: covers everything from Ampere on.
const DEFAULT_ARCHS: &str = "80,90a,compute_80";
const FLAGS: &[&str] = &[
    "-std=c++20",
    "-O3",
    "-fmad=false", // a fused multiply-add rounds once where NUMERICS rounds twice
    "-ftz=false",
    "-prec-div=true",
    "-prec-sqrt=true",
    "-Werror",
    "all-warnings",
    "-compress-mode=size",
    "--fatbin",
    "-Xptxas",
    "-v",
];

/// A kernel as the compiler reported it, the largest of all architectures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    pub registers: u32,
    pub shared_bytes: u32,
    pub param_bytes: u32,
    pub max_threads: u32,
}

/// The architectures to build for: those of `QBITS_CUDA_ARCHS`, else of the GPUs in the machine (`9.0`, ...).
pub fn archs(requested: Option<&str>, capabilities: &[&str]) -> Result<Vec<String>, String> {
    let list = match requested.map(str::trim) {
        None | Some("") => {
            let mut found: Vec<String> = capabilities.iter().filter_map(|gpu| arch_of(gpu)).collect();
            found.sort();
            found.dedup();
            if !found.is_empty() {
                return Ok(found);
            }
            DEFAULT_ARCHS
        }
        Some("release") => RELEASE_ARCHS,
        Some(list) => list,
    };
    let archs: Vec<String> = list.split(',').map(|arch| arch.trim().to_string()).collect();
    let is_number = |text: &str| text.len() >= 2 && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_arch =
        |arch: &&String| is_number(arch.trim_start_matches("compute_").trim_end_matches(['a', 'f']));
    if !archs.iter().all(|arch| is_arch(&arch)) || archs.iter().all(|arch| is_ptx(arch)) {
        let rule = "QBITS_CUDA_ARCHS must be `release` or a list like `80,90a`, with one GPU at least";
        return Err(format!("{rule}, got {list:?}"));
    }
    Ok(archs)
}

/// The entry of the release list that runs on a GPU of this capability best; none for a GPU older than the
/// list.
fn arch_of(capability: &str) -> Option<String> {
    let (major, minor) = capability.trim().split_once('.')?;
    let device: u32 = format!("{major}{minor}").parse().ok()?;
    let number = |arch: &str| arch.trim_end_matches('a').parse::<u32>().ok();
    let fits = |arch: &&str| number(arch).is_some_and(|built| built / 10 == device / 10 && built <= device);
    RELEASE_ARCHS.split(',').rfind(fits).map(str::to_string)
}

fn is_ptx(arch: &str) -> bool {
    arch.starts_with("compute_")
}

/// What one source is built for: all that was asked for, and of an `_sm90` source the 90a code alone.
pub fn archs_of_source<'a>(stem: &str, archs: &'a [String]) -> Vec<&'a str> {
    let all = archs.iter().map(String::as_str);
    if stem.ends_with("_sm90") { all.filter(|arch| *arch == "90a").collect() } else { all.collect() }
}

/// Names of the files that a source includes, and of those that they include, sorted. `text_of` knows the
/// files beside it; a name that it does not know is the compiler's own.
pub fn included(source: &str, text_of: impl Fn(&str) -> Option<String>) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut texts = vec![source.to_string()];
    while let Some(text) = texts.pop() {
        for name in text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.strip_suffix('"'))
        {
            if let Some(text) = text_of(name)
                && names.insert(name.to_string())
            {
                texts.push(text);
            }
        }
    }
    names
}

/// nvcc's arguments for one source, without paths. A line `// nvcc: -fmad=true` among its first ten replaces
/// the flag.
pub fn nvcc_flags(source: &str, archs: &[&str]) -> Vec<String> {
    let own: Vec<&str> = source
        .lines()
        .take(10)
        .filter_map(|line| line.strip_prefix("// nvcc: "))
        .flat_map(str::split_whitespace)
        .collect();
    let key = |flag: &str| flag.split('=').next().map(str::to_string);
    let replaced = |flag: &&&str| flag.contains('=') && own.iter().any(|own| key(own) == key(flag));
    let mut flags: Vec<String> =
        FLAGS.iter().filter(|flag| !replaced(flag)).map(|flag| flag.to_string()).collect();
    flags.extend(own.iter().map(|flag| flag.to_string()));
    for arch in archs {
        let number = arch.trim_start_matches("compute_");
        let code = if is_ptx(arch) { arch.to_string() } else { format!("sm_{number}") };
        flags.extend(["-gencode".into(), format!("arch=compute_{number},code={code}")]);
    }
    flags
}

/// Correctness comes first there, and its ptxas spills four bytes where the others' spill none.
const MAY_SPILL: &str = "sm_75";

/// Registers and shared memory of every kernel in ptxas' report. A spill and a serialised wgmma are errors:
/// both cost more than any tuning wins, and neither shows in a test.
pub fn read_report(report: &str) -> Result<BTreeMap<String, Kernel>, String> {
    let (mut kernels, mut refusals) = (BTreeMap::new(), Vec::new());
    let (mut name, mut arch) = (String::new(), "");
    for line in report.lines() {
        if let Some(code) = line.split_once("(C75").and_then(|(_, rest)| rest.get(..2)?.parse::<u32>().ok())
            && (10..=19).contains(&code)
        {
            refusals.push(format!("wgmma must not be serialised, got {}", line.trim()));
        }
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let mut quoted = rest.split('\'');
            name = quoted.next().unwrap_or_default().to_string();
            arch = quoted.nth(1).unwrap_or_default();
            if name.starts_with("_Z") {
                refusals.push(format!("kernels must be declared extern \"C\", got {name}"));
            }
        } else if number(line, " bytes spill stores") + number(line, " bytes spill loads") > 0
            && arch != MAY_SPILL
        {
            refusals.push(format!("{name} ({arch}) must not spill registers, got {}", line.trim()));
        } else if line.contains(": Used ") && line.contains(" registers") {
            let kernel: &mut Kernel = kernels.entry(name.clone()).or_default();
            kernel.registers = kernel.registers.max(number(line, " registers"));
            kernel.shared_bytes = kernel.shared_bytes.max(number(line, " bytes smem"));
        }
    }
    if refusals.is_empty() { Ok(kernels) } else { Err(refusals.join("\n")) }
}

/// The number before `unit`; 0 where the line does not have it.
fn number(line: &str, unit: &str) -> u32 {
    let before = line.split(unit).next().filter(|before| before.len() < line.len()).unwrap_or_default();
    before.rsplit([' ', ',']).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// Sets the parameter size and the most threads of every kernel from its PTX. Each takes one struct, which is what a
/// launch passes, and has launch bounds.
pub fn read_params(ptx: &str, kernels: &mut BTreeMap<String, Kernel>) -> Result<(), String> {
    for entry in ptx.split(".entry ").skip(1) {
        let Some((name, rest)) = entry.split_once('(') else { continue };
        let params = rest.split(')').next().unwrap_or_default();
        let sizes: Vec<&str> = params.lines().filter(|line| line.contains(".param ")).collect();
        let size = |line: &str| line.split_once('[')?.1.split(']').next()?.parse().ok();
        let (Some(kernel), [line]) = (kernels.get_mut(name.trim()), &sizes[..]) else {
            return Err(format!("{} must take one struct, got {} parameters", name.trim(), sizes.len()));
        };
        kernel.param_bytes =
            size(line).ok_or_else(|| format!("{} must take one struct, got {}", name.trim(), line.trim()))?;
        let bounds =
            rest.split('{').next().and_then(|head| head.split_once(".maxntid ")).map(|(_, rest)| rest);
        let threads = bounds.and_then(|rest| {
            let line = rest.lines().next().unwrap_or_default();
            line.split(',').map(|number| number.trim().parse::<u32>().ok()).product()
        });
        kernel.max_threads = threads.ok_or_else(|| format!("{} must have __launch_bounds__", name.trim()))?;
    }
    Ok(())
}

/// 64-bit FNV-1a, to tell one state of the sources from another.
pub fn fnv1a(mut hash: u64, bytes: &[u8]) -> u64 {
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash
}

/// The state before the first byte.
pub const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'copy_float32' for 'sm_80'
ptxas info    : Function properties for copy_float32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 2.647 ms
ptxas info    : Compiling entry function 'copy_float32' for 'sm_90a'
ptxas info    : Function properties for copy_float32
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 512 bytes smem
";

    #[test]
    fn a_report_gives_the_most_that_any_architecture_needs() {
        let expected = Kernel { registers: 40, shared_bytes: 512, ..Kernel::default() };
        assert_eq!(read_report(REPORT), Ok(BTreeMap::from([("copy_float32".into(), expected)])));
    }

    #[test]
    fn spills_pass_on_the_oldest_architecture_only() {
        let spilt = REPORT.replacen("0 bytes spill stores", "8 bytes spill stores", 1);
        assert!(read_report(&spilt.replace("sm_80", "sm_75")).is_ok());
    }

    #[test]
    fn spills_fail_with_the_name_of_the_kernel() {
        let stores = REPORT.replacen("0 bytes spill stores", "8 bytes spill stores", 1);
        assert_eq!(
            read_report(&stores).unwrap_err(),
            "copy_float32 (sm_80) must not spill registers, got 0 bytes stack frame, 8 bytes spill stores, 0 \
             bytes spill loads"
        );
        let loads = REPORT.replace("stores, 0 bytes spill loads", "stores, 4 bytes spill loads");
        assert!(
            read_report(&loads).unwrap_err().starts_with("copy_float32 (sm_80) must not spill registers")
        );
    }

    #[test]
    fn a_serialised_wgmma_fails_with_the_name_of_the_kernel() {
        let note = |code: u32| {
            let words =
                "Potential Performance Loss: wgmma.mma_async instructions are serialized in the function";
            format!("{REPORT}ptxas info    : (C{code}) {words} 'gemm_4bit_sm90_bfloat16'\n")
        };
        for code in 7510..=7519 {
            let refusal = read_report(&note(code)).unwrap_err();
            assert!(refusal.starts_with("wgmma must not be serialised, got ptxas info"), "{refusal}");
            assert!(refusal.contains("gemm_4bit_sm90_bfloat16"), "{refusal}");
        }
        assert!(read_report(&note(7509)).is_ok() && read_report(&note(7520)).is_ok());
    }

    #[test]
    fn a_mangled_kernel_fails() {
        let mangled = REPORT.replace("function 'copy_float32'", "function '_Z12copy_float32v'");
        assert_eq!(
            read_report(&mangled).unwrap_err().lines().next(),
            Some("kernels must be declared extern \"C\", got _Z12copy_float32v")
        );
    }

    const PTX: &str = "\
.visible .entry copy_float32(
\t.param .align 64 .b8 copy_float32_param_0[192]
)
.maxntid 256, 1, 1
{
";

    #[test]
    fn ptx_gives_the_size_of_the_parameter_and_the_most_threads() {
        for (bounds, threads) in
            [(".maxntid 256, 1, 1", 256), (".maxntid 640", 640), (".maxntid 32, 4, 1", 128)]
        {
            let mut kernels = read_report(REPORT).unwrap();
            assert_eq!(read_params(&PTX.replace(".maxntid 256, 1, 1", bounds), &mut kernels), Ok(()));
            let Kernel { param_bytes, max_threads, .. } = kernels["copy_float32"];
            assert_eq!((param_bytes, max_threads), (192, threads));
        }
    }

    #[test]
    fn a_kernel_has_launch_bounds() {
        let unbound = PTX.replace(".maxntid 256, 1, 1\n", "");
        assert_eq!(
            read_params(&unbound, &mut read_report(REPORT).unwrap()).unwrap_err(),
            "copy_float32 must have __launch_bounds__"
        );
    }

    #[test]
    fn a_kernel_takes_one_struct() {
        let refused = |from: &str, to: &str| {
            read_params(&PTX.replace(from, to), &mut read_report(REPORT).unwrap()).unwrap_err()
        };
        assert_eq!(
            refused("[192]\n", "[192],\n\t.param .u64 copy_float32_param_1\n"),
            "copy_float32 must take one struct, got 2 parameters"
        );
        assert_eq!(
            refused(".align 64 .b8 copy_float32_param_0[192]", ".u64 copy_float32_param_0"),
            "copy_float32 must take one struct, got .param .u64 copy_float32_param_0"
        );
    }

    #[test]
    fn without_a_wish_the_gpus_decide() {
        assert_eq!(archs(None, &["9.0", "8.6", "9.0"]).unwrap(), ["86", "90a"]);
        assert_eq!(archs(Some(" "), &["8.7", "12.1"]).unwrap(), ["120", "86"]);
    }

    #[test]
    fn without_a_gpu_the_default_covers_ampere_and_later() {
        assert_eq!(archs(None, &[]).unwrap(), ["80", "90a", "compute_80"]);
        assert_eq!(archs(None, &["7.0", "[N/A]", ""]).unwrap(), ["80", "90a", "compute_80"]);
    }

    #[test]
    fn a_list_and_the_release_are_taken_as_they_are() {
        assert_eq!(archs(Some("90a"), &["8.6"]).unwrap(), ["90a"]);
        assert_eq!(archs(Some("80, 90a,100f"), &[]).unwrap(), ["80", "90a", "100f"]);
        let release = archs(Some("release"), &[]).unwrap();
        assert_eq!(release, ["75", "80", "86", "89", "90a", "100", "120", "compute_80"]);
    }

    #[test]
    fn a_list_that_is_none_is_refused() {
        for list in ["sm_90", "90a,", "9", "hopper", "compute_80", "90aa?"] {
            assert_eq!(
                archs(Some(list), &[]).unwrap_err(),
                format!(
                    "QBITS_CUDA_ARCHS must be `release` or a list like `80,90a`, with one GPU at least, got \
                     {list:?}"
                )
            );
        }
    }

    #[test]
    fn hopper_sources_are_built_for_hopper_alone() {
        let all = ["80", "90a", "compute_80"].map(String::from);
        assert_eq!(archs_of_source("gemm_4bit_sm90", &all), ["90a"]);
        assert_eq!(archs_of_source("gemm_4bit_sm90", &all[..1]), [""; 0]);
        assert_eq!(archs_of_source("blockwise_4bit", &all), ["80", "90a", "compute_80"]);
    }

    #[test]
    fn flags_name_every_architecture() {
        let flags = nvcc_flags("// A source.\n", &["90a", "compute_80"]);
        assert!(flags.contains(&"-fmad=false".into()));
        assert_eq!(
            flags[flags.len() - 4..],
            ["-gencode", "arch=compute_90a,code=sm_90a", "-gencode", "arch=compute_80,code=compute_80"]
        );
    }

    #[test]
    fn a_source_replaces_flags_in_its_first_ten_lines() {
        let marker = "// nvcc: -fmad=true\n";
        let flags = nvcc_flags(&format!("// A source.\n{marker}"), &[]);
        assert!(flags.contains(&"-fmad=true".into()) && !flags.contains(&"-fmad=false".into()));
        assert!(flags.contains(&"-ftz=false".into()));
        let too_late = nvcc_flags(&format!("{}{marker}", "//\n".repeat(10)), &[]);
        assert_eq!(too_late, nvcc_flags("", &[]));
    }

    #[test]
    fn included_files_are_followed() {
        let text_of = |name: &str| match name {
            "pack.cuh" => Some("#include \"dtype.cuh\"\n".to_string()),
            "dtype.cuh" => Some("#include \"pack.cuh\"\n#include <cuda_bf16.h>\n".to_string()),
            _ => None,
        };
        let names = included("// A source.\n#include \"pack.cuh\"\n#include \"cuda.h\"\n", text_of);
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["dtype.cuh", "pack.cuh"]);
    }

    #[test]
    fn the_hash_is_fnv1a() {
        // test vector of Fowler, Noll and Vo
        assert_eq!(fnv1a(FNV_START, b"foobar"), 0x8594_4171_f739_67e8);
    }
}
