//! The checks of every call, in the order in which a caller's mistakes are easiest to understand.

use super::{Arg, Compiled, Field, Of, Role, Rule, Symbols, Value};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Device, Dtype, Tensor};
use std::fmt::Display;

impl Compiled {
    #[cold]
    fn error(&self, kind: ErrorKind, arg: &str, rule: impl Display, got: impl Display) -> Error {
        Error::new(kind, format!("qbits::{}: {arg} must {rule}, got {got}", self.spec.name))
    }

    /// Checks everything but the outputs, and binds the symbols. Outputs may still be absent.
    pub fn check_inputs(&self, values: &[Value]) -> Result<Symbols> {
        if values.len() != self.spec.args.len() {
            return Err(Error::new(
                ErrorKind::Type,
                format!(
                    "qbits::{}: the call must have {} arguments, got {}",
                    self.spec.name,
                    self.spec.args.len(),
                    values.len()
                ),
            ));
        }
        let mut symbols = self.unbound();
        for (index, (value, arg)) in values.iter().zip(self.spec.args).enumerate() {
            self.check_plain(index, arg, value, &mut symbols)?;
        }
        for (index, (value, arg)) in values.iter().zip(self.spec.args).enumerate() {
            match (arg.role, value) {
                (Role::In(dtypes, _) | Role::Flat(dtypes, _), _) => {
                    let tensor = self.tensor(arg, value)?;
                    self.check_input(index, arg, tensor, dtypes, &mut symbols)?;
                }
                (Role::Optional(..) | Role::OptionalFlat(..), Value::Absent) => {}
                (Role::Optional(dtypes, _) | Role::OptionalFlat(dtypes, _), _) => {
                    let tensor = self.tensor(arg, value)?;
                    self.check_input(index, arg, tensor, dtypes, &mut symbols)?;
                }
                _ => {}
            }
        }
        self.check_rules(values)?;
        Ok(symbols)
    }

    /// Numbers, words and dtypes.
    fn check_plain(&self, index: usize, arg: &Arg, value: &Value, symbols: &mut Symbols) -> Result<()> {
        match (arg.role, value) {
            (Role::Int, Value::Int(number)) if *number < 0 => {
                Err(self.error(ErrorKind::Value, arg.name, "be at least 0", number))
            }
            (Role::OneOf(choices), Value::Int(number)) if !choices.contains(number) => {
                Err(self.error(ErrorKind::Value, arg.name, format_args!("be one of {choices:?}"), number))
            }
            (Role::Int | Role::OneOf(_), Value::Int(number)) => {
                symbols.set(self, index, *number);
                Ok(())
            }
            (Role::Int | Role::OneOf(_), other) => {
                Err(self.error(ErrorKind::Type, arg.name, "be an int", other.type_name()))
            }
            (Role::Float, Value::Float(number)) => match *number as f32 {
                single if single.is_finite() && single > 0.0 => Ok(()),
                _ => {
                    let rule = "be finite and above 0 as a float32";
                    Err(self.error(ErrorKind::Value, arg.name, rule, format_args!("{number:?}")))
                }
            },
            (Role::Float, other) => {
                Err(self.error(ErrorKind::Type, arg.name, "be a float", other.type_name()))
            }
            (Role::OneOfStr(choices), Value::Str(word)) => match choices.contains(word) {
                true => Ok(()),
                false => Err(self.error(
                    ErrorKind::Value,
                    arg.name,
                    format_args!("be one of {choices:?}"),
                    format_args!("{word:?}"),
                )),
            },
            (Role::OneOfStr(_), other) => {
                Err(self.error(ErrorKind::Type, arg.name, "be a str", other.type_name()))
            }
            (Role::OneOfDtype(choices), Value::Dtype(dtype)) => match choices.contains(dtype) {
                true => Ok(()),
                false => {
                    Err(self.error(ErrorKind::Dtype, arg.name, format_args!("be {}", names(choices)), dtype))
                }
            },
            (Role::OneOfDtype(_), other) => {
                Err(self.error(ErrorKind::Type, arg.name, "be a dtype", other.type_name()))
            }
            _ => Ok(()),
        }
    }

    fn tensor<'v>(&self, arg: &Arg, value: &'v Value) -> Result<&'v Tensor> {
        match value {
            Value::Tensor(tensor) => Ok(tensor),
            other => Err(self.error(ErrorKind::Type, arg.name, "be a tensor", other.type_name())),
        }
    }

    /// Dtype, device, shape and memory of an input; binds the symbols that stand alone in its shape.
    fn check_input(
        &self,
        index: usize,
        arg: &Arg,
        tensor: &Tensor,
        dtypes: &[Dtype],
        symbols: &mut Symbols,
    ) -> Result<()> {
        if !dtypes.contains(&tensor.dtype) {
            let rule = format!("have dtype {}", names(dtypes));
            return Err(self.error(ErrorKind::Dtype, arg.name, rule, tensor.dtype));
        }
        self.check_device(index, arg, tensor, symbols)?;
        match arg.role {
            Role::Flat(..) | Role::OptionalFlat(..) => self.check_len(index, arg, tensor, symbols)?,
            _ => self.check_shape(index, arg, tensor, symbols)?,
        }
        self.check_memory(arg, tensor)
    }

    #[inline]
    fn check_device(&self, index: usize, arg: &Arg, tensor: &Tensor, symbols: &mut Symbols) -> Result<()> {
        match symbols.device {
            Some((device, first)) if device != tensor.device => Err(self.error(
                ErrorKind::Device,
                arg.name,
                format_args!("be on {device} like {}", self.spec.args[first].name),
                tensor.device,
            )),
            Some(_) => Ok(()),
            None => {
                symbols.device = Some((tensor.device, index));
                Ok(())
            }
        }
    }

    fn check_len(&self, index: usize, arg: &Arg, tensor: &Tensor, symbols: &mut Symbols) -> Result<()> {
        let expected = self.dims(index, symbols, &[tensor.len()])?.0[0];
        if expected != tensor.len() {
            return Err(self.error(
                ErrorKind::Shape,
                arg.name,
                self.length_rule(index, expected),
                tensor.len(),
            ));
        }
        Ok(())
    }

    /// `have ceil_div(n, 2) = 50 elements`, without the expression where it is only a number.
    fn length_rule(&self, index: usize, expected: i64) -> String {
        let noun = if expected == 1 { "element" } else { "elements" };
        match self.text(index) {
            "" => format!("have {expected} {noun}"),
            text if text.parse::<i64>().is_ok() => format!("have {expected} {noun}"),
            text => format!("have {text} = {expected} {noun}"),
        }
    }

    fn check_shape(&self, index: usize, arg: &Arg, tensor: &Tensor, symbols: &mut Symbols) -> Result<()> {
        let (rank, text, given) = (self.rank(index), self.text(index), tensor.shape().len());
        if given < rank || given > rank && !self.leads(index) {
            let least = if self.leads(index) { "at least " } else { "" };
            let rule = format!("have {least}{rank} dimension{} [{text}]", if rank == 1 { "" } else { "s" });
            return Err(self.error(
                ErrorKind::Shape,
                arg.name,
                rule,
                format_args!("shape {:?}", tensor.shape()),
            ));
        }
        let (expected, rank) = self.dims(index, symbols, tensor.shape())?;
        if expected[..rank] != *tensor.shape() {
            let rule = format!("have shape [{text}] = {:?}", &expected[..rank]);
            return Err(self.error(ErrorKind::Shape, arg.name, rule, format_args!("{:?}", tensor.shape())));
        }
        Ok(())
    }

    fn check_memory(&self, arg: &Arg, tensor: &Tensor) -> Result<()> {
        if tensor.is_empty() {
            return Ok(());
        }
        if !tensor.is_contiguous {
            let got = format_args!("a strided view of shape {:?}", tensor.shape());
            return Err(self.error(ErrorKind::Value, arg.name, "be contiguous", got));
        }
        if tensor.data.is_null() {
            let got = "a null pointer, as traced and fake tensors have";
            return Err(self.error(ErrorKind::Traced, arg.name, "have memory", got));
        }
        let size = tensor.dtype.size();
        if !(tensor.data as usize).is_multiple_of(size) {
            let got = format_args!("an address {} past one", tensor.data as usize % size);
            let rule = format_args!("start on a multiple of {size} bytes");
            return Err(self.error(ErrorKind::Value, arg.name, rule, got));
        }
        Ok(())
    }

    fn check_rules(&self, values: &[Value]) -> Result<()> {
        for (rule, first, second) in &self.rules {
            let is_given = !matches!(values[*second], Value::Absent);
            match *rule {
                Rule::Needs(arg, other) => {
                    if !is_given && !matches!(values[*first], Value::Absent) {
                        let rule = format_args!("come together with {other}");
                        return Err(self.error(ErrorKind::Value, arg, rule, format_args!("no {other}")));
                    }
                }
                Rule::DtypeIfGiven(arg, given, then, otherwise) => {
                    let dtype = if is_given { then } else { otherwise };
                    if let Value::Tensor(tensor) = &values[*first]
                        && tensor.dtype != dtype
                    {
                        let how = if is_given { "with" } else { "without" };
                        let rule = format_args!("have dtype {dtype} {how} {given}");
                        return Err(self.error(ErrorKind::Dtype, arg, rule, tensor.dtype));
                    }
                }
                Rule::Excludes(arg, other) => {
                    if is_given && !matches!(values[*first], Value::Absent) {
                        let rule = format_args!("be None with {other}");
                        return Err(self.error(ErrorKind::Value, arg, rule, "a tensor"));
                    }
                }
                Rule::NoneFor(arg, of, dtype) => {
                    let is_this = matches!(&values[*second], Value::Dtype(given) if *given == dtype);
                    if is_this && !matches!(values[*first], Value::Absent) {
                        let rule = format_args!("be None for {of} {dtype}");
                        return Err(self.error(ErrorKind::Value, arg, rule, "a tensor"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Dtype, number of elements and dimensions of the output or scratch at `index`.
    pub fn output(&self, index: usize, values: &[Value], symbols: &Symbols) -> Result<Tensor> {
        let device = symbols.device.map_or(Device::Cpu, |(device, _)| device);
        let dtype = match self.spec.args[index].role {
            Role::Out(of, _) => self.output_dtype(index, of, values),
            _ => Dtype::Uint8,
        };
        let mut bound = *symbols;
        let (dims, rank) = self.dims(index, &mut bound, &[])?;
        match self.len(index, symbols).and_then(|len| len.checked_mul(dtype.size() as i64)) {
            Some(_) => Ok(Tensor::new(std::ptr::null_mut(), dtype, device, &dims[..rank])),
            None => Err(self.too_large(index, symbols)),
        }
    }

    #[inline]
    fn output_dtype(&self, index: usize, of: Of, values: &[Value]) -> Dtype {
        match (of, &values[self.dtype_sources[index]]) {
            (Of::Is(dtype), _) => dtype,
            (Of::Like(_), Value::Tensor(tensor)) => tensor.dtype,
            (_, value) => Dtype::take(value, &Role::Int),
        }
    }

    /// Checks the outputs and scratch, and that nothing written shares memory with another argument.
    pub fn check_outputs(&self, values: &[Value], symbols: &Symbols) -> Result<()> {
        self.written().try_for_each(|index| self.check_output(index, values, symbols))
    }

    /// Checks the output or scratch at `index`.
    pub fn check_output(&self, index: usize, values: &[Value], symbols: &Symbols) -> Result<()> {
        let arg = &self.spec.args[index];
        let tensor = self.tensor(arg, &values[index])?;
        let dtype = match arg.role {
            Role::Out(of, _) => self.output_dtype(index, of, values),
            _ => Dtype::Uint8,
        };
        if tensor.dtype != dtype {
            let rule = format_args!("have dtype {dtype}");
            return Err(self.error(ErrorKind::Dtype, arg.name, rule, tensor.dtype));
        }
        self.check_device(index, arg, tensor, &mut symbols.clone())?;
        let len = self.len(index, symbols).filter(|len| len.checked_mul(dtype.size() as i64).is_some());
        let len = len.ok_or_else(|| self.too_large(index, symbols))?;
        if tensor.len() != len {
            return Err(self.error(ErrorKind::Shape, arg.name, self.length_rule(index, len), tensor.len()));
        }
        self.check_memory(arg, tensor)?;
        if tensor.is_read_only {
            return Err(self.error(ErrorKind::Value, arg.name, "be writable", "read-only memory"));
        }
        self.check_overlap(index, arg, tensor, values)
    }

    fn check_overlap(&self, index: usize, arg: &Arg, tensor: &Tensor, values: &[Value]) -> Result<()> {
        let begin = tensor.data as usize;
        let end = begin + tensor.num_bytes();
        for (other_index, (value, other)) in values.iter().zip(self.spec.args).enumerate() {
            if let Value::Tensor(with) = value
                && other_index != index
            {
                let (from, to) = (with.data as usize, with.data as usize + with.num_bytes());
                if begin < to && from < end && begin < end && from < to {
                    let num_bytes = end.min(to) - begin.max(from);
                    let rule = format_args!("not share memory with {}", other.name);
                    let got = format_args!("{num_bytes} common bytes");
                    return Err(self.error(ErrorKind::Value, arg.name, rule, got));
                }
            }
        }
        Ok(())
    }
}

/// `a`, `a or b`, `a, b or c`.
fn names(dtypes: &[Dtype]) -> String {
    let names: Vec<_> = dtypes.iter().map(|dtype| dtype.name()).collect();
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => names.concat(),
    }
}
