//! Mutated files: no crash, no endless loop, no unbounded memory. Short by default;
//! `RETORT_STRESS_SECONDS=600 cargo test --release -p retort-checkpoint --test stress -- --nocapture` for longer.
//!
//! A mutation that ends with a message not seen before is mutated further, so that errors lead deeper into the reader.

#[path = "../fuzz/exercise.rs"]
mod exercise;

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, Instant};

/// The most memory that any file may make the reader use, with room for the test itself.
const MEMORY_KIB: u64 = 1 << 20;
/// The most time for one file, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest mutated file.
const LONGEST: usize = 1 << 16;

/// Pieces that pickles are made of.
const PIECES: [&[u8]; 18] = [
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch\nFloatStorage\n",
    b"X\x07\x00\x00\x00storage",
    b"X\x01\x00\x00\x000",
    b"}q\x00(",
    b"]q\x01(",
    b"h\x00",
    b"h\x01h\x01e",
    b"((",
    b"tR",
    b"\x86\x86",
    b")\x81",
    b"Q",
    b"u.",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"K\x00",
];

/// Reproducible random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n.max(1) as u64) as usize
    }
}

fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let at = random.below(bytes.len());
    let piece = PIECES[random.below(PIECES.len())];
    let some = |bytes: &[u8], random: &mut Random| {
        let start = random.below(bytes.len());
        let end = (start + 1 + random.below(64)).min(bytes.len());
        bytes[start.min(end)..end].to_vec()
    };
    match random.below(11) {
        0 => bytes.truncate(at),
        1 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
        2 if !bytes.is_empty() => bytes[at] = random.below(256) as u8,
        3 if !bytes.is_empty() => bytes[at] = bytes[at].wrapping_add(1),
        4 => drop(bytes.splice(at..at, piece.iter().copied())),
        5 => {
            let end = (at + piece.len()).min(bytes.len());
            bytes.splice(at..end, piece.iter().copied());
        }
        6 => {
            let end = (at + 1 + random.below(16)).min(bytes.len());
            bytes.drain(at..end);
        }
        7 => {
            let part = some(bytes, random);
            bytes.splice(at..at, part);
        }
        8 => {
            let part = some(other, random);
            let end = (at + part.len()).min(bytes.len());
            bytes.splice(at..end, part);
        }
        9 => {
            let part = some(bytes, random).repeat(1 + random.below(200));
            bytes.splice(at..at, part);
        }
        _ => {
            let tail = &other[random.below(other.len())..];
            bytes.truncate(at);
            bytes.extend_from_slice(tail);
        }
    }
    bytes.truncate(LONGEST);
}

#[test]
fn mutated_files_give_tensors_or_errors() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/checkpoints");
    let mut corpus: Vec<Vec<u8>> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
        .collect();
    corpus.sort();
    let seeds = corpus.len();
    let mut outcomes = HashSet::new();
    for seed in &corpus {
        outcomes.insert(shape_of(&exercise::exercise(seed)));
    }
    let seconds = std::env::var("RETORT_STRESS_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok());
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(2));
    let mut random = Random(if seconds.is_some() {
        std::process::id().into()
    } else {
        1
    });
    let (mut runs, mut opened, mut slowest) = (0u64, 0u64, Duration::ZERO);
    while Instant::now() < until {
        // Half of the time from the files themselves: what was found lately is not everything.
        let among = if random.below(2) == 0 {
            seeds
        } else {
            corpus.len()
        };
        let mut bytes = corpus[random.below(among)].clone();
        let other = corpus[random.below(corpus.len())].clone();
        for _ in 0..1 + random.below(4) {
            mutate(&mut bytes, &other, &mut random);
        }
        let clock = Instant::now();
        let outcome = std::panic::catch_unwind(|| exercise::exercise(&bytes));
        let took = clock.elapsed();
        let keep = |why: &str| -> ! {
            let path = std::env::temp_dir().join(format!("stress-{}.bin", std::process::id()));
            std::fs::write(&path, &bytes).unwrap();
            panic!("{why}: {}", path.display())
        };
        let Ok(outcome) = outcome else {
            keep("a crash")
        };
        if took > PATIENCE {
            keep("too slow");
        }
        if runs.is_multiple_of(1024) && peak_kib().is_some_and(|peak| peak > MEMORY_KIB) {
            keep("too much memory, by this file or one before it");
        }
        runs += 1;
        opened += u64::from(outcome.starts_with("Torch") || outcome.starts_with("Safe"));
        slowest = slowest.max(took);
        if outcomes.insert(shape_of(&outcome)) && corpus.len() < 20_000 {
            corpus.push(bytes);
        }
    }
    println!(
        "{runs} files, {opened} of them opened, {} outcomes; slowest {slowest:?}; peak {:?} KiB",
        outcomes.len(),
        peak_kib()
    );
    assert!(runs > 0);
    assert!(peak_kib().is_none_or(|peak| peak < MEMORY_KIB));
}

/// A message without its numbers.
fn shape_of(outcome: &str) -> String {
    let plain = outcome.chars().take(400);
    plain.filter(|c| !c.is_ascii_digit()).collect()
}

/// The most memory this process has had, where the system says so.
fn peak_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}
