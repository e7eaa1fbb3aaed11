//! A compute node's files for the runner: a job's specification, and pieces of records.
//!
//! The first byte selects the file: `o` for the specification (`order.json`), `s` for a sealed piece, anything else for an
//! open one.

use std::fs;

use retort::cluster::spool::{self, Reader, SpoolReading};
use tempfile::TempDir;

use super::Target;

pub const SPOOL: Target = Target {
    name: "spool",
    exercise,
    tokens: &[
        b"{\"number\":0,\"at\":0,\"word\":",
        b"{\"began\":{\"job\":\"1\",\"node\":\"n\",\"pid\":1}}",
        b"{\"line\":{\"source\":\"stdout\",\"text\":\"\"}}",
        b"{\"exited\":{\"status\":{\"code\":0},\"usage\":{\"cpu_seconds\":1e308,\"max_rss\":18446744073709551615},",
        b"\"out_of_memory\":false}}",
        b"{\"over\":\"done\"}",
        b"{\"over\":{\"again\":{\"reason\":\"\"}}}",
        b"{\"over\":{\"time_limit\":{\"at_checkpoint\":true}}}",
        b"{\"frame\":{\"answer\":{\"result\":{\"output\":1}}}}",
        b"18446744073709551615",
        b"4294967296",
        b"\"format\":1",
        b"\"elements\":[null,null]",
        b"\"elements\":[{\"index\":0,\"of\":2},{\"index\":1,\"of\":2}]",
        b"\"interval\":{\"secs\":0,\"nanos\":0}",
        b"\"threads\":0",
        b"\xff\xff\xff\xff",
        b"\0\0\0\0\0\0\0\0",
    ],
    mend: Some(mend),
    examples: None,
};

fn exercise(bytes: &[u8]) -> String {
    thread_local! {
        static FOLDER: TempDir = super::folder();
    }
    let (kind, rest) = bytes.split_at(bytes.len().min(1));
    FOLDER.with(|folder| {
        if kind == b"o" {
            fs::write(folder.path().join("order.json"), rest).expect("a file");
            return match spool::read_job_spec(folder.path()) {
                Ok(spec) => {
                    assert!(!spec.interval.is_zero() && spec.threads > 0);
                    let count = spec.elements.len().checked_ilog2();
                    format!("{:?} {count:?}", spec.layout())
                }
                Err(error) => error.to_string(),
            };
        }
        let dir = spool::element_dir(folder.path(), 0);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).expect("a folder");
        let name = match kind {
            b"s" => "0.0.sealed",
            _ => "0.0.open",
        };
        fs::write(dir.join(name), rest).expect("a file");
        let mut reader = Reader::new(dir);
        let (mut records, mut outcome) = (Vec::new(), String::new());
        // As often as a runner that waits for the rest of a record.
        for _ in 0..64 {
            match reader.look(&mut records) {
                Ok(SpoolReading::More) => {}
                Ok(seen) => outcome = format!("{seen:?}"),
                Err(error) => {
                    outcome = error.to_string();
                    break;
                }
            }
        }
        for record in records.iter().take(8) {
            assert_eq!(record.number >> 32, 0, "of another start");
            outcome.extend(format!("{:.16?}", record.word).chars().take(40));
        }
        format!("{outcome} {:?}", records.len().checked_ilog2())
    })
}

/// Sets each record's length so that it ends at the next one, and its checksum.
fn mend(bytes: &mut Vec<u8>) {
    const BEGIN: &[u8] = b"{\"number\":";
    if bytes.len().is_multiple_of(8) || bytes.is_empty() || bytes[0] == b'o' {
        return;
    }
    let starts = bytes.windows(BEGIN.len()).enumerate();
    let mut starts: Vec<usize> = starts
        .filter(|(_, text)| *text == BEGIN)
        .map(|(at, _)| at)
        .collect();
    starts.push(bytes.len() + 8);
    let mut mended = vec![bytes[0]];
    for ends in starts.windows(2) {
        let text = &bytes[ends[0]..ends[1].saturating_sub(8).clamp(ends[0], bytes.len())];
        // As long as a mutated input, so it fits.
        mended.extend((text.len() as u32).to_le_bytes());
        mended.extend(checksum(text).to_le_bytes());
        mended.extend(text);
    }
    *bytes = mended;
}

/// CRC-32C.
fn checksum(bytes: &[u8]) -> u32 {
    let mut sum = u32::MAX;
    for &byte in bytes {
        sum ^= u32::from(byte);
        for _ in 0..8 {
            sum = (sum >> 1) ^ (0x82f6_3b78 & (sum & 1).wrapping_neg());
        }
    }
    !sum
}
