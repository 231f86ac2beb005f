//! The language of declarations: what an op takes, as data, and the checks that follow from it.
//!
//! An op is declared once with [`op!`]. The same table gives the checks of every call, the struct that the backends
//! receive, and, through Python, the schema, the fake kernel, the stub, the docstring and the refusal tests.

use crate::tensor::{Dtype, Tensor};

mod checks;
mod expr;
pub use expr::{Compiled, Symbols};

/// Input dtypes of every op that takes floats.
pub const FLOATS: &[Dtype] = &[Dtype::Float32, Dtype::Float16, Dtype::Bfloat16];
/// Codes, one or two to a byte.
pub const UINT8: &[Dtype] = &[Dtype::Uint8];
/// Codes with a sign.
pub const INT8: &[Dtype] = &[Dtype::Int8];
/// Masks.
pub const BOOL: &[Dtype] = &[Dtype::Bool];
/// Statistics and code tables.
pub const FLOAT32: &[Dtype] = &[Dtype::Float32];

/// Where the dtype of an output comes from.
#[derive(Clone, Copy, Debug)]
pub enum Of {
    /// It is fixed.
    Is(Dtype),
    /// That of the named input.
    Like(&'static str),
    /// The value of the named dtype argument.
    Arg(&'static str),
}

/// What an argument is. Shapes are expressions over symbols: `n`, `N, K`, `ceil_div(N * K, block_size)`. A shape may start
/// with any dimensions: `*M, K`.
#[derive(Clone, Copy, Debug)]
pub enum Role {
    /// A tensor with exactly these dimensions.
    In(&'static [Dtype], &'static str),
    /// A tensor of any shape with this many elements, read in row-major order.
    Flat(&'static [Dtype], &'static str),
    /// As `In`, or None.
    Optional(&'static [Dtype], &'static str),
    /// As `Flat`, or None.
    OptionalFlat(&'static [Dtype], &'static str),
    /// A tensor that is written, allocated with these dimensions, given in any shape with as many elements.
    Out(Of, &'static str),
    /// Workspace of this many bytes (uint8), no part of the public schema.
    Scratch(&'static str),
    /// A size, at least 0; it binds the symbol of its name.
    Int,
    /// A number that is finite and above 0 as a float32.
    Float,
    /// One of these numbers; it binds the symbol of its name.
    OneOf(&'static [i64]),
    /// One of these words.
    OneOfStr(&'static [&'static str]),
    /// One of these dtypes.
    OneOfDtype(&'static [Dtype]),
}

/// Relations between arguments.
#[derive(Clone, Copy, Debug)]
pub enum Rule {
    /// The first is given only together with the second.
    Needs(&'static str, &'static str),
    /// The first has the third dtype where the second is given, else the fourth.
    DtypeIfGiven(&'static str, &'static str, Dtype, Dtype),
    /// The first is not given together with the second.
    Excludes(&'static str, &'static str),
    /// The first is not given where the dtype argument that the second names is the third.
    NoneFor(&'static str, &'static str, Dtype),
}

/// One argument of an op.
#[derive(Clone, Copy, Debug)]
pub struct Arg {
    /// Name in every layer.
    pub name: &'static str,
    /// What it is.
    pub role: Role,
}

/// A declared op.
#[derive(Debug)]
pub struct Spec {
    /// Name without `qbits::`.
    pub name: &'static str,
    /// First sentences, formula and source.
    pub doc: &'static [&'static str],
    /// In the order of the schema.
    pub args: &'static [Arg],
    /// Relations between arguments.
    pub rules: &'static [Rule],
}

/// An argument as the caller gave it.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// None.
    Absent,
    /// A borrowed tensor.
    Tensor(Tensor),
    /// A whole number.
    Int(i64),
    /// Any number.
    Float(f64),
    /// A word.
    Str(&'a str),
    /// An element type.
    Dtype(Dtype),
    /// Anything else, named by its type.
    Other(&'a str),
}

impl Value<'_> {
    fn type_name(&self) -> &str {
        match self {
            Self::Absent => "None",
            Self::Tensor(_) => "a tensor",
            Self::Int(_) => "an int",
            Self::Float(_) => "a float",
            Self::Str(_) => "a str",
            Self::Dtype(_) => "a dtype",
            Self::Other(name) => name,
        }
    }
}

/// A typed op that can be made of checked values.
pub trait Bind: Sized {
    /// The declaration.
    fn compiled() -> &'static Compiled;
    /// The struct of `values`, which [`Compiled::check_inputs`] and [`Compiled::check_outputs`] have accepted.
    fn from_checked(values: &[Value]) -> Self;
}

/// A field of a bound struct, taken from a checked value.
pub trait Field {
    /// The value as the field's type.
    fn take(value: &Value, role: &Role) -> Self;
}

impl Field for Tensor {
    fn take(value: &Value, _: &Role) -> Self {
        match value {
            Value::Tensor(tensor) => *tensor,
            other => unreachable!("a checked tensor, got {other:?}"),
        }
    }
}
impl Field for Option<Tensor> {
    fn take(value: &Value, role: &Role) -> Self {
        (!matches!(value, Value::Absent)).then(|| Tensor::take(value, role))
    }
}
impl Field for i64 {
    fn take(value: &Value, _: &Role) -> Self {
        match value {
            Value::Int(number) => *number,
            other => unreachable!("a checked int, got {other:?}"),
        }
    }
}
impl Field for f32 {
    fn take(value: &Value, _: &Role) -> Self {
        match value {
            Value::Float(number) => *number as f32,
            other => unreachable!("a checked float, got {other:?}"),
        }
    }
}
impl Field for &'static str {
    fn take(value: &Value, role: &Role) -> Self {
        match (value, role) {
            (Value::Str(word), Role::OneOfStr(choices)) => {
                choices.iter().find(|choice| *choice == word).expect("a checked choice")
            }
            other => unreachable!("a checked word, got {other:?}"),
        }
    }
}
impl Field for Dtype {
    fn take(value: &Value, _: &Role) -> Self {
        match value {
            Value::Dtype(dtype) => *dtype,
            other => unreachable!("a checked dtype, got {other:?}"),
        }
    }
}

/// The Rust type of a field, by the word of its role.
#[macro_export]
#[doc(hidden)]
macro_rules! field_type {
    (In) => { $crate::tensor::Tensor };
    (Flat) => { $crate::tensor::Tensor };
    (Optional) => { Option<$crate::tensor::Tensor> };
    (OptionalFlat) => { Option<$crate::tensor::Tensor> };
    (Out) => { $crate::tensor::Tensor };
    (Scratch) => { $crate::tensor::Tensor };
    (Int) => { i64 };
    (Float) => { f32 };
    (OneOf) => { i64 };
    (OneOfStr) => { &'static str };
    (OneOfDtype) => { $crate::tensor::Dtype };
}

/// Declares an op: its table, and the struct that the backends receive.
#[macro_export]
macro_rules! op {
    (@rules) => { &[] };
    (@rules $rules:expr) => { &$rules };
    (
        $(#[doc = $doc:literal])+
        $name:ident => $Op:ident {
            $( $field:ident : $role:ident $( ( $($of:tt)* ) )? ),+ $(,)?
        }
        $( rules: $rules:expr )?
    ) => {
        $(#[doc = $doc])+
        #[derive(Clone, Copy, Debug)]
        #[allow(missing_docs, non_snake_case)]
        pub struct $Op { $( pub $field: $crate::field_type!($role) ),+ }

        impl $Op {
            /// The declaration.
            pub const SPEC: $crate::spec::Spec = {
                #[allow(unused_imports)]
                use $crate::spec::Role::*;
                $crate::spec::Spec {
                    name: stringify!($name),
                    doc: &[$($doc),+],
                    args: &[$( $crate::spec::Arg { name: stringify!($field), role: $role $( ( $($of)* ) )? } ),+],
                    rules: $crate::op!(@rules $( $rules )?),
                }
            };
        }

        impl $crate::spec::Bind for $Op {
            fn compiled() -> &'static $crate::spec::Compiled {
                static COMPILED: std::sync::LazyLock<$crate::spec::Compiled> =
                    std::sync::LazyLock::new(|| $crate::spec::Compiled::new(&$Op::SPEC));
                &COMPILED
            }

            fn from_checked(values: &[$crate::spec::Value]) -> Self {
                let mut fields = values.iter().zip($Op::SPEC.args);
                Self { $(
                    $field: {
                        let (value, arg) = fields.next().expect("as many values as arguments");
                        $crate::spec::Field::take(value, &arg.role)
                    }
                ),+ }
            }
        }
    };
}

#[cfg(test)]
mod tests;
