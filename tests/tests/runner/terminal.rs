//! Effects of terminals and shells on a run: they close, suspend it, stop reading, and set limits.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use retort::store::{AttemptDetail, AttemptState, RunState};
use retort_tests::process::ProcessStat;

use crate::lab::{CommandOutput, Lab, Running, binary, plugins, wait_for, wait_until_gone};

const INTERRUPT: i32 = libc::SIGINT;

/// A terminal: its screen, and its program's side.
pub fn terminal() -> (OwnedFd, OwnedFd) {
    let (mut screen, mut inside) = (0, 0);
    let none = std::ptr::null_mut();
    // SAFETY: the call fills the two numbers; the descriptors are new and nobody else's.
    unsafe {
        let made = libc::openpty(&mut screen, &mut inside, none, none.cast(), none.cast());
        assert_eq!(made, 0);
        // Programs that other tests start meanwhile must not keep the terminal open.
        for end in [screen, inside] {
            libc::fcntl(end, libc::F_SETFD, libc::FD_CLOEXEC);
        }
        (OwnedFd::from_raw_fd(screen), OwnedFd::from_raw_fd(inside))
    }
}

/// Runs a command on a separate terminal, with its screen.
pub fn on_a_terminal(mut command: Command) -> (Running, OwnedFd) {
    let (screen, inside) = terminal();
    let end = || Stdio::from(inside.try_clone().unwrap());
    command.stdin(end()).stdout(end()).stderr(end());
    // SAFETY: between fork and exec only async-signal-safe functions are called.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            libc::ioctl(0, libc::TIOCSCTTY, 0);
            libc::signal(libc::SIGHUP, libc::SIG_DFL);
            Ok(())
        });
    }
    let child = command.spawn().unwrap();
    (Running::new(child), screen)
}

/// Runs the recipe on a separate terminal.
fn run_on_a_terminal(lab: &Lab, arguments: &[&str]) -> (Running, OwnedFd) {
    on_a_terminal(lab.command(&[&["run", "r.yaml"], arguments].concat()))
}

/// An interactive terminal. It is read all the time, so that no program blocks on it.
pub struct Screen {
    keyboard: File,
    shown: Arc<Mutex<String>>,
    /// How much of the output has been awaited.
    read: usize,
}

impl Screen {
    pub fn new(screen: OwnedFd) -> Self {
        let keyboard = File::from(screen);
        let mut screen = keyboard.try_clone().unwrap();
        let shown = Arc::new(Mutex::new(String::new()));
        let reader = Arc::clone(&shown);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                *reader.lock().unwrap() += &String::from_utf8_lossy(&bytes[..count]);
            }
        });
        Self {
            keyboard,
            shown,
            read: 0,
        }
    }

    pub fn type_keys(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until it shows these words after the last awaited ones.
    #[track_caller]
    pub fn wait_for(&mut self, words: &str) {
        let (read, shown) = (self.read, Arc::clone(&self.shown));
        self.read = wait_for(words, || {
            let found = shown.lock().unwrap()[read..].find(words)?;
            Some(read + found + words.len())
        });
    }
}

#[test]
fn a_closed_terminal_interrupts_the_run_at_a_checkpoint() {
    for (stage, arguments) in [
        (
            "a: {kind: do, act: wait, flag: released, text: long}",
            &["-v"] as &[&str],
        ),
        (
            "a: {kind: do, act: wait, flag: released, text: long}",
            &["--quiet"],
        ),
        (
            "a: {kind: do, act: talk_on, text: long}",
            &["-vv", "--grace", "500ms"],
        ),
    ] {
        let lab = Lab::new(&[stage, "b: {kind: do, input: a}"]);
        let (mut running, screen) = run_on_a_terminal(&lab, arguments);
        let worker = lab.wait_for_worker("a");
        // Nobody holds the screen open: neither a reader nor this test.
        drop(screen);
        let status = running.child.wait().unwrap();
        assert_eq!(status.code(), Some(129), "{stage} {arguments:?}: {status}");
        wait_until_gone(worker);
        let run = lab.latest().unwrap();
        assert_eq!(run.summary.state, RunState::Interrupted);
        assert_eq!(lab.attempt("a").state, AttemptState::Interrupted);
        assert_eq!(lab.entries("staging"), [""; 0]);
        if stage.contains("wait") {
            assert!(lab.entries("work").len() > 1, "a checkpoint is there");
        }
    }
}

#[test]
fn a_hang_up_told_twice_is_one() {
    // It never stops by itself: a second Ctrl-C would kill it, but a second hang-up still allows the grace.
    let lab = Lab::new(&["a: {kind: do, act: hang}"]);
    let mut running = lab.start(&["--grace", "3s"]);
    lab.wait_for_worker("a");
    running.signal(libc::SIGHUP);
    // Signals of one kind that arrive together count as one.
    running.wait_for_words("press Ctrl-C again");
    running.signal(libc::SIGHUP);
    running
        .end()
        .expect(129)
        .saying(&["was ended with SIGTERM"]);
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Interrupted);
}

#[test]
fn a_run_that_ignores_hang_up_goes_on_without_a_terminal() {
    let lab = Lab::new(&[
        "a: {kind: do, act: wait, flag: released}",
        "b: {kind: do, input: a}",
    ]);
    let (screen, inside) = terminal();
    let screen = Screen::new(screen);
    let mut command = lab.command(&["run", "r.yaml", "-vv"]);
    let end = || Stdio::from(inside.try_clone().unwrap());
    command.stdin(end()).stdout(end()).stderr(end());
    // SAFETY: between fork and exec only async-signal-safe functions are called.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            libc::ioctl(0, libc::TIOCSCTTY, 0);
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            Ok(())
        });
    }
    let mut running = Running::new(command.spawn().unwrap());
    drop((command, inside));
    lab.wait_for_worker("a");
    // The reader's copy keeps the screen open, so the test sends the hang-up that a shell would send.
    running.signal(libc::SIGHUP);
    drop(screen);
    lab.release();
    let status = running.child.wait().unwrap();
    assert_eq!(
        lab.latest().unwrap().summary.state,
        RunState::Succeeded,
        "{status}"
    );
}

/// The state of a process, as the kernel's letter.
fn state(pid: u32) -> Option<char> {
    ProcessStat::of(pid).map(|stat| stat.state)
}

fn wait_for_state(pid: u32, wanted: &str) {
    wait_for("a state", || wanted.contains(state(pid)?).then_some(()));
}

/// Runs a stage with this timeout, and suspends it for longer. Returns the result, the total time and the suspended time;
/// None if the stage ran for longer than the timeout.
fn stopped_for_longer_than(timeout: Duration) -> Option<(Lab, AttemptDetail, Duration, Duration)> {
    let lab = Lab::new(&[&format!(
        "a: {{kind: do, act: wait, flag: released, text: long, timeout: {}s}}",
        timeout.as_secs()
    )]);
    let began = Instant::now();
    let running = lab.start(&[]);
    let worker = lab.wait_for_worker("a");
    running.signal(libc::SIGTSTP);
    // Or it ended before it could be stopped.
    for process in [running.child.id(), worker] {
        wait_for("a process that stands still", || {
            matches!(state(process), None | Some('T' | 'Z' | 'X')).then_some(())
        });
        if state(process) != Some('T') {
            return None;
        }
    }
    let stopped = Instant::now();
    std::thread::sleep(timeout + Duration::from_millis(200));
    assert_eq!(state(worker), Some('T'));
    let paused = stopped.elapsed();
    running.signal(libc::SIGCONT);
    lab.release();
    let said = running.end();
    let all = began.elapsed();
    if all - paused > timeout {
        return None;
    }
    said.expect(0);
    let attempt = lab.attempt("a");
    Some((lab, attempt, all, paused))
}

#[test]
fn a_stopped_run_stands_still_and_goes_on() {
    // If the machine is too busy to start and end within the timeout, a longer one is tried.
    let (lab, attempt, all, paused) = [2, 8, 32]
        .into_iter()
        .find_map(|timeout| stopped_for_longer_than(Duration::from_secs(timeout)))
        .expect("a stage that begins and ends within half a minute");
    assert_eq!(attempt.state, AttemptState::Succeeded);
    let seconds = attempt.seconds.unwrap();
    let (all, paused) = (all.as_secs_f64(), paused.as_secs_f64());
    assert!(seconds + paused < all, "{seconds} and {paused} of {all}");
    let sql = "select seconds from v_attempts";
    let told = lab.retort(&["query", sql, "--json"]).expect(0).json()[0]["seconds"]
        .as_f64()
        .unwrap();
    assert!((told - seconds).abs() < 0.01, "{told} and {seconds}");
}

#[test]
fn a_stopped_run_can_be_interrupted_and_killed() {
    let lab = Lab::new(&["a: {kind: do, act: wait, flag: released, text: long}"]);
    let running = lab.start(&[]);
    let worker = lab.wait_for_worker("a");
    for _ in 0..3 {
        running.signal(libc::SIGTSTP);
        wait_for_state(running.child.id(), "T");
        running.signal(libc::SIGCONT);
        wait_for_state(worker, "SR");
    }
    running.signal(libc::SIGTSTP);
    wait_for_state(worker, "T");
    wait_for_state(running.child.id(), "T");
    running.signal(INTERRUPT);
    running.signal(libc::SIGCONT);
    running
        .end()
        .expect(130)
        .saying(&["stopped at a checkpoint"]);
    let interrupted = lab.latest().unwrap().summary.id;
    let running = lab.start(&[]);
    lab.wait_for_run_after(&interrupted);
    let worker = lab.wait_for_worker("a");
    running.signal(libc::SIGTSTP);
    wait_for_state(running.child.id(), "T");
    running.signal(libc::SIGKILL);
    wait_until_gone(worker);
    drop(running);
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Lost);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let lab = Lab::new(&["a: {kind: do, text: x}", "b: {kind: do, input: a}"]);
    lab.run(&[]).expect(0);
    for arguments in [
        &["plan", "r.yaml", "-v"] as &[&str],
        &["runs", "show", "latest"],
        &["run", "r.yaml"],
        &["log", "latest"],
        &["run", "--help"],
    ] {
        let mut command = lab.command(arguments);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {stderr}");
        assert!(
            !stderr.contains("error") && !stderr.contains("panicked"),
            "{arguments:?}: {stderr}"
        );
    }
}

/// Runs the recipe with a limit on file sizes.
fn with_files_of(lab: &Lab, bytes: u64) -> CommandOutput {
    let mut command = lab.command(&["run", "r.yaml"]);
    // SAFETY: between fork and exec only an async-signal-safe function is called.
    unsafe {
        command.pre_exec(move || {
            let limit = libc::rlimit {
                rlim_cur: bytes,
                rlim_max: bytes,
            };
            libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
            libc::signal(libc::SIGXFSZ, libc::SIG_DFL);
            Ok(())
        });
    }
    let output = command.output().unwrap();
    CommandOutput {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

#[test]
fn a_limit_on_the_size_of_files_is_an_error_with_words() {
    let lab = Lab::new(&["a: {kind: do, act: fill}"]);
    with_files_of(&lab, 4 << 20)
        .expect(100)
        .saying(&["File too large"]);
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Failed);
    // Too little for the history itself, from its first page to its log of a finished run.
    for kibibytes in [8, 20, 32, 40, 64, 100] {
        let lab = Lab::new(&["a: {kind: do}"]);
        let said = with_files_of(&lab, kibibytes << 10).expect(1).saying(&[
            "history.db",
            "`ulimit -f`",
            "`ulimit -f unlimited`",
        ]);
        let limit = format!("is {kibibytes} KiB");
        assert!(said.stderr.contains(&limit), "{kibibytes}: {}", said.stderr);
        // Previous remains do no harm once there is room.
        lab.run(&[]).expect(0);
    }
}

#[test]
fn more_threads_than_any_machine_has_are_refused() {
    for text in ["1000000000", "4097", "18446744073709551615"] {
        let lab = Lab::new(&[&format!("a: {{kind: do, threads: {text}}}")]);
        lab.run(&[]).expect(3).saying(&["threads", "4096"]);
        let lab = Lab::new(&["a: {kind: do}"]);
        let set = format!("threads={text}");
        lab.run(&["--set", &set])
            .expect(3)
            .saying(&["threads", "4096"]);
    }
    Lab::new(&["a: {kind: do, threads: 4096}"])
        .run(&[])
        .expect(0);
}

#[test]
fn a_name_that_is_not_utf8_is_refused_at_once() {
    let lab = Lab::new(&["a: {kind: do}"]);
    let odd = lab.dir.path().join(OsStr::from_bytes(b"caf\xe9"));
    std::fs::create_dir(&odd).unwrap();
    std::fs::copy(lab.dir.path().join("r.yaml"), odd.join("r.yaml")).unwrap();
    let retort = |dir: &std::path::Path, arguments: &[&OsStr]| {
        let mut command = std::process::Command::new(binary());
        command
            .args(arguments)
            .arg("--plugin-dir")
            .arg(plugins())
            .current_dir(dir);
        command.stdin(Stdio::null()).env("HOME", lab.dir.path());
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
        assert!(
            stderr.contains("is not UTF-8") && stderr.contains("caf"),
            "{stderr}"
        );
    };
    let text = OsStr::new;
    for command in ["run", "plan", "validate", "graph"] {
        retort(&odd, &[text(command), text("r.yaml")]);
        let recipe = odd.join("r.yaml");
        retort(lab.dir.path(), &[text(command), recipe.as_os_str()]);
    }
    retort(
        lab.dir.path(),
        &[
            text("run"),
            text("r.yaml"),
            text("--store"),
            odd.as_os_str(),
        ],
    );
    retort(&odd, &[text("runs"), text("list")]);
    assert!(!odd.join(".retort").exists());
}
