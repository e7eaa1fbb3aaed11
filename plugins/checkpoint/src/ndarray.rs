//! NumPy's arrays in a pickle, as data: the form in which `torch.save` and `pickle.dump` write them.
//!
//! ```text
//! numpy.core.multiarray._reconstruct(..)   with the state (version, shape, type, is Fortran's order, bytes)
//! numpy.core.numeric._frombuffer(bytes, type, shape, order)
//! numpy.dtype('f8', ..)                    with the state (version, byte order, ..)
//! _codecs.encode(text, 'latin1')           bytes, in protocols that have only texts
//! ```
//!
//! NumPy 2 says `numpy._core`. In: a value of a pickle. Out: a tensor in a source of its own, made of the decoded bytes in
//! the machine's order. Arrays of anything but numbers are opaque values.

use std::collections::HashMap;

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::pickle::{Id, MOST_BYTES, Node, Pickle};
use crate::tensor::{DIMENSIONS, Tensor, row_major};

/// The source with the arrays of a file: the one after the file.
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
    /// The array that a value stands for, if any.
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
        let room = (MOST_BYTES as usize).saturating_sub(start);
        let Some(wanted) = wanted.filter(|&wanted| wanted <= room) else {
            let what = "bytes of arrays in a pickle";
            return Err(Error::Limit {
                what,
                limit: MOST_BYTES,
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

    /// Whether a function or class is one that creates arrays.
    pub fn understand(&self, module: &str, name: &str) -> bool {
        let own = matches!(
            name,
            "_reconstruct" | "_frombuffer" | "ndarray" | "dtype" | "encode"
        );
        own && !self.known.is_empty() && (module.starts_with("numpy") || module == "_codecs")
    }

    /// The bytes of the tensors.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// Shape, type, whether the order is Fortran's, and the value with the bytes.
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

/// Appends the bytes of a value, if their number is right.
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
                // Protocol 2's form of empty bytes.
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::Checkpoint;

    // Written by NumPy 2.4 and Python's pickle of [[1.5, -2], [0.1, 3e300]] in f8, `{'m': array}`.
    const PROTOCOL_2: &[u8] = b"\x80\x02}q\0X\x01\0\0\0mq\x01cnumpy._core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\0\x85\
        q\x04c_codecs\nencode\nq\x05X\x01\0\0\0bq\x06X\x06\0\0\0latin1q\x07\x86q\x08Rq\x09\x87q\nRq\x0b(K\x01\
        K\x02K\x02\x86q\x0ccnumpy\ndtype\nq\x0dX\x02\0\0\0f8q\x0e\x89\x88\x87q\x0fRq\x10(K\x03X\x01\0\0\0<q\x11\
        NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tq\x12b\x89h\x05X*\0\0\0\0\0\0\0\0\0\xc3\xb8?\0\0\0\0\0\0\0\xc3\
        \x80\xc2\x9a\xc2\x99\xc2\x99\xc2\x99\xc2\x99\xc2\x99\xc2\xb9?5X\0f-\xc3\xabQ~q\x13h\x07\x86q\x14Rq\x15\
        tq\x16bs.";
    const FORTRAN: &[u8] = b"\x80\x02}q\0X\x01\0\0\0mq\x01cnumpy._core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\0\x85\
        q\x04c_codecs\nencode\nq\x05X\x01\0\0\0bq\x06X\x06\0\0\0latin1q\x07\x86q\x08Rq\x09\x87q\nRq\x0b(K\x01\
        K\x02K\x02\x86q\x0ccnumpy\ndtype\nq\x0dX\x02\0\0\0f8q\x0e\x89\x88\x87q\x0fRq\x10(K\x03X\x01\0\0\0<q\x11\
        NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tq\x12b\x88h\x05X*\0\0\0\0\0\0\0\0\0\xc3\xb8?\xc2\x9a\xc2\x99\
        \xc2\x99\xc2\x99\xc2\x99\xc2\x99\xc2\xb9?\0\0\0\0\0\0\0\xc3\x805X\0f-\xc3\xabQ~q\x13h\x07\x86q\x14Rq\x15\
        tq\x16bs.";
    const TURNED: &[u8] = b"\x80\x02}q\0X\x01\0\0\0mq\x01cnumpy._core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\0\x85\
        q\x04c_codecs\nencode\nq\x05X\x01\0\0\0bq\x06X\x06\0\0\0latin1q\x07\x86q\x08Rq\x09\x87q\nRq\x0b(K\x01\
        K\x02K\x02\x86q\x0ccnumpy\ndtype\nq\x0dX\x02\0\0\0f8q\x0e\x89\x88\x87q\x0fRq\x10(K\x03X\x01\0\0\0>q\x11\
        NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tq\x12b\x89h\x05X*\0\0\0?\xc3\xb8\0\0\0\0\0\0\xc3\x80\0\0\0\0\
        \0\0\0?\xc2\xb9\xc2\x99\xc2\x99\xc2\x99\xc2\x99\xc2\x99\xc2\x9a~Q\xc3\xab-f\0X5q\x13h\x07\x86q\x14Rq\x15\
        tq\x16bs.";
    const PROTOCOL_4: &[u8] = b"\x80\x04\x95\xb2\0\0\0\0\0\0\0}\x94\x8c\x01m\x94\x8c\x16numpy._core.multiarray\x94\x8c\x0c_reconstruc\
        t\x94\x93\x94\x8c\x05numpy\x94\x8c\x07ndarray\x94\x93\x94K\0\x85\x94C\x01b\x94\x87\x94R\x94(K\x01K\x02\
        K\x02\x86\x94h\x05\x8c\x05dtype\x94\x93\x94\x8c\x02f8\x94\x89\x88\x87\x94R\x94(K\x03\x8c\x01<\x94NNNJ\
        \xff\xff\xff\xffJ\xff\xff\xff\xffK\0t\x94b\x89C \0\0\0\0\0\0\xf8?\0\0\0\0\0\0\0\xc0\x9a\x99\x99\x99\x99\
        \x99\xb9?5X\0f-\xebQ~\x94t\x94bs.";
    const PROTOCOL_5: &[u8] = b"\x80\x05\x95\x9d\0\0\0\0\0\0\0}\x94\x8c\x01m\x94\x8c\x13numpy._core.numeric\x94\x8c\x0b_frombuffer\x94\
        \x93\x94(\x96 \0\0\0\0\0\0\0\0\0\0\0\0\0\xf8?\0\0\0\0\0\0\0\xc0\x9a\x99\x99\x99\x99\x99\xb9?5X\0f-\xeb\
        Q~\x94\x8c\x05numpy\x94\x8c\x05dtype\x94\x93\x94\x8c\x02f8\x94\x89\x88\x87\x94R\x94(K\x03\x8c\x01<\x94\
        NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t\x94bK\x02K\x02\x86\x94\x8c\x01C\x94t\x94R\x94s.";
    const FORTRAN_5: &[u8] = b"\x80\x05\x95\x9d\0\0\0\0\0\0\0}\x94\x8c\x01m\x94\x8c\x13numpy._core.numeric\x94\x8c\x0b_frombuffer\x94\
        \x93\x94(\x96 \0\0\0\0\0\0\0\0\0\0\0\0\0\xf8?\x9a\x99\x99\x99\x99\x99\xb9?\0\0\0\0\0\0\0\xc05X\0f-\xeb\
        Q~\x94\x8c\x05numpy\x94\x8c\x05dtype\x94\x93\x94\x8c\x02f8\x94\x89\x88\x87\x94R\x94(K\x03\x8c\x01<\x94\
        NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t\x94bK\x02K\x02\x86\x94\x8c\x01F\x94t\x94R\x94s.";
    /// i4 [1, 2, 300] as `m` and no element in the shape (0, 3) as `e`.
    const INTEGERS: &[u8] = b"\x80\x02}q\0(X\x01\0\0\0mq\x01cnumpy._core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\0\x85\
        q\x04c_codecs\nencode\nq\x05X\x01\0\0\0bq\x06X\x06\0\0\0latin1q\x07\x86q\x08Rq\x09\x87q\nRq\x0b(K\x01\
        K\x03\x85q\x0ccnumpy\ndtype\nq\x0dX\x02\0\0\0i4q\x0e\x89\x88\x87q\x0fRq\x10(K\x03X\x01\0\0\0<q\x11NNN\
        J\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tq\x12b\x89h\x05X\x0c\0\0\0\x01\0\0\0\x02\0\0\0,\x01\0\0q\x13h\x07\
        \x86q\x14Rq\x15tq\x16bX\x01\0\0\0eq\x17h\x02h\x03K\0\x85q\x18h\x09\x87q\x19Rq\x1a(K\x01K\0K\x03\x86q\x1b\
        h\x0dX\x02\0\0\0f8q\x1c\x89\x88\x87q\x1dRq\x1e(K\x03h\x11NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tq\x1f\
        b\x89c__builtin__\nbytes\nq )Rq!tq\"bu.";
    /// An array of objects.
    const OBJECTS: &[u8] = b"\x80\x02}q\0X\x01\0\0\0mq\x01cnumpy._core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\0\x85\
        q\x04c_codecs\nencode\nq\x05X\x01\0\0\0bq\x06X\x06\0\0\0latin1q\x07\x86q\x08Rq\x09\x87q\nRq\x0b(K\x01\
        K\x01\x85q\x0ccnumpy\ndtype\nq\x0dX\x02\0\0\0O8q\x0e\x89\x88\x87q\x0fRq\x10(K\x03X\x01\0\0\0|q\x11NNN\
        J\xff\xff\xff\xffJ\xff\xff\xff\xffK?tq\x12b\x89]q\x13}q\x14atq\x15bs.";

    /// As `torch.save` writes a pickle.
    fn open(pickle: &[u8]) -> Result<Checkpoint> {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored);
        zip.start_file("statistic/data.pkl", options).unwrap();
        zip.write_all(pickle).unwrap();
        Checkpoint::from_bytes(zip.finish().unwrap().into_inner())
    }

    /// NumPy before 2 has other module names.
    fn older(pickle: &[u8]) -> Vec<u8> {
        let (new, old) = (b"numpy._core", b"numpy.core");
        let at = pickle
            .windows(new.len())
            .position(|own| own == new)
            .unwrap();
        let mut older = [&pickle[..at], old, &pickle[at + new.len()..]].concat();
        // From protocol 4 on, texts and frames have a length.
        if pickle[1] >= 4 {
            older[at - 1] -= 1;
            older[3] -= 1;
        }
        older
    }

    #[test]
    fn arrays_have_their_elements_whatever_wrote_them() {
        for pickle in [
            PROTOCOL_2, FORTRAN, TURNED, PROTOCOL_4, PROTOCOL_5, FORTRAN_5,
        ] {
            for pickle in [pickle.to_vec(), older(pickle)] {
                let file = open(&pickle).unwrap();
                let m = file.select(None).unwrap().get("m").unwrap();
                assert_eq!((&m.shape[..], m.dtype), (&[2, 2][..], Dtype::F64));
                let bytes: Vec<u8> = [1.5f64, -2.0, 0.1, 3e300]
                    .iter()
                    .flat_map(|x| x.to_le_bytes())
                    .collect();
                assert_eq!(file.raw(m).unwrap(), bytes);
                assert!(file.strangers().is_empty(), "{:?}", file.strangers());
            }
        }
        let file = open(INTEGERS).unwrap();
        let all = file.select(None).unwrap();
        let [m, e] = ["m", "e"].map(|name| all.get(name).unwrap());
        assert_eq!(file.indices(m).unwrap(), [1, 2, 300]);
        assert_eq!(
            (&e.shape[..], file.floats(e).unwrap()),
            (&[0, 3][..], vec![])
        );
    }

    #[test]
    fn what_is_no_array_of_numbers_is_a_stranger() {
        let said = open(OBJECTS).map(drop).unwrap_err().to_string();
        assert!(
            said.contains("numpy._core.multiarray._reconstruct"),
            "{said}"
        );
    }

    #[test]
    fn an_array_that_is_not_what_it_says_is_refused() {
        let check = |from: &[u8], to: &[u8], expected: &str| {
            let at = PROTOCOL_2
                .windows(from.len())
                .position(|own| own == from)
                .unwrap();
            let pickle = [&PROTOCOL_2[..at], to, &PROTOCOL_2[at + from.len()..]].concat();
            let said = open(&pickle).map(drop).unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        };
        check(
            b"(K\x01K\x02K\x02\x86",
            b"(K\x01K\x02K\x03\x86",
            "are not 48 bytes",
        );
        check(
            b"(K\x01K\x02K\x02\x86",
            b"(K\x01K\x02K\x01\x86",
            "are not 16 bytes",
        );
        // 2^31 - 1 by 2^31 - 1.
        let huge = b"(K\x01J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86";
        check(
            b"(K\x01K\x02K\x02\x86",
            huge,
            "bytes of arrays in a pickle: more than",
        );
        // A character above 255.
        check(b"\xc3\xb8?", b"\xc4\xb8?", "are not 32 bytes");
    }
}
