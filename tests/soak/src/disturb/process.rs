//! Processes: started, found, signalled, waited for.

use std::collections::BTreeSet;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A process of the binary; killed when dropped early.
pub struct Runner {
    child: Child,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
    gone: bool,
}

/// How it ended, and its output.
#[derive(Debug)]
pub struct Ended {
    /// Exit code.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Ended {
    /// Whether it reported a panic.
    pub fn panicked(&self) -> bool {
        self.stderr.contains("panicked at") || self.code == Some(101)
    }

    /// Its end and its last output.
    pub fn told(&self) -> String {
        let mut last: Vec<&str> = self.stderr.lines().rev().take(12).collect();
        last.reverse();
        format!(
            "code {:?}, signal {:?}: {}",
            self.code,
            self.signal,
            last.join(" / ")
        )
    }
}

impl Runner {
    /// Starts it.
    pub fn start(mut command: Command) -> Self {
        let mut child = command.spawn().expect("the binary");
        let read = |mut pipe: Box<dyn std::io::Read + Send>| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                let _ = pipe.read_to_end(&mut bytes);
                String::from_utf8_lossy(&bytes).into_owned()
            })
        };
        let stdout = read(Box::new(child.stdout.take().expect("a pipe")));
        let stderr = read(Box::new(child.stderr.take().expect("a pipe")));
        Self {
            child,
            stdout: Some(stdout),
            stderr: Some(stderr),
            gone: false,
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it is still running. As long as it is, its process id is not reused.
    pub fn lives(&mut self) -> bool {
        self.gone = self.gone || !matches!(self.child.try_wait(), Ok(None));
        !self.gone
    }

    /// Waits for its end, and kills it after too long.
    pub fn end(mut self, patience: Duration) -> Ended {
        let until = Instant::now() + patience;
        while self.lives() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        if self.lives() {
            let _ = self.child.kill();
        }
        let status = self.child.wait().expect("a child");
        self.gone = true;
        let text = |reader: Option<JoinHandle<String>>| {
            reader
                .and_then(|reader| reader.join().ok())
                .unwrap_or_default()
        };
        Ended {
            code: status.code(),
            signal: status.signal(),
            stdout: text(self.stdout.take()),
            stderr: text(self.stderr.take()),
        }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        if !self.gone {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Sends a signal. Returns whether the process existed.
pub fn kill(pid: u32, signal: i32) -> bool {
    // SAFETY: a plain system call. The process is a child of this one, or a child's child.
    unsafe { libc::kill(pid.cast_signed(), signal) == 0 }
}

/// Children of a process, by their ids, that have not ended.
pub fn children(of: u32) -> BTreeSet<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return BTreeSet::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid| matches!(state(pid), Some((parent, state)) if parent == of && state != 'Z'))
        .collect()
}

/// Parent and state of a process.
pub fn state(pid: u32) -> Option<(u32, char)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((fields.next()?.parse().ok()?, state))
}

/// A soak in the background has Ctrl-C and hang-ups ignored, and retort would respect that.
pub fn default_signals(command: &mut Command) {
    // SAFETY: between fork and exec only an async-signal-safe function is called.
    unsafe {
        command.pre_exec(|| {
            for signal in [libc::SIGINT, libc::SIGHUP, libc::SIGTERM] {
                libc::signal(signal, libc::SIG_DFL);
            }
            Ok(())
        });
    }
}

/// Compiles the soak's plugin.
pub fn compile(to: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(std::env::var_os("CC").unwrap_or("cc".into()))
        .args([
            "-std=gnu11",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-O1",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            "-I",
        ])
        .arg(root.join("../../plugins/abi"))
        .arg(root.join("plugin.c"))
        .arg("-o")
        .arg(to)
        .output()
        .expect("a C compiler (`cc`)");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
