//! Shape expressions: parsed once per op, evaluated at every call without allocation.

use super::{Arg, Of, Role, Rule, Spec};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Device, MAX_RANK};

/// Most symbols that one op may use.
const MAX_SYMBOLS: usize = 12;

/// Values of the symbols of one call, and the device that its tensors share.
#[derive(Clone, Copy, Debug)]
pub struct Symbols {
    values: [i64; MAX_SYMBOLS],
    /// Bit by bit which of them are bound.
    bound: u32,
    /// Leading dimensions of the shapes that start with `*`, once an input has bound them.
    leading: [i64; MAX_RANK],
    num_leading: Option<usize>,
    /// The device, and the index of the argument that set it.
    pub device: Option<(Device, usize)>,
}

impl Symbols {
    /// Binds the symbol named like argument `index`, where an expression uses it.
    #[inline]
    pub(super) fn set(&mut self, compiled: &Compiled, index: usize, value: i64) {
        if let Some(slot) = compiled.int_slots[index] {
            self.bind(slot, value);
        }
    }

    #[inline]
    fn bind(&mut self, slot: usize, value: i64) {
        self.values[slot] = value;
        self.bound |= 1 << slot;
    }

    #[inline]
    fn get(&self, slot: usize) -> Option<i64> {
        (self.bound & (1 << slot) != 0).then(|| self.values[slot])
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
            Self::Symbol(slot) => symbols.get(*slot),
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
    /// Which shapes start with `*`: any number of dimensions, the same ones in the whole call.
    leads: Vec<bool>,
    int_slots: Vec<Option<usize>>,
    outputs: Vec<usize>,
    written: Vec<usize>,
    pub(super) rules: Vec<(Rule, usize, usize)>,
    /// For each output whose dtype is that of another argument, which one.
    pub(super) dtype_sources: Vec<usize>,
}

impl Compiled {
    /// Parses the expressions of `spec`.
    ///
    /// # Panics
    /// If an expression is malformed: a mistake in the declaration, found by the first test that uses it.
    pub fn new(spec: &'static Spec) -> Self {
        let mut symbols = Vec::new();
        let shapes = spec.args.iter().map(|arg| parse_shape(text_of(&arg.role), &mut symbols)).collect();
        let leads = spec.args.iter().map(|arg| text_of(&arg.role).starts_with('*')).collect();
        assert!(symbols.len() <= MAX_SYMBOLS, "{}: at most {MAX_SYMBOLS} symbols", spec.name);
        let is_int = |role: &Role| matches!(role, Role::Int | Role::OneOf(_));
        let slot = |name| symbols.iter().position(|symbol| *symbol == name);
        let int_slots =
            spec.args.iter().map(|arg| if is_int(&arg.role) { slot(arg.name) } else { None }).collect();
        let is_output = |index: &usize| matches!(spec.args[*index].role, Role::Out(..));
        let outputs = (0..spec.args.len()).filter(is_output).collect();
        let is_written = |index: &usize| matches!(spec.args[*index].role, Role::Out(..) | Role::Scratch(_));
        let written = (0..spec.args.len()).filter(is_written).collect();
        let index = |name: &str| {
            let found = spec.args.iter().position(|arg| arg.name == name);
            found.unwrap_or_else(|| panic!("{} must have an argument {name}", spec.name))
        };
        let rules = spec.rules.iter().map(|rule| {
            let (Rule::Needs(first, second)
            | Rule::DtypeIfGiven(first, second, ..)
            | Rule::Excludes(first, second)
            | Rule::NoneFor(first, second, _)) = rule;
            (*rule, index(first), index(second))
        });
        let dtype_source = |arg: &Arg| match arg.role {
            Role::Out(Of::Like(name) | Of::Arg(name), _) => index(name),
            _ => 0,
        };
        let dtype_sources = spec.args.iter().map(dtype_source).collect();
        let rules = rules.collect();
        Self { spec, symbols, shapes, leads, int_slots, outputs, written, rules, dtype_sources }
    }

    /// Indices of the outputs.
    pub fn outputs(&self) -> impl ExactSizeIterator<Item = usize> {
        self.outputs.iter().copied()
    }

    /// Indices of the outputs and the scratch.
    #[inline]
    pub fn written(&self) -> impl Iterator<Item = usize> {
        self.written.iter().copied()
    }

    pub(super) fn unbound(&self) -> Symbols {
        Symbols {
            values: [0; MAX_SYMBOLS],
            bound: 0,
            leading: [1; MAX_RANK],
            num_leading: None,
            device: None,
        }
    }

    /// Number of dimensions of argument `index`, or the least that it may have.
    pub(super) fn rank(&self, index: usize) -> usize {
        self.shapes[index].len()
    }

    /// Argument `index` may have any dimensions before those of [`Self::rank`].
    pub(super) fn leads(&self, index: usize) -> bool {
        self.leads[index]
    }

    pub(super) fn text(&self, index: usize) -> &'static str {
        text_of(&self.spec.args[index].role)
    }

    /// The dimensions of argument `index`, and how many. Leading dimensions, and a symbol that stands alone, take their
    /// values from `actual` where they are not bound yet.
    pub(super) fn dims(
        &self,
        index: usize,
        symbols: &mut Symbols,
        actual: &[i64],
    ) -> Result<([i64; MAX_RANK], usize)> {
        let (mut dims, mut rank) = ([1; MAX_RANK], 0);
        if self.leads[index] {
            let given = actual.len().saturating_sub(self.shapes[index].len());
            rank = *symbols.num_leading.get_or_insert_with(|| {
                symbols.leading[..given].copy_from_slice(&actual[..given]);
                given
            });
            dims[..rank].copy_from_slice(&symbols.leading[..rank]);
        }
        for expr in &self.shapes[index] {
            if let (Expr::Symbol(slot), Some(size)) = (expr, actual.get(rank))
                && symbols.get(*slot).is_none()
            {
                symbols.bind(*slot, *size);
            }
            dims[rank] = expr.evaluate(symbols).ok_or_else(|| self.too_large(index, symbols))?;
            rank += 1;
        }
        Ok((dims, rank))
    }

    /// Number of elements of argument `index`, whose symbols are all bound.
    pub(super) fn len(&self, index: usize, symbols: &Symbols) -> Option<i64> {
        let num_leading = if self.leads[index] { symbols.num_leading.unwrap_or(0) } else { 0 };
        let mut leading = symbols.leading[..num_leading].iter();
        let len = leading.try_fold(1i64, |len, size| len.checked_mul(*size))?;
        self.shapes[index].iter().try_fold(len, |len, expr| len.checked_mul(expr.evaluate(symbols)?))
    }

    #[cold]
    pub(super) fn too_large(&self, index: usize, symbols: &Symbols) -> Error {
        let bound: Vec<_> = (self.symbols.iter().enumerate())
            .filter_map(|(slot, name)| symbols.get(slot).map(|value| format!("{name} = {value}")))
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
        Role::Int | Role::Float | Role::OneOf(_) | Role::OneOfStr(_) | Role::OneOfDtype(_) => "",
    }
}

/// Splits at the commas outside parentheses; leading dimensions are left out.
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
    let is_expr = |part: &&str| !part.trim().is_empty() && !part.starts_with('*');
    parts.into_iter().filter(is_expr).map(|part| parse(part, symbols)).collect()
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
