//! The one error type of the crate: a kind, which decides the exception class in Python, and a sentence.

use std::fmt;

/// What went wrong, as a caller must react to it. Python maps each kind to one class of `qbits.errors`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Wrong rank, size or length.
    Shape,
    /// Wrong element type.
    Dtype,
    /// Wrong kind of argument, or the wrong number of them.
    Type,
    /// A value outside its set; overlap, strides, alignment, read-only or null memory.
    Value,
    /// Tensors on different devices, or on one that has no backend.
    Device,
    /// The tensor has no memory of its own: traced, fake, or a subclass. `qbits.ops` then takes the traced path.
    Traced,
    /// The device has no kernel that runs on it.
    UnsupportedHardware,
    /// The driver refused, with its own name and words.
    Driver,
}

/// A user's mistake or the driver's refusal. The message follows `qbits::<op>: <argument> must <rule>, got <value>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// Decides the exception class.
    pub kind: ErrorKind,
    /// One sentence that tells what to change.
    pub message: String,
}

/// Result with the crate's error.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` with `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
