//! Shape expressions: parsed once per op, evaluated at every call without allocation.

use super::{Role, Spec};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Device, MAX_RANK};

/// Most symbols that one op may use.
const MAX_SYMBOLS: usize = 12;

/// Values of the symbols of one call, and the device that its tensors share.
#[derive(Clone, Copy, Debug)]
pub struct Symbols {
    values: [Option<i64>; MAX_SYMBOLS],
    /// The device, and the index of the argument that set it.
    pub device: Option<(Device, usize)>,
}

impl Symbols {
    /// Binds the symbol named like argument `index`, where an expression uses it.
    pub(super) fn set(&mut self, compiled: &Compiled, index: usize, value: i64) {
        if let Some(slot) = compiled.int_slots[index] {
            self.values[slot] = Some(value);
        }
    }
}

#[derive(Debug)]
enum Expr {
    Constant(i64),
    Symbol(usize),
    CeilDiv(Box<Expr>, Box<Expr>),
    Multiply(Box<Expr>, Box<Expr>),
}

impl Expr {
    /// None when the result does not fit, or a symbol is not bound.
    fn evaluate(&self, symbols: &Symbols) -> Option<i64> {
        match self {
            Self::Constant(value) => Some(*value),
            Self::Symbol(slot) => symbols.values[*slot],
            Self::CeilDiv(a, b) => {
                let (a, b) = (a.evaluate(symbols)?, b.evaluate(symbols)?);
                Some(a / b + i64::from(a % b != 0))
            }
            Self::Multiply(a, b) => a.evaluate(symbols)?.checked_mul(b.evaluate(symbols)?),
        }
    }
}

/// A declaration with its expressions parsed.
#[derive(Debug)]
pub struct Compiled {
    /// The declaration.
    pub spec: &'static Spec,
    symbols: Vec<&'static str>,
    shapes: Vec<Vec<Expr>>,
    int_slots: Vec<Option<usize>>,
    outputs: Vec<usize>,
}

impl Compiled {
    /// Parses the expressions of `spec`.
    ///
    /// # Panics
    /// If an expression is malformed: a mistake in the declaration, found by the first test that uses it.
    pub fn new(spec: &'static Spec) -> Self {
        let mut symbols = Vec::new();
        let shapes = spec.args.iter().map(|arg| parse_shape(text_of(&arg.role), &mut symbols)).collect();
        assert!(symbols.len() <= MAX_SYMBOLS, "{}: at most {MAX_SYMBOLS} symbols", spec.name);
        let is_int = |role: &Role| matches!(role, Role::Int | Role::OneOf(_));
        let slot = |name| symbols.iter().position(|symbol| *symbol == name);
        let int_slots =
            spec.args.iter().map(|arg| if is_int(&arg.role) { slot(arg.name) } else { None }).collect();
        let is_output = |index: &usize| matches!(spec.args[*index].role, Role::Out(..));
        let outputs = (0..spec.args.len()).filter(is_output).collect();
        Self { spec, symbols, shapes, int_slots, outputs }
    }

    /// Indices of the outputs.
    pub fn outputs(&self) -> impl ExactSizeIterator<Item = usize> {
        self.outputs.iter().copied()
    }

    pub(super) fn unbound(&self) -> Symbols {
        Symbols { values: [None; MAX_SYMBOLS], device: None }
    }

    pub(super) fn rank(&self, index: usize) -> usize {
        self.shapes[index].len()
    }

    pub(super) fn text(&self, index: usize) -> &'static str {
        text_of(&self.spec.args[index].role)
    }

    /// The dimensions of argument `index`. A symbol that stands alone and is not bound yet takes its value from `actual`.
    pub(super) fn dims(
        &self,
        index: usize,
        symbols: &mut Symbols,
        actual: &[i64],
    ) -> Result<[i64; MAX_RANK]> {
        let mut dims = [1; MAX_RANK];
        for (i, expr) in self.shapes[index].iter().enumerate() {
            if let (Expr::Symbol(slot), Some(size)) = (expr, actual.get(i))
                && symbols.values[*slot].is_none()
            {
                symbols.values[*slot] = Some(*size);
            }
            dims[i] = expr.evaluate(symbols).ok_or_else(|| self.too_large(index, symbols))?;
        }
        Ok(dims)
    }

    pub(super) fn too_large(&self, index: usize, symbols: &Symbols) -> Error {
        let bound: Vec<_> = (self.symbols.iter().zip(symbols.values))
            .filter_map(|(name, value)| value.map(|value| format!("{name} = {value}")))
            .collect();
        let (op, arg, text) = (self.spec.name, self.spec.args[index].name, self.text(index));
        let message = format!(
            "qbits::{op}: {arg} must have fewer than 2^63 bytes, got [{text}] with {}",
            bound.join(", ")
        );
        Error::new(ErrorKind::Shape, message)
    }
}

/// The shape expression of a role; empty for what has none.
pub(super) fn text_of(role: &Role) -> &'static str {
    match role {
        Role::In(_, text)
        | Role::Flat(_, text)
        | Role::Optional(_, text)
        | Role::OptionalFlat(_, text)
        | Role::Out(_, text)
        | Role::Scratch(text) => text,
        Role::Int | Role::OneOf(_) | Role::OneOfStr(_) | Role::OneOfDtype(_) => "",
    }
}

/// Splits at the commas outside parentheses.
fn parse_shape(text: &'static str, symbols: &mut Vec<&'static str>) -> Vec<Expr> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts.into_iter().filter(|part| !part.trim().is_empty()).map(|part| parse(part, symbols)).collect()
}

/// `product := factor (* factor)*`, `factor := number | name | ceil_div(product, product)`.
fn parse(text: &'static str, symbols: &mut Vec<&'static str>) -> Expr {
    let (expr, rest) = parse_product(text.trim(), symbols);
    assert!(rest.is_empty(), "expression {text:?} must end, got {rest:?}");
    expr
}

fn parse_product(text: &'static str, symbols: &mut Vec<&'static str>) -> (Expr, &'static str) {
    let (mut left, mut rest) = parse_factor(text, symbols);
    while let Some(more) = rest.strip_prefix('*') {
        let (right, after) = parse_factor(more.trim_start(), symbols);
        left = Expr::Multiply(Box::new(left), Box::new(right));
        rest = after;
    }
    (left, rest)
}

fn parse_factor(text: &'static str, symbols: &mut Vec<&'static str>) -> (Expr, &'static str) {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let (word, rest) = (&text[..end], text[end..].trim_start());
    if let Ok(value) = word.parse() {
        return (Expr::Constant(value), rest);
    }
    if word == "ceil_div" {
        let (a, rest) = parse_product(rest.strip_prefix('(').expect("ceil_div(").trim_start(), symbols);
        let (b, rest) = parse_product(rest.strip_prefix(',').expect("ceil_div(a,").trim_start(), symbols);
        let rest = rest.strip_prefix(')').expect("ceil_div(a, b)").trim_start();
        return (Expr::CeilDiv(Box::new(a), Box::new(b)), rest);
    }
    assert!(!word.is_empty(), "an operand must stand before {text:?}");
    let slot = symbols.iter().position(|symbol| *symbol == word).unwrap_or_else(|| {
        symbols.push(word);
        symbols.len() - 1
    });
    (Expr::Symbol(slot), rest)
}
