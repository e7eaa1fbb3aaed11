//! A directory with a recipe, a store and the fixture plugins, and the binary to run on them.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use retort::store::{Access, AttemptDetail, RunDetail, RunFilter, RunId, Store};
use retort_tests::patience;
use retort_tests::process::ProcessStat;
use serde_json::Value;
use tempfile::TempDir;

/// How long to wait for something that must happen, on a machine that may be very busy.
const PATIENCE: Duration = Duration::from_secs(300);

pub struct Lab {
    pub dir: TempDir,
}

/// A command's output and exit.
pub struct CommandOutput {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl CommandOutput {
    /// Expects an exit code, and shows all output otherwise.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(
            self.code,
            Some(code),
            "stdout:\n{}\nstderr:\n{}",
            self.stdout,
            self.stderr
        );
        assert!(!self.stderr.contains("panicked at"), "{}", self.stderr);
        self
    }

    /// Expects all of these on stderr.
    #[track_caller]
    pub fn saying(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(
                self.stderr.contains(text),
                "`{text}` is missing in:\n{}",
                self.stderr
            );
        }
        self
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error} in:\n{}", self.stdout))
    }
}

impl Lab {
    /// A lab whose recipe has these stages (YAML, one per line, without indentation).
    pub fn new(stages: &[&str]) -> Self {
        let lab = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        lab.recipe(stages);
        lab
    }

    pub fn recipe(&self, stages: &[&str]) {
        let mut text = String::from("version: 1\nbackend: faulty\nstages:\n");
        for stage in stages {
            text.push_str(&format!("  {stage}\n"));
        }
        std::fs::write(self.dir.path().join("r.yaml"), text).unwrap();
    }

    pub fn store_dir(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// The binary with these arguments, in the lab's directory, with the lab's store and plugins.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command
            .args(arguments)
            .arg("--store")
            .arg(self.store_dir())
            .arg("--plugin-dir")
            .arg(plugins())
            .current_dir(self.dir.path())
            .env_remove("RETORT_PLUGIN_PATH")
            .env_remove("XDG_DATA_HOME")
            .env_remove("RUST_LOG")
            .env("HOME", self.dir.path())
            .stdin(Stdio::null());
        // SAFETY: between fork and exec only an async-signal-safe function is called.
        unsafe {
            // Tests in the background have Ctrl-C and hang-ups ignored, and retort would respect that.
            command.pre_exec(|| {
                libc::signal(libc::SIGINT, libc::SIG_DFL);
                libc::signal(libc::SIGHUP, libc::SIG_DFL);
                Ok(())
            });
        }
        command
    }

    /// Claims the store as the runner of another machine would. Returns the file of the claim.
    pub fn claim_elsewhere(&self) -> PathBuf {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let claim = serde_json::json!({
            "host": "login2", "boot": "another", "pid": 4711, "at": now.as_millis() as u64, "free": false,
        });
        let hosts = self.store_dir().join("hosts");
        std::fs::create_dir_all(&hosts).unwrap();
        let file = hosts.join("100");
        std::fs::write(&file, claim.to_string()).unwrap();
        file
    }

    /// Lets waiting stages end: those with `act: wait, flag: released`.
    pub fn release(&self) {
        std::fs::write(self.dir.path().join("released"), "").unwrap();
    }

    /// Runs the binary to its end.
    pub fn retort(&self, arguments: &[&str]) -> CommandOutput {
        let output = self.command(arguments).output().unwrap();
        CommandOutput {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs the recipe, with further arguments, to its end.
    pub fn run(&self, arguments: &[&str]) -> CommandOutput {
        self.retort(&[&["run", "r.yaml"], arguments].concat())
    }

    /// Starts to run the recipe.
    pub fn start(&self, arguments: &[&str]) -> Running {
        let command = &mut self.command(&[&["run", "r.yaml"], arguments].concat());
        Running::new(
            command
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        )
    }

    /// The outcomes of the stages of a run with `--json`, in order.
    #[track_caller]
    pub fn outcomes(&self, arguments: &[&str]) -> Vec<String> {
        let said = self.run(&[&["--json"], arguments].concat());
        let stages = said.json()["stages"].as_array().unwrap().clone();
        stages
            .iter()
            .map(|stage| {
                format!(
                    "{} {}",
                    stage["name"].as_str().unwrap(),
                    stage["outcome"].as_str().unwrap()
                )
            })
            .collect()
    }

    /// All data about the newest run; None if there is no run.
    pub fn latest(&self) -> Option<RunDetail> {
        block_on(async {
            let store = Store::open(&self.store_dir(), Access::ReadOnly)
                .await
                .ok()?;
            let filter = RunFilter {
                limit: Some(1),
                ..RunFilter::default()
            };
            let run = store.list_runs(&filter).await.unwrap().pop()?;
            let detail = store.run_detail(&run.id).await.unwrap();
            store.close().await;
            Some(detail)
        })
    }

    /// The only attempt of a stage in the newest run.
    #[track_caller]
    pub fn attempt(&self, stage: &str) -> AttemptDetail {
        let detail = self.latest().expect("a run");
        let stage = detail
            .stages
            .iter()
            .find(|known| known.name == stage)
            .expect("the stage");
        let [attempt] = stage.attempts.as_slice() else {
            panic!("{} attempts", stage.attempts.len())
        };
        attempt.clone()
    }

    /// Waits until a stage of the newest run is running. Returns the worker's process id.
    pub fn wait_for_worker(&self, stage: &str) -> u32 {
        wait_for("the worker", || {
            let detail = self.latest()?;
            let stage = detail.stages.iter().find(|known| known.name == stage)?;
            stage.attempts.first().map(|attempt| attempt.worker_pid)
        })
    }

    /// Waits until the newest run differs from this one, and has all its stages. Returns its id.
    pub fn wait_for_run_after(&self, earlier: &RunId) -> RunId {
        wait_for("another run", || {
            let run = self.latest()?;
            (run.summary.id != *earlier && !run.stages.is_empty()).then_some(run.summary.id)
        })
    }

    /// The names of the entries of a directory in the store; empty if it does not exist.
    pub fn entries(&self, dir: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.store_dir().join(dir)) else {
            return Vec::new();
        };
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

/// A running runner; killed if the test ends early.
pub struct Running {
    pub child: Child,
    /// Its output so far, as far as it was awaited.
    heard: String,
}

impl Running {
    pub fn new(child: Child) -> Self {
        Self {
            child,
            heard: String::new(),
        }
    }

    pub fn signal(&self, signal: i32) {
        signal_process(self.child.id(), signal);
    }

    /// Waits until it prints this to stderr.
    #[track_caller]
    pub fn wait_for_words(&mut self, words: &str) {
        let stderr = self.child.stderr.as_mut().unwrap();
        let mut bytes = [0; 4096];
        while !self.heard.contains(words) {
            let count = stderr.read(&mut bytes).unwrap();
            assert!(count > 0, "it ended without saying {words}: {}", self.heard);
            self.heard += &String::from_utf8_lossy(&bytes[..count]);
        }
    }

    pub fn end(mut self) -> CommandOutput {
        let (mut stdout, mut stderr) = (
            self.child.stdout.take().unwrap(),
            self.child.stderr.take().unwrap(),
        );
        let errors = std::thread::spawn(move || std::io::read_to_string(&mut stderr).unwrap());
        let stdout = std::io::read_to_string(&mut stdout).unwrap();
        CommandOutput {
            code: self.child.wait().unwrap().code(),
            stdout,
            stderr: std::mem::take(&mut self.heard) + &errors.join().unwrap(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a process to end. Returns its exit code and its usage. Linux includes in the peak the memory that this process had
/// when it started the other, so the figure is never too small.
pub fn ended(child: Child) -> (Option<i32>, libc::rusage) {
    let id = libc::pid_t::try_from(child.id()).unwrap();
    // SAFETY: the child is ours and nobody else waits for it; the structures are filled by the call.
    let (status, usage) = unsafe {
        let (mut status, mut usage) = (0, std::mem::zeroed::<libc::rusage>());
        assert_eq!(libc::wait4(id, &mut status, 0, &mut usage), id);
        (status, usage)
    };
    let code = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
    (code, usage)
}

/// Polls until there is a value; the test fails if it takes absurdly long. Pauses grow with what a look costs, because the
/// machine also has to do what is awaited.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        let began = Instant::now();
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "{what} did not come");
        let pause = 2 * began.elapsed();
        std::thread::sleep(pause.clamp(Duration::from_millis(20), Duration::from_secs(1)));
    }
}

/// Waits until a process is gone (or a zombie).
pub fn wait_until_gone(pid: u32) {
    wait_for("the end of a process", || {
        let state = ProcessStat::of(pid).map(|stat| stat.state);
        matches!(state, None | Some('Z' | 'X')).then_some(())
    });
}

#[track_caller]
pub fn signal_process(pid: u32, signal: i32) {
    assert!(try_signal(pid, signal), "there is no process {pid}");
}

/// The same for a process that may be gone by then. Returns whether it existed.
pub fn try_signal(pid: u32, signal: i32) -> bool {
    let pid = libc::pid_t::try_from(pid).unwrap();
    // SAFETY: a plain system call.
    unsafe { libc::kill(pid, signal) == 0 }
}

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// The binary, in a directory where it finds only the candle plugin: other builds here must not affect the tests.
pub fn binary() -> PathBuf {
    // The long tests wait longer.
    if !std::env::args().any(|argument| argument == "--ignored") {
        patience::limit_children();
    }
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(install).clone()
}

fn install() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let built = test.parent().and_then(Path::parent).unwrap();
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("installed");
    std::fs::create_dir_all(&dir).unwrap();
    for name in ["retort", "libretort_candle.so"] {
        let file = built.join(name);
        assert!(
            file.exists(),
            "{} is not built: `make test` builds it",
            file.display()
        );
        // Another process of these tests may be using it, so it is replaced atomically.
        let fresh = dir.join(format!("fresh-{name}-{}", std::process::id()));
        // An earlier process with this id may have been killed before its end.
        let _ = std::fs::remove_file(&fresh);
        std::fs::hard_link(&file, &fresh).unwrap();
        std::fs::rename(&fresh, dir.join(name)).unwrap();
        // If both are links to one file, nothing was renamed.
        let _ = std::fs::remove_file(&fresh);
    }
    dir.join("retort")
}

/// The directory of the fixture plugin, which is compiled once.
pub fn plugins() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("plugins");
        std::fs::create_dir_all(&dir).unwrap();
        // Another process of these tests may be using it, so it is replaced atomically.
        let fresh = dir.join(format!("fresh-{}", std::process::id()));
        compile("faulty.c", &[], &fresh);
        std::fs::rename(fresh, dir.join("libretort_faulty.so")).unwrap();
        dir
    })
}

/// Compiles a fixture into a shared object.
pub fn compile(fixture: &str, flags: &[&str], output: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (variable, compiler, standard) = match fixture.ends_with(".cpp") {
        true => ("CXX", "c++", "-std=c++17"),
        false => ("CC", "cc", "-std=gnu11"),
    };
    let result = Command::new(std::env::var(variable).unwrap_or(compiler.into()))
        .args([
            standard,
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            "-pthread",
        ])
        .args(flags)
        .arg("-I")
        .arg(root.join("../plugins/abi"))
        .arg(root.join("tests/fixtures").join(fixture))
        .arg("-o")
        .arg(output)
        .arg("-lm")
        .output()
        .expect("these tests need a C and a C++ compiler (`cc`, `c++`)");
    assert!(
        result.status.success(),
        "{}",
        String::from_utf8_lossy(&result.stderr)
    );
}

pub fn fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}
