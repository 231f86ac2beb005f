//! Which instructions the CPU kernels use: the best that this CPU has, or those that `QBITS_CPU` names.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::{Error, ErrorKind, Result};

/// An instruction set that this CPU has: there is no way to make a value of one that it lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

/// What kernels match on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    /// The reference.
    Scalar,
    /// AVX2, FMA and F16C: Haswell, Zen and later.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL beside the former: Skylake-X, Zen 4 and later.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    const ALL: &[Self] = &[
        Self::Scalar,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
        }
    }

    fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
        }
    }
}

/// 1 + index in `Level::ALL` of the choice; 0 before the first use. No lock: a fork may happen at any time.
static CHOICE: AtomicU8 = AtomicU8::new(0);

impl Isa {
    /// Plain Rust, on every CPU.
    pub const SCALAR: Self = Self(Level::Scalar);

    /// Every instruction set of this CPU that has kernels, slowest first.
    pub fn available() -> impl DoubleEndedIterator<Item = Self> {
        Level::ALL.iter().copied().filter(|level| level.is_available()).map(Self)
    }

    /// The fastest of them, or the one that the environment variable `QBITS_CPU` names. Read once.
    ///
    /// # Errors
    /// Where `QBITS_CPU` names none, or one that this CPU lacks.
    pub fn get() -> Result<Self> {
        let choice = usize::from(CHOICE.load(Ordering::Relaxed));
        if choice > 0 {
            return Ok(Self(Level::ALL[choice - 1]));
        }
        let isa = Self::choose(std::env::var_os("QBITS_CPU").as_deref())?;
        let index = Level::ALL.iter().position(|&level| level == isa.0).expect("ALL holds every level");
        CHOICE.store(index as u8 + 1, Ordering::Relaxed);
        Ok(isa)
    }

    fn choose(wanted: Option<&std::ffi::OsStr>) -> Result<Self> {
        let Some(wanted) = wanted else {
            return Ok(Self::available().next_back().unwrap_or(Self::SCALAR));
        };
        let wanted = wanted.to_string_lossy();
        if let Some(isa) = Self::available().find(|isa| isa.name() == wanted) {
            return Ok(isa);
        }
        let names: Vec<_> = Self::available().map(Self::name).collect();
        let (kind, rule) = match ["scalar", "avx2", "avx512"].contains(&&*wanted) {
            true => (ErrorKind::UnsupportedHardware, "name instructions of this CPU"),
            false => (ErrorKind::Value, "be scalar, avx2 or avx512, and in this CPU"),
        };
        let message = format!("qbits::cpu: QBITS_CPU must {rule} ({}), got {wanted:?}", names.join(", "));
        Err(Error::new(kind, message))
    }

    /// The name that `QBITS_CPU` takes.
    pub const fn name(self) -> &'static str {
        self.0.name()
    }

    pub(super) const fn level(self) -> Level {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choose_takes_a_name_and_the_best_without_one() {
        let choose = |name: &str| Isa::choose(Some(name.as_ref()));
        for isa in Isa::available() {
            assert_eq!(choose(isa.name()).unwrap(), isa);
        }
        assert_eq!(Isa::choose(None).unwrap(), Isa::available().next_back().unwrap());
        let error = choose("sse").unwrap_err();
        assert_eq!(error.kind, ErrorKind::Value);
        let names: Vec<_> = Isa::available().map(Isa::name).collect();
        assert_eq!(
            error.message,
            format!(
                "qbits::cpu: QBITS_CPU must be scalar, avx2 or avx512, and in this CPU ({}), got \"sse\"",
                names.join(", ")
            )
        );
    }

    #[test]
    fn get_gives_the_same_choice_twice() {
        assert_eq!(Isa::get(), Isa::get());
    }
}
