//! Safetensors: a header in JSON, then the elements.
//!
//! The header is read here and not by the format's own library, which loads a million entries, or a shape of ten million
//! sizes, before anybody can check them. This reader counts, and refuses at the first excess.

use std::collections::HashSet;
use std::fmt;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::Dictionary;
use crate::error::{Error, Result};
use crate::source::Source;
use crate::tensor::{DIMENSIONS, TENSORS, Tensor};

/// The most bytes of header that are read: some 150 for each of the most tensors.
const HEADER: u64 = 16 << 20;

/// Whether these first bytes claim to be safetensors.
pub(crate) fn recognise(start: &[u8]) -> bool {
    start.get(8) == Some(&b'{')
}

/// Reads the header.
pub(crate) fn read(source: &Source) -> Result<Dictionary> {
    let mut length = [0; 8];
    source.read_at(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    if length > source.len() - 8 {
        return Err(Error::format(format!(
            "the safetensors header has {length} bytes, but the file only {}: it is cut off",
            source.len()
        )));
    }
    if length > HEADER {
        let what = "bytes of header";
        return Err(Error::Limit {
            what,
            limit: HEADER,
        });
    }
    let bytes = source.bytes(8, length)?;
    let bad = |e: &dyn fmt::Display| Error::format(format!("the safetensors header: {e}"));
    let header: Header = serde_json::from_slice(&bytes).map_err(|e| bad(&e))?;
    drop(bytes);
    let mut entries = header.0;
    entries.sort_by_key(|(_, info)| info.data_offsets);
    let (data, held) = (8 + length, source.len() - 8 - length);
    let mut dictionary = Dictionary::new(String::new());
    let mut end = 0;
    for (
        name,
        Info {
            dtype,
            shape,
            data_offsets: (from, to),
        },
    ) in entries
    {
        // Neither gaps nor overlaps: one element after the other.
        let bits = shape.iter().try_fold(dtype.bitsize() as u64, |bits, &n| {
            bits.checked_mul(n as u64)
        });
        if from != end || to < from || bits != (to - from).checked_mul(8) {
            return Err(bad(&format!(
                "tensor {name} of shape {shape:?} and type {dtype} at bytes {from} to {to}, expected its elements from \
                 byte {end} on"
            )));
        }
        end = to;
        let start = data
            .checked_add(from)
            .ok_or_else(|| bad(&"offsets out of range"))?;
        dictionary.insert(name, Tensor::contiguous(dtype, shape, start));
    }
    if end != held {
        return Err(Error::format(format!(
            "the header describes {end} bytes of elements, but the file has {held}: it is cut off or damaged",
        )));
    }
    Ok(dictionary)
}

/// A tensor's entry in the header.
#[derive(Deserialize)]
struct Info {
    dtype: Dtype,
    #[serde(deserialize_with = "sizes")]
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// All entries, in the order of the header.
struct Header(Vec<(String, Info)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut entries, mut names) = (Vec::new(), HashSet::new());
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    if entries.len() as u64 == TENSORS {
                        let message = format!("more than {TENSORS} tensors, the most that is read");
                        return Err(de::Error::custom(message));
                    }
                    if !names.insert(name.clone()) {
                        return Err(de::Error::custom(format!("tensor {name} comes twice")));
                    }
                    entries.push((name, map.next_value()?));
                }
                Ok(Header(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// The sizes of a tensor, no more than any has.
fn sizes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    struct Sizes;

    impl<'de> Visitor<'de> for Sizes {
        type Value = Vec<usize>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of sizes")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<usize>, A::Error> {
            let mut sizes = Vec::new();
            while let Some(size) = list.next_element()? {
                if sizes.len() == DIMENSIONS {
                    let message = format!("a shape of more than {DIMENSIONS} dimensions");
                    return Err(de::Error::custom(message));
                }
                sizes.push(size);
            }
            Ok(sizes)
        }
    }

    deserializer.deserialize_seq(Sizes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Result<Dictionary> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        read(&Source::Memory(bytes.into()))
    }

    #[test]
    fn a_header_is_read_in_the_order_of_its_elements() {
        let header = r#"{"__metadata__": {"format": "pt"}, "b": {"dtype": "F32", "shape": [1, 2], "data_offsets": [2, 10]},
            "a": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]}, "e": {"dtype": "I64", "shape": [0], "data_offsets": [10, 10]}}"#;
        let found = file(header, 10).unwrap();
        let shapes: Vec<_> = found.tensors().map(|(n, t)| (n, &t.shape[..])).collect();
        assert_eq!(shapes, [("a", &[][..]), ("b", &[1, 2]), ("e", &[0])]);
    }

    #[test]
    fn excess_and_lies_are_refused() {
        let check = |header: &str, data: usize, expected: &str| {
            let error = file(header, data).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        let one = |shape: &str, offsets: &str| {
            format!(r#"{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}"#)
        };
        check(
            &one(&format!("[{}1]", "1,".repeat(1_000_000)), "[0, 4]"),
            4,
            "more than 16 dimensions",
        );
        let empty = r#":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#;
        let many = |n: usize| -> String {
            let entries: Vec<String> = (0..n).map(|i| format!("\"{i}\"{empty}")).collect();
            format!("{{{}}}", entries.join(","))
        };
        check(&many(120_000), 0, "more than 100000 tensors");
        check(&many(1_000_000), 0, "bytes of header");
        check(
            &format!(
                "{{{},{}}}",
                format_args!("\"a\"{empty}"),
                format_args!("\"a\"{empty}")
            ),
            0,
            "a comes twice",
        );
        check(
            &one("[1]", "[0, 8]"),
            8,
            "expected its elements from byte 0",
        );
        check(
            &one("[1]", "[4, 8]"),
            8,
            "expected its elements from byte 0",
        );
        check(
            &one("[1]", "[8, 4]"),
            8,
            "expected its elements from byte 0",
        );
        check(
            &one("[4611686018427387904, 8]", "[0, 4]"),
            4,
            "expected its elements",
        );
        check(
            &one("[0, 18446744073709551615]", "[0, 18446744073709551615]"),
            0,
            "expected its elements",
        );
        check(&one("[1]", "[0, 4]"), 3, "cut off or damaged");
        check(&one("[-1]", "[0, 4]"), 4, "the safetensors header");
        let overlapping = r#"{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}"#;
        check(overlapping, 12, "tensor b");
    }
}
