//! The environment variables of the CUDA backend, read once.

use crate::{Error, ErrorKind, Result};
use std::ffi::OsString;
use std::sync::OnceLock;

/// Which kernels an op uses where it has several families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// A few rows of input, TMA and mma.sync; Hopper only.
    SkinnySm90,
    /// Few rows, mma.sync; Ampere and later.
    Skinny,
    /// Dozens of rows, wgmma; Hopper only.
    Mid,
    /// Many rows, wgmma; Hopper only.
    Large,
    /// 8-bit integers by mma.sync; Ampere and later.
    Mma,
    /// Plain arithmetic; every GPU.
    Simt,
}

impl Family {
    /// Every family.
    pub const ALL: [Self; 6] =
        [Self::SkinnySm90, Self::Skinny, Self::Mid, Self::Large, Self::Mma, Self::Simt];

    /// As `QBITS_FORCE_FAMILY` and printed plans have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::SkinnySm90 => "skinny_sm90",
            Self::Skinny => "skinny",
            Self::Mid => "mid",
            Self::Large => "large",
            Self::Mma => "mma",
            Self::Simt => "simt",
        }
    }
}

/// What the environment asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    pub force_family: Option<Family>,
    pub full_check: bool,
    pub print_plans: bool,
    pub force_triton: bool,
    pub interpret_triton: bool,
}

impl Settings {
    /// From a function that looks a variable up. The error is the rest of a sentence.
    fn read(variable: impl Fn(&str) -> Option<OsString>) -> std::result::Result<Self, String> {
        let choose = |name: &str, choices: &[&str]| {
            let Some(value) = variable(name).filter(|value| !value.is_empty()) else { return Ok(None) };
            let index = choices.iter().position(|choice| value == *choice);
            let refusal = || format!("{name} must be unset or {}, got {value:?}", choices.join(", "));
            index.map(Some).ok_or_else(refusal)
        };
        let families = Family::ALL.map(Family::name);
        Ok(Self {
            force_family: choose("QBITS_FORCE_FAMILY", &families)?.map(|index| Family::ALL[index]),
            full_check: choose("QBITS_CHECK", &["full"])?.is_some(),
            print_plans: choose("QBITS_PRINT_PLANS", &["0", "1"])? == Some(1),
            force_triton: choose("QBITS_BACKEND", &["triton"])?.is_some(),
            interpret_triton: variable("TRITON_INTERPRET").is_some_and(|value| value == "1"),
        })
    }
}

/// The settings of this process; in tests those of the recorder, where one is installed.
#[inline]
pub(super) fn settings(op: &str) -> Result<Settings> {
    #[cfg(test)]
    if let Some(settings) = super::recorder::settings() {
        return Ok(settings);
    }
    static SETTINGS: OnceLock<std::result::Result<Settings, String>> = OnceLock::new();
    match SETTINGS.get_or_init(|| Settings::read(|name| std::env::var_os(name))) {
        Ok(settings) => Ok(*settings),
        Err(sentence) => Err(Error::new(ErrorKind::Value, format!("qbits::{op}: {sentence}"))),
    }
}

/// The family that `QBITS_FORCE_FAMILY` selects: the name of one.
///
/// # Errors
/// When a `QBITS_` variable of the CUDA backend has a value outside its set.
pub fn forced_family(op: &str) -> Result<Option<Family>> {
    Ok(settings(op)?.force_family)
}

/// Whether `QBITS_BACKEND=triton` asks for Triton's kernels on a GPU, or on the CPU, where only its interpreter runs them.
///
/// # Errors
/// As [`forced_family`].
pub fn forces_triton(op: &str, on_cpu: bool) -> Result<bool> {
    let settings = settings(op)?;
    Ok(settings.force_triton && (settings.interpret_triton || !on_cpu))
}

#[cfg(test)]
mod tests {
    use super::{Family, Settings};

    fn read(pairs: &[(&str, &str)]) -> Result<Settings, String> {
        Settings::read(|name| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| value.into())
        })
    }

    #[test]
    fn nothing_set_means_nothing_forced() {
        assert_eq!(read(&[]), Ok(Settings::default()));
        assert_eq!(read(&[("QBITS_CHECK", ""), ("QBITS_PRINT_PLANS", "0")]), Ok(Settings::default()));
    }

    #[test]
    fn each_family_can_be_forced() {
        for family in Family::ALL {
            let settings = Settings { force_family: Some(family), ..Settings::default() };
            assert_eq!(read(&[("QBITS_FORCE_FAMILY", family.name())]), Ok(settings));
        }
    }

    #[test]
    fn full_check_and_printed_plans_are_switched_on() {
        let settings = Settings { full_check: true, print_plans: true, ..Settings::default() };
        assert_eq!(read(&[("QBITS_CHECK", "full"), ("QBITS_PRINT_PLANS", "1")]), Ok(settings));
    }

    #[test]
    fn triton_is_forced_and_interpreted() {
        let settings = Settings { force_triton: true, interpret_triton: true, ..Settings::default() };
        assert_eq!(read(&[("QBITS_BACKEND", "triton"), ("TRITON_INTERPRET", "1")]), Ok(settings));
        let settings = Settings { interpret_triton: false, ..settings };
        assert_eq!(read(&[("QBITS_BACKEND", "triton"), ("TRITON_INTERPRET", "0")]), Ok(settings));
    }

    #[test]
    fn values_outside_their_set_are_refused() {
        let refused = |name, value| read(&[(name, value)]).unwrap_err();
        assert_eq!(
            refused("QBITS_FORCE_FAMILY", "sm70"),
            "QBITS_FORCE_FAMILY must be unset or skinny_sm90, skinny, mid, large, mma, simt, got \"sm70\""
        );
        let expected = "QBITS_BACKEND must be unset or triton, got \"cuda\"";
        assert_eq!(refused("QBITS_BACKEND", "cuda"), expected);
        assert_eq!(refused("QBITS_CHECK", "some"), "QBITS_CHECK must be unset or full, got \"some\"");
        assert_eq!(
            refused("QBITS_PRINT_PLANS", "yes"),
            "QBITS_PRINT_PLANS must be unset or 0, 1, got \"yes\""
        );
    }
}
