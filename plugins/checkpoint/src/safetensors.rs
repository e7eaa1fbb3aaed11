//! Safetensors: a header in JSON, then the elements.

use std::str;

use safetensors::tensor::Metadata;

use crate::Dictionary;
use crate::error::{Error, Result};
use crate::source::Source;
use crate::tensor::Tensor;

/// The most bytes of header that are read.
const HEADER: u64 = 64 << 20;

/// Whether a file that begins so claims to be one.
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
    let header = source.bytes(8, length)?;
    let bad = |e: &dyn std::fmt::Display| Error::format(format!("the safetensors header: {e}"));
    let text = str::from_utf8(&header).map_err(|e| bad(&e))?;
    // Offsets, sizes and types are checked against each other while the header is read.
    let metadata: Metadata = serde_json::from_str(text).map_err(|e| bad(&e))?;
    let (data, held) = (8 + length, source.len() - 8 - length);
    if metadata.data_len() as u64 != held {
        return Err(Error::format(format!(
            "the header speaks of {} bytes of elements, the file has {held}: it is cut off or damaged",
            metadata.data_len(),
        )));
    }
    let mut dictionary = Dictionary::new(String::new());
    for name in metadata.offset_keys() {
        let Some(info) = metadata.info(&name) else {
            continue;
        };
        let start = data + info.data_offsets.0 as u64;
        let tensor = Tensor::contiguous(info.dtype, info.shape.clone(), start);
        dictionary.insert(name, tensor);
    }
    Ok(dictionary)
}
