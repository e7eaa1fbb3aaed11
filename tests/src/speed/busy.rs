//! How much slower a step becomes when another process takes one of two processors.
//!
//! One training runs with the other process stopped and going by turns, so that what else happens on the machine meets both
//! alike; the shortest steps of each are compared. With two threads and one competitor on two processors, two thirds of the
//! machine remain: a step that divides its work evenly and waits for the slower half takes twice as long.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use retort_engine::backend::Backend;
use retort_engine::error::{Error, Result};

use super::stage_clock::{StageClock, shortest, steps};
use super::stage_row;
use crate::skip::leave_out;

/// Steps between two changes; the first after a change is not counted.
const GROUP: usize = 4;
/// Groups of each kind.
const ROUNDS: usize = 3;
/// The most that a step may slow down.
const MOST: f64 = 2.2;
/// The measured rows: convolutions, and a transformer.
const ROWS: [&str; 2] = ["tokenizer 32 x 32", "emoji, batch 32: student"];

/// Fails if a step of the backend slows down by more than a process's share of two processors. `open` gets the number of
/// threads.
///
/// # Panics
/// It does, or something could not be measured.
pub fn check<B: Backend>(open: impl FnOnce(usize) -> Result<B>) {
    let Some(two) = two_processors() else {
        leave_out("a busy processor beside a free one: this process may use only one");
        return;
    };
    // Before the backend starts threads, which inherit it.
    stay_on(0, &two);
    let backend = open(2).expect("a CPU");
    for row in stage_row::all().expect("rows") {
        if ROWS.iter().any(|name| row.title.contains(name)) {
            let files = row.files().expect("files");
            let hog = Hog::start(two[0]).expect("a process");
            let [quiet, busy] = shortest_steps(&backend, &files, &hog).expect("steps");
            eprintln!(
                "{}: {quiet:.3} s, {busy:.3} s beside a busy process",
                row.title
            );
            assert!(
                busy <= MOST * quiet,
                "{}: a step takes {:.1} times as long beside a busy process, expected at most {MOST}",
                row.title,
                busy / quiet
            );
        }
    }
}

/// Seconds of the shortest step with the other process stopped, and with it going.
fn shortest_steps<B: Backend>(
    backend: &B,
    files: &stage_row::RowFiles,
    hog: &Hog,
) -> Result<[f64; 2]> {
    let goes = |step: usize| (step / GROUP) % 2 == 1;
    let between = |step: usize| {
        hog.send(if goes(step) {
            libc::SIGCONT
        } else {
            libc::SIGSTOP
        })
    };
    let suffices = |seconds: &[f64]| seconds.len() >= 2 * GROUP * ROUNDS;
    let clock = StageClock::new(files.dir.path(), &between, &suffices);
    let seconds = steps(backend, &files.job, &clock)?;
    // The first of them followed the first step.
    let of = |busy: bool| {
        let all = seconds.iter().enumerate().map(|(i, x)| (i + 1, *x));
        let own = all.filter(|(step, _)| goes(*step) == busy && step % GROUP != 0);
        shortest(&own.map(|(_, x)| x).collect::<Vec<_>>())
    };
    Ok([of(false), of(true)])
}

/// A process that computes all the time; ends with this one.
struct Hog(Child);

impl Hog {
    /// Starts it on a processor, stopped.
    fn start(processor: usize) -> Result<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        // SAFETY: between fork and exec only a system call is made, which neither allocates nor locks.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
                Ok(())
            });
        }
        let hog = Self(command.spawn().map_err(Error::io("sh"))?);
        stay_on(hog.process(), &[processor]);
        hog.send(libc::SIGSTOP);
        Ok(hog)
    }

    fn process(&self) -> libc::pid_t {
        self.0.id().try_into().expect("a process")
    }

    fn send(&self, signal: libc::c_int) {
        // SAFETY: a system call without pointers; the child is not waited for before this is dropped, so its number is its own.
        unsafe { libc::kill(self.process(), signal) };
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Two processors that this thread may use.
fn two_processors() -> Option<[usize; 2]> {
    // SAFETY: all zeros is an empty set; the call fills it, and its size is given.
    let allowed = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let failed = libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set);
        assert_eq!(failed, 0, "the processors of this thread");
        set
    };
    let is_allowed = |n: &usize| {
        // SAFETY: the number is below the size of the set.
        unsafe { libc::CPU_ISSET(*n, &allowed) }
    };
    let mut all = (0..libc::CPU_SETSIZE as usize).filter(is_allowed);
    Some([all.next()?, all.next()?])
}

/// Keeps a process, or with 0 this thread and those that it starts, on these processors.
fn stay_on(process: libc::pid_t, processors: &[usize]) {
    // SAFETY: all zeros is an empty set; the numbers come from one of the same size.
    let failed = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        processors.iter().for_each(|&n| libc::CPU_SET(n, &mut set));
        libc::sched_setaffinity(process, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    assert_eq!(failed, 0, "the processors {processors:?}");
}
