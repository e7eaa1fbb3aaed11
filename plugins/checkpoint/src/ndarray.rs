//! NumPy's arrays in a pickle, as data: what `torch.save` and `pickle.dump` write of them.
//!
//! ```text
//! numpy.core.multiarray._reconstruct(..)   with the state (version, shape, type, is Fortran's order, bytes)
//! numpy.core.numeric._frombuffer(bytes, type, shape, order)
//! numpy.dtype('f8', ..)                    with the state (version, byte order, ..)
//! _codecs.encode(text, 'latin1')           bytes, where the pickle's protocol knows texts only
//! ```
//!
//! NumPy 2 says `numpy._core`. In: a value of a pickle. Out: a tensor in a source of its own, made of the decoded bytes
//! in the machine's order. Arrays of anything but numbers are values that nobody looks into.

use std::collections::HashMap;

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::pickle::{Id, Node, Pickle};
use crate::tensor::{DIMENSIONS, Tensor, row_major};
use crate::torch::PICKLE;

/// The source that the arrays of a file lie in: the one after the file.
const SOURCE: usize = 1;

/// The arrays found so far, each once.
#[derive(Default)]
pub(crate) struct Arrays {
    bytes: Vec<u8>,
    known: HashMap<Id, Tensor>,
}

/// An array's type: of its elements, and whether their highest byte comes first.
type Type = (Dtype, bool);

impl Arrays {
    /// The array that a value stands for, if it does.
    pub fn read(&mut self, pickle: &Pickle, id: Id) -> Result<Option<Tensor>> {
        if let Some(known) = self.known.get(&id) {
            return Ok(Some(known.clone()));
        }
        let Some((shape, (dtype, turned), fortran, data)) = parts(pickle, id) else {
            return Ok(None);
        };
        let size = dtype.bitsize() / 8;
        let wanted = shape
            .iter()
            .try_fold(size, |bytes, &n| bytes.checked_mul(n));
        let start = self.bytes.len();
        let room = (PICKLE as usize).saturating_sub(start);
        let Some(wanted) = wanted.filter(|&wanted| wanted <= room) else {
            let what = "bytes of arrays in a pickle";
            return Err(Error::Limit {
                what,
                limit: PICKLE,
            });
        };
        decode(pickle, data, &mut self.bytes, wanted).ok_or_else(|| {
            Error::format(format!(
                "an array of shape {shape:?} and type {dtype} whose elements are not {wanted} bytes"
            ))
        })?;
        if turned {
            let own = &mut self.bytes[start..];
            own.chunks_exact_mut(size).for_each(<[u8]>::reverse);
        }
        let strides = if fortran {
            let turned: Vec<usize> = shape.iter().rev().copied().collect();
            row_major(&turned).into_iter().rev().collect()
        } else {
            row_major(&shape)
        };
        let storage = (start as u64, wanted as u64);
        let tensor = Tensor::view(dtype, (shape, strides), 0, storage)?.within(SOURCE);
        self.known.insert(id, tensor.clone());
        Ok(Some(tensor))
    }

    /// Whether a function or class is one of those that stand for the arrays found.
    pub fn understand(&self, module: &str, name: &str) -> bool {
        let own = matches!(
            name,
            "_reconstruct" | "_frombuffer" | "ndarray" | "dtype" | "encode"
        );
        own && !self.known.is_empty() && (module.starts_with("numpy") || module == "_codecs")
    }

    /// The bytes that the tensors lie in.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// Shape, type, whether the first dimension is the fastest, and the value with the bytes.
fn parts(pickle: &Pickle, id: Id) -> Option<(Vec<usize>, Type, bool, Id)> {
    let is = |callable: Id, module: &str, name: &str| {
        let found = pickle.global(callable);
        found.is_some_and(|(m, n)| {
            n == name
                && [
                    format!("numpy.core.{module}"),
                    format!("numpy._core.{module}"),
                ]
                .contains(&m.into())
        })
    };
    let (shape, dtype, fortran, data) = match *pickle.node(id) {
        Node::Built {
            callable, state, ..
        } if is(callable, "multiarray", "_reconstruct") => {
            let &[_version, shape, dtype, fortran, data] = pickle.elements(state)? else {
                return None;
            };
            (
                shape,
                dtype,
                *pickle.node(fortran) == Node::Bool(true),
                data,
            )
        }
        Node::Call {
            callable,
            arguments,
        } if is(callable, "numeric", "_frombuffer") => {
            let &[data, dtype, shape, order] = pickle.elements(arguments)? else {
                return None;
            };
            (shape, dtype, pickle.text(order)? == "F", data)
        }
        _ => return None,
    };
    let sizes = pickle.elements(shape)?;
    if sizes.len() > DIMENSIONS {
        return None;
    }
    let size = |&id: &Id| usize::try_from(pickle.count(id)?).ok();
    let shape = sizes.iter().map(size).collect::<Option<_>>()?;
    Some((shape, element_type(pickle, dtype)?, fortran, data))
}

fn element_type(pickle: &Pickle, id: Id) -> Option<Type> {
    let (callable, arguments, state) = match *pickle.node(id) {
        Node::Built {
            callable,
            arguments,
            state,
        } => (callable, arguments, Some(state)),
        Node::Call {
            callable,
            arguments,
        } => (callable, arguments, None),
        _ => return None,
    };
    if pickle.global(callable)? != ("numpy", "dtype") {
        return None;
    }
    let name = pickle.text(*pickle.elements(arguments)?.first()?)?;
    let order = state.and_then(|state| pickle.text(*pickle.elements(state)?.get(1)?));
    let turned = order == Some(">") || name.starts_with('>');
    let dtype = match name.trim_start_matches(['<', '>', '=', '|']) {
        "f8" => Dtype::F64,
        "f4" => Dtype::F32,
        "f2" => Dtype::F16,
        "i8" => Dtype::I64,
        "i4" => Dtype::I32,
        "i2" => Dtype::I16,
        "i1" => Dtype::I8,
        "u8" => Dtype::U64,
        "u4" => Dtype::U32,
        "u2" => Dtype::U16,
        "u1" => Dtype::U8,
        "b1" => Dtype::BOOL,
        _ => return None,
    };
    Some((dtype, turned))
}

/// Appends the bytes of a value, if there are so many.
fn decode(pickle: &Pickle, id: Id, out: &mut Vec<u8>, wanted: usize) -> Option<()> {
    match pickle.node(id) {
        Node::Bytes(range) => {
            let bytes = pickle.raw(range);
            (bytes.len() == wanted).then(|| out.extend_from_slice(bytes))
        }
        &Node::Call {
            callable,
            arguments,
        } => {
            let arguments = pickle.elements(arguments)?;
            match (pickle.global(callable)?, arguments) {
                // What protocol 2 has for no bytes at all.
                (("__builtin__" | "builtins", "bytes"), []) => (wanted == 0).then_some(()),
                (("_codecs", "encode"), &[text, code]) if pickle.text(code)? == "latin1" => {
                    let Node::Text(range) = pickle.node(text) else {
                        return None;
                    };
                    let text = std::str::from_utf8(pickle.raw(range)).ok()?;
                    let start = out.len();
                    out.reserve_exact(wanted);
                    // One byte a character.
                    for character in text.chars() {
                        if out.len() - start == wanted {
                            return None;
                        }
                        out.push(u8::try_from(u32::from(character)).ok()?);
                    }
                    (out.len() - start == wanted).then_some(())
                }
                _ => None,
            }
        }
        _ => None,
    }
}
