//! Mutations of bytes: random ones, tokens of the format, pieces of other inputs.

use crate::random::Random;

/// Numbers that break sizes and counters.
const NUMBERS: [&str; 16] = [
    "0",
    "-1",
    "1",
    "255",
    "65536",
    "2147483648",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e400",
    "-0.0",
    "1e-400",
    "nan",
];

/// Text that trips up terminals, parsers and renderers.
const TEXTS: [&str; 12] = [
    "\u{feff}",
    "\u{a0}",
    "\u{3000}",
    "\u{202e}",
    "\u{9b}2J",
    "\x1b[31m",
    "\0",
    "é",
    "日本",
    "\u{10ffff}",
    "\r",
    "\t",
];

/// Changes `bytes` once, perhaps with pieces of `other` or `tokens`.
pub fn mutate(bytes: &mut Vec<u8>, other: &[u8], tokens: &[&[u8]], random: &mut Random) {
    let at = random.below(bytes.len() + 1);
    match random.below(18) {
        0 => bytes.truncate(at),
        1 | 2 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
        3 if at < bytes.len() => bytes[at] = random.below(256) as u8,
        4 if at < bytes.len() => bytes[at] = bytes[at].wrapping_add(1),
        5 | 6 if !tokens.is_empty() => {
            let token = *random.one_of(tokens);
            bytes.splice(at..at, token.iter().copied());
        }
        7 if !tokens.is_empty() => {
            let token = *random.one_of(tokens);
            let end = (at + token.len()).min(bytes.len());
            bytes.splice(at..end, token.iter().copied());
        }
        8 => {
            let end = (at + random.between(1, 16)).min(bytes.len());
            bytes.drain(at..end);
        }
        9 => {
            let part = part_of(bytes, random);
            bytes.splice(at..at, part);
        }
        10 => {
            let part = part_of(other, random);
            let end = (at + part.len()).min(bytes.len());
            bytes.splice(at..end, part);
        }
        11 => {
            let times = match random.once_in(8) {
                true => random.between(1, 2000),
                false => random.between(1, 8),
            };
            let part = part_of(bytes, random).repeat(times);
            bytes.splice(at..at, part);
        }
        12 => {
            let tail = &other[random.below(other.len())..];
            bytes.truncate(at);
            bytes.extend_from_slice(tail);
        }
        13 | 14 => replace_number(bytes, at, random),
        15 => replace_line(bytes, other, random),
        16 => {
            let text = random.one_of(&TEXTS);
            bytes.splice(at..at, text.bytes());
        }
        _ => {
            // A size in binary.
            let values = [
                0,
                1,
                0x7f,
                0xff,
                0xffff,
                1 << 24,
                u32::MAX as u64,
                i64::MAX as u64,
                u64::MAX,
            ];
            let value = random.one_of(&values).to_le_bytes();
            let width = *random.one_of(&[1, 2, 4, 8]);
            let end = (at + width).min(bytes.len());
            bytes.splice(at..end, value[..width].iter().copied());
        }
    }
}

/// Some of these bytes.
fn part_of(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let start = random.below(bytes.len());
    let end = (start + random.between(1, 64)).min(bytes.len());
    bytes[start.min(end)..end].to_vec()
}

/// Replaces the next number in the text with an awkward one.
fn replace_number(bytes: &mut Vec<u8>, at: usize, random: &mut Random) {
    let Some(start) = bytes[at..].iter().position(u8::is_ascii_digit) else {
        return;
    };
    let start = at + start;
    let digits = bytes[start..]
        .iter()
        .take_while(|byte| byte.is_ascii_digit());
    let end = start + digits.count();
    let number = random.one_of(&NUMBERS);
    bytes.splice(start..end, number.bytes());
}

/// Puts a line of either input in place of a line or before it.
fn replace_line(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let lines = |bytes: &[u8]| -> Vec<Vec<u8>> {
        bytes
            .split_inclusive(|&byte| byte == b'\n')
            .map(<[u8]>::to_vec)
            .collect()
    };
    let mut own = lines(bytes);
    let from = if random.once_in(2) {
        own.clone()
    } else {
        lines(other)
    };
    if own.is_empty() || from.is_empty() {
        return;
    }
    let at = random.below(own.len());
    let line = random.one_of(&from).clone();
    match random.below(3) {
        0 => own[at] = line,
        1 => own.insert(at, line),
        _ => drop(own.remove(at)),
    }
    *bytes = own.concat();
}
