//! Feeds a target with mutated inputs, in a separate process.
//!
//! The process records each input before it tries it, so the input is known whatever ends the process (a panic, a signal, a
//! stack overflow, lack of memory, too much time). A limit on its address space turns excessive memory use into a failed
//! allocation; a thread monitors the processor time of each input.

use std::collections::HashSet;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Target;
use super::mutation::mutate;
use crate::random::Random;
use crate::report::Inputs;

/// The most memory that an input may cost, in KiB, beyond what the process had before.
const MEMORY_KIB: u64 = 512 << 10;
/// The most processor time for one input.
const CPU_SECONDS: f64 = 2.0;
/// The most wall-clock time for one input, on a busy machine: an endless wait uses no processor time.
const PATIENCE: Duration = Duration::from_secs(120);
/// The longest mutated input.
const LONGEST: usize = 1 << 16;
/// Crashes after which a target is no longer tested.
const MOST_CRASHES: usize = 20;
/// The exit code after an input that was too slow.
const TOO_SLOW: i32 = 17;

/// How long to go on.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// A number of inputs.
    Inputs(u64),
    /// A wall-clock duration.
    Time(Duration),
}

/// A process's instructions for feeding a target.
#[derive(Debug, Clone)]
pub struct FuzzInput {
    /// Seed of all choices.
    pub seed: u64,
    /// How long to go on.
    pub until: Until,
    /// Inputs of the corpus that are known to end the process, as [`name_of`] names them.
    pub known: Vec<u64>,
    /// The file for the current input.
    pub note: PathBuf,
}

/// Tries the corpus and then mutations of it; for the feeding process. Does not return if an input is too slow or causes a
/// panic.
pub fn feed(target: &Target, meal: &FuzzInput) -> Inputs {
    end_with_any_panic();
    let notes = Arc::new(Notes {
        file: File::create(&meal.note).expect("a file for the notes"),
        count: AtomicU64::new(0),
    });
    let mut corpus = vec![Vec::new()];
    corpus.extend(target.corpus().into_iter().map(|(_, bytes)| bytes));
    corpus.retain(|bytes| !meal.known.contains(&name_of(bytes)));
    let kept = corpus.len();
    // The target initialises itself now, before memory is measured.
    notes.try_one(target, b"");
    limit_memory();
    watch(Arc::clone(&notes));
    let mut inputs = Inputs::default();
    let mut outcomes = HashSet::new();
    for bytes in &corpus {
        outcomes.insert(shape_of(&notes.try_one(target, bytes)));
    }
    let (began, mut random) = (Instant::now(), Random::new(meal.seed, target.name));
    loop {
        let done = notes.count.load(Ordering::Relaxed);
        let over = match meal.until {
            Until::Inputs(most) => done >= most,
            Until::Time(most) => done.is_multiple_of(16) && began.elapsed() >= most,
        };
        if over {
            break;
        }
        // Half of the time from the corpus, so that recent finds do not dominate.
        let among = if random.once_in(2) {
            kept
        } else {
            corpus.len()
        };
        let mut bytes = corpus[random.below(among)].clone();
        let other = random.below(corpus.len());
        for _ in 0..random.between(1, 4) {
            mutate(&mut bytes, &corpus[other], target.tokens, &mut random);
        }
        bytes.truncate(LONGEST);
        if let Some(mend) = target.mend {
            mend(&mut bytes);
        }
        let clock = Instant::now();
        let outcome = notes.try_one(target, &bytes);
        inputs.slowest = inputs.slowest.max(clock.elapsed().as_secs_f64());
        if outcomes.insert(shape_of(&outcome)) && corpus.len() < 20_000 && bytes.len() < LONGEST / 4
        {
            corpus.push(bytes);
        }
    }
    inputs.count = notes.count.load(Ordering::Relaxed);
    inputs.outcomes = outcomes.len() as u64;
    inputs.peak_kib = own("status", "VmHWM:").unwrap_or(0);
    inputs
}

/// A crash by an input.
#[derive(Debug)]
pub struct Crash {
    /// How it crashed.
    pub what: String,
    /// The input.
    pub bytes: Vec<u8>,
}

/// Feeds a target through `command` (this program, which calls [`feed`] with the file `note`), and reads how it ended. Its last
/// line has the counts.
pub fn watch_over(command: &mut Command, note: &Path) -> (Inputs, Option<Crash>) {
    // One arena for all threads, because each takes some of the limited address space.
    let mut child = command
        .env("MALLOC_ARENA_MAX", "1")
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a process");
    let mut stderr = child.stderr.take().expect("a pipe");
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = stderr.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let mut stdout = String::new();
    let pipe = child.stdout.as_mut().expect("a pipe");
    let _ = pipe.read_to_string(&mut stdout);
    let status = child.wait().expect("a child");
    let errors = errors.join().expect("a thread");
    let told = stdout
        .lines()
        .last()
        .and_then(|line| serde_json::from_str(line).ok());
    if let (true, Some(inputs)) = (status.success(), told) {
        return (inputs, None);
    }
    let (count, bytes) = Notes::read(note);
    let first: Vec<&str> = errors.lines().take(6).collect();
    let how = match (status.code(), status.signal()) {
        (Some(TOO_SLOW), _) => "too slow".to_owned(),
        (Some(code), _) => format!("exit code {code}"),
        (_, signal) => format!("signal {}", signal.unwrap_or(0)),
    };
    let inputs = Inputs {
        count,
        ..Inputs::default()
    };
    let what = format!("{how}: {}", first.join(" / "));
    (inputs, Some(Crash { what, bytes }))
}

/// Feeds a target for some time; a crash ends only one process. `feed` makes the command. Crashing inputs are saved in
/// `crashes`, and returned with their effects.
pub fn run(
    target: &Target,
    seed: u64,
    until: Until,
    crashes: &Path,
    feed: impl Fn(&FuzzInput) -> Command,
) -> (Inputs, Vec<String>) {
    let folder = super::folder();
    let mut meal = FuzzInput {
        seed,
        until,
        known: Vec::new(),
        note: folder.path().join("note"),
    };
    let (mut all, mut violations, began) = (Inputs::default(), Vec::new(), Instant::now());
    for _ in 0..MOST_CRASHES {
        meal.until = match until {
            Until::Inputs(most) => Until::Inputs(most.saturating_sub(all.count)),
            Until::Time(most) => Until::Time(most.saturating_sub(began.elapsed())),
        };
        let (inputs, crash) = watch_over(&mut feed(&meal), &meal.note);
        all.count += inputs.count;
        all.outcomes = all.outcomes.max(inputs.outcomes);
        all.slowest = all.slowest.max(inputs.slowest);
        all.peak_kib = all.peak_kib.max(inputs.peak_kib);
        let Some(crash) = crash else { break };
        let path = keep(crashes, target.name, &crash.bytes);
        violations.push(format!(
            "{}: {}: {}",
            target.name,
            path.display(),
            crash.what
        ));
        meal.known.push(name_of(&crash.bytes));
        meal.seed += 1;
        let over = match until {
            Until::Inputs(most) => all.count >= most,
            Until::Time(most) => began.elapsed() >= most,
        };
        if over {
            break;
        }
    }
    (all, violations)
}

/// A number that identifies an input.
fn name_of(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

fn keep(folder: &Path, target: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(format!("{target}-{:016x}", name_of(bytes)));
    fs::create_dir_all(folder).expect("a folder for what crashed");
    fs::write(&path, bytes).expect("a file for what crashed");
    path
}

/// The current input and its count, for the parent if this process dies.
struct Notes {
    file: File,
    count: AtomicU64,
}

impl Notes {
    /// Records the input, then tries it.
    fn try_one(&self, target: &Target, bytes: &[u8]) -> String {
        let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        let mut note = Vec::with_capacity(16 + bytes.len());
        note.extend(count.to_le_bytes());
        note.extend((bytes.len() as u64).to_le_bytes());
        note.extend(bytes);
        self.file.write_all_at(&note, 0).expect("a note");
        (target.exercise)(bytes)
    }

    fn read(path: &Path) -> (u64, Vec<u8>) {
        let note = fs::read(path).unwrap_or_default();
        let number = |at: usize| {
            let bytes = note.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_le_bytes)
        };
        let bytes = note.get(16..).unwrap_or_default();
        let length = (number(8) as usize).min(bytes.len());
        (number(0), bytes[..length].to_vec())
    }
}

/// Any panic ends the process, in any thread, even if it would be caught.
fn end_with_any_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
}

/// Allows this process this much more address space.
fn limit_memory() {
    let most = (own("status", "VmSize:").expect("Linux") + MEMORY_KIB) << 10;
    let limit = libc::rlimit {
        rlim_cur: most,
        rlim_max: most,
    };
    // SAFETY: a plain system call that reads a structure of ours.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) };
    assert_eq!(result, 0, "a limit of memory");
}

/// Ends the process when one input takes too much time.
fn watch(notes: Arc<Notes>) {
    std::thread::spawn(move || {
        let (mut at, mut used, mut since) = (0, cpu_seconds(), Instant::now());
        loop {
            std::thread::sleep(Duration::from_millis(100));
            let now = notes.count.load(Ordering::Relaxed);
            if now != at {
                (at, used, since) = (now, cpu_seconds(), Instant::now());
            } else if cpu_seconds() - used > CPU_SECONDS || since.elapsed() > PATIENCE {
                std::process::exit(TOO_SLOW);
            }
        }
    });
}

/// This process's processor time, in Linux's hundredths of a second.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").expect("Linux");
    let fields = stat.rsplit_once(')').expect("a name in brackets").1;
    let ticks = fields.split_whitespace().skip(11).take(2);
    ticks
        .map(|ticks| ticks.parse::<f64>().expect("a number"))
        .sum::<f64>()
        / 100.0
}

/// A figure of this process, in KiB.
fn own(file: &str, figure: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/self/{file}")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(figure))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

/// A message without its numbers, shortened.
fn shape_of(outcome: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    for byte in outcome
        .bytes()
        .take(400)
        .filter(|byte| !byte.is_ascii_digit())
    {
        hasher.write_u8(byte);
    }
    hasher.finish()
}
