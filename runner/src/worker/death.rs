//! Why a worker's process ended without an answer, as precisely as can be known.
//!
//! In: how the process ended, and its last output. Out: a short reason, which the history keeps and users
//! search for, with a sentence and a hint. Deliberately absent: ends that the runner brought about (the executor's).

use serde::{Deserialize, Serialize};

/// With a code or by a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It called `exit`, or returned from `main`.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
}

/// An unrequested end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnexpectedExit {
    /// With a code or by a signal.
    pub status: ExitStatus,
    /// The known cause.
    pub cause: ExitCause,
}

/// Why a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCause {
    /// Unknown.
    Unknown,
    /// The kernel ran out of memory at that time.
    KernelMemory,
    /// The plugin could not get memory.
    Memory,
    /// A C++ exception left one of the plugin's functions, or one of its threads.
    Exception,
    /// A Rust panic reached a place that cannot be unwound.
    Panic,
    /// The plugin passed text of an absurd length.
    Length,
}

/// Messages of aborting code, in the order of search: of the allocators of Rust and C++ and of plugins' authors; of
/// [`retort_abi`]; of the C++ library, and of Rust and the C library at an exception; of Rust at a panic.
const LAST_WORDS: [(&str, ExitCause); 8] = [
    ("memory allocation of ", ExitCause::Memory),
    ("bad_alloc", ExitCause::Memory),
    ("out of memory", ExitCause::Memory),
    ("crossed the plugin boundary", ExitCause::Length),
    ("terminate called", ExitCause::Exception),
    ("foreign exception", ExitCause::Exception),
    ("exception not rethrown", ExitCause::Exception),
    ("non-unwinding panic", ExitCause::Panic),
];

impl UnexpectedExit {
    /// `status`: how the process ended. `last_words`: the last lines that it wrote. `out_of_memory`: whether the kernel killed
    /// some process at that time because memory ran out.
    pub fn new<'a>(
        status: ExitStatus,
        last_words: impl Iterator<Item = &'a str> + Clone,
        out_of_memory: bool,
    ) -> Self {
        let said = |words: &str| last_words.clone().any(|line| line.contains(words));
        let cause = match status {
            ExitStatus::Signal(libc::SIGKILL) if out_of_memory => ExitCause::KernelMemory,
            ExitStatus::Signal(libc::SIGABRT) => {
                let known = LAST_WORDS.iter().find(|(words, _)| said(words));
                known.map_or(ExitCause::Unknown, |(_, cause)| *cause)
            }
            _ => ExitCause::Unknown,
        };
        Self { status, cause }
    }

    /// The precise reason: short, and stable for searches.
    pub fn reason(self) -> String {
        let signal = match self.status {
            ExitStatus::Code(code) => return format!("exited with code {code}"),
            ExitStatus::Signal(signal) => signal_name(signal),
        };
        let cause = match self.cause {
            ExitCause::Unknown => "",
            ExitCause::KernelMemory | ExitCause::Memory => " (out of memory)",
            ExitCause::Exception => " (exception)",
            ExitCause::Panic => " (panic)",
            ExitCause::Length => " (absurd length)",
        };
        format!("killed by {signal}{cause}")
    }

    /// What happened, for people.
    pub fn message(self) -> &'static str {
        match (self.cause, self.status) {
            (ExitCause::KernelMemory, _) => "the kernel ran out of memory at that time",
            (ExitCause::Memory, _) => "the plugin could not get the memory it asked for",
            (ExitCause::Exception, _) => {
                "an exception left a function or a thread of the plugin, which must catch all of its own"
            }
            (ExitCause::Panic, _) => {
                "a panic reached a place that cannot unwind, such as a function for C"
            }
            (ExitCause::Length, _) => "the plugin passed text of an absurd length",
            (ExitCause::Unknown, ExitStatus::Code(_)) => {
                "the plugin, or a library it uses, left (exit) without a result"
            }
            (ExitCause::Unknown, ExitStatus::Signal(signal)) => match signal {
                libc::SIGSEGV | libc::SIGBUS => "the plugin accessed memory that is not its own",
                libc::SIGABRT => "the plugin, or a library it uses, gave up (abort)",
                libc::SIGILL => "an instruction that this processor does not have, or a trap",
                libc::SIGFPE => "an arithmetic error, such as an integer division by zero",
                libc::SIGKILL => "somebody killed the worker; the kernel does when memory runs out",
                _ => "the runner did not send that signal",
            },
        }
    }

    /// What to do.
    pub fn hint(self) -> Option<&'static str> {
        match self.cause {
            ExitCause::KernelMemory | ExitCause::Memory => {
                Some("make batches or models smaller, or free memory")
            }
            _ => None,
        }
    }
}

/// `SIGSEGV`, `signal 64`.
pub fn signal_name(signal: i32) -> String {
    let name = match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGILL => "SIGILL",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGUSR1 => "SIGUSR1",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGUSR2 => "SIGUSR2",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGALRM => "SIGALRM",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGXFSZ => "SIGXFSZ",
        libc::SIGSYS => "SIGSYS",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

/// How often the kernel has killed a process because memory ran out, since it booted; 0 if unknown.
pub fn out_of_memory_kills() -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(signal: i32, line: &str, reason: &str) {
        let lines = ["first", line, "and more"];
        let death = UnexpectedExit::new(ExitStatus::Signal(signal), lines.into_iter(), false);
        assert_eq!(death.reason(), reason);
    }

    #[test]
    fn last_words_say_why() {
        for (line, reason) in [
            ("memory allocation of 80 bytes failed", "out of memory"),
            (
                "terminate called after throwing an instance of 'std::bad_alloc'",
                "out of memory",
            ),
            (
                "terminate called after throwing an instance of 'std::runtime_error'",
                "exception",
            ),
            (
                "fatal runtime error: Rust cannot catch foreign exceptions, aborting",
                "exception",
            ),
            ("thread caused non-unwinding panic. aborting.", "panic"),
        ] {
            check(
                libc::SIGABRT,
                line,
                &format!("killed by SIGABRT ({reason})"),
            );
        }
        check(libc::SIGABRT, "Assertion `x' failed.", "killed by SIGABRT");
        // After other signals the output is not evidence.
        check(libc::SIGSEGV, "out of memory", "killed by SIGSEGV");
    }

    #[test]
    fn the_kernel_s_want_of_memory_is_told() {
        for (signal, reason) in [
            (libc::SIGKILL, "killed by SIGKILL (out of memory)"),
            (libc::SIGSEGV, "killed by SIGSEGV"),
        ] {
            let death = UnexpectedExit::new(ExitStatus::Signal(signal), std::iter::empty(), true);
            assert_eq!(death.reason(), reason);
        }
    }
}
