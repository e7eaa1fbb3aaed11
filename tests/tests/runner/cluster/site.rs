//! A Slurm with two nodes on this machine, with its own munge, in a separate directory. It ends with the test.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use retort_tests::port::HeldPort;
use tempfile::TempDir;

use crate::lab::{CommandOutput, Lab, Running, wait_for};

const PROGRAMS: [&str; 8] = [
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "squeue",
    "scancel",
    "scontrol",
    "sinfo",
];

pub struct Site {
    dir: TempDir,
    /// The ports of the controller and of both nodes.
    ports: [HeldPort; 3],
}

/// The path of a program: daemons are not always on PATH.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|path| path.exists())
}

impl Site {
    /// Starts it; None, with a loud message, if that is impossible. A node that has been silent for `patience` seconds is down.
    pub fn start(patience: u32) -> Option<Self> {
        let missing: Vec<&str> = PROGRAMS
            .into_iter()
            .filter(|name| program(name).is_none())
            .collect();
        // SAFETY: a plain system call that cannot fail.
        let root = unsafe { libc::geteuid() } == 0;
        let why = match (missing.as_slice(), root) {
            ([], true) => None,
            ([], false) => Some("its daemons have to be started as root".to_owned()),
            (missing, _) => Some(format!(
                "not installed: {} (.ci/packages)",
                missing.join(", ")
            )),
        };
        if let Some(why) = why {
            let text = format!("*** The tests against a real Slurm were SKIPPED: {why}. ***");
            assert!(
                std::env::var_os("RETORT_SKIP_IS_FAILURE").is_none(),
                "{text}"
            );
            eprintln!("{text}");
            return None;
        }
        let dir = tempfile::Builder::new().prefix("slurm").tempdir().unwrap();
        let ports = [(); 3].map(|()| HeldPort::take());
        let site = Self { dir, ports };
        for name in ["state", "log", "run", "munge"] {
            fs::create_dir(site.path(name)).unwrap();
        }
        // Its socket is for every user of this machine.
        for path in [site.dir.path().to_owned(), site.path("munge")] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        site.start_munge();
        fs::write(site.conf(), site.configuration(patience)).unwrap();
        site.daemon("slurmctld", &[]);
        for node in ["n1", "n2"] {
            site.start_node(node);
        }
        site.wait_for_nodes();
        Some(site)
    }

    /// Waits until both nodes are up and idle.
    pub fn wait_for_nodes(&self) {
        wait_for("two nodes", || {
            let said = self.slurm(
                "sinfo",
                &["--noheader", "--Node", "--partition=p", "--format=%N %T"],
            );
            (said.lines().filter(|line| line.ends_with(" idle")).count() == 2).then_some(())
        });
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn conf(&self) -> PathBuf {
        self.path("slurm.conf")
    }

    fn start_munge(&self) {
        let key = self.path("munge/key");
        fs::write(
            &key,
            fs::read("/proc/sys/kernel/random/uuid").unwrap().repeat(4),
        )
        .unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        chown(&key, Some(0), Some(0)).unwrap();
        let option = |name: &str, file: &str| format!("--{name}={}", self.path(file).display());
        let started = Command::new(program("munged").unwrap())
            .arg("--force")
            .args([
                option("key-file", "munge/key"),
                option("socket", "munge/socket"),
                option("pid-file", "run/munged.pid"),
                option("log-file", "log/munged.log"),
                option("seed-file", "munge/seed"),
            ])
            .status()
            .unwrap();
        assert!(started.success(), "munged: {}", self.logs());
    }

    fn configuration(&self, patience: u32) -> String {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        let (host, dir) = (host.trim(), self.dir.path().display());
        let [controller, first, second] = self.ports.each_ref().map(HeldPort::number);
        format!(
            "ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/slurmd-%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,nohold_on_prolog_fail
ReturnToService=1
MessageTimeout=60
BatchStartTimeout=120
UnkillableStepTimeout=300
SlurmdTimeout={patience}
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=600
MaxJobCount=400
MaxArraySize=201
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1 RealMemory=1000
PartitionName=p Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=n1,n2 MaxTime=60 State=UP
PartitionName=long Nodes=n1,n2 MaxTime=INFINITE State=UP
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"
        )
    }

    fn daemon(&self, name: &str, arguments: &[&str]) {
        let started = Command::new(program(name).unwrap())
            .args(arguments)
            .env("SLURM_CONF", self.conf())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert!(started.success(), "{name}: {}", self.logs());
    }

    pub fn start_node(&self, node: &str) {
        self.daemon("slurmd", &["-N", node]);
    }

    /// The process named in a file in `run`.
    fn daemon_pid(&self, name: &str) -> Option<i32> {
        let text = fs::read_to_string(self.path("run").join(name)).ok()?;
        text.trim().parse().ok()
    }

    /// Ends a node's daemon as a power cut would.
    pub fn kill_node(&self, node: &str) {
        let pid = wait_for("the node's daemon", || {
            self.daemon_pid(&format!("slurmd-{node}.pid"))
        });
        // SAFETY: a plain system call on a daemon that this test has started.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
    }

    /// The output of one of Slurm's programs, whether it succeeds or not.
    pub fn slurm(&self, name: &str, arguments: &[&str]) -> String {
        self.try_slurm(name, arguments).unwrap_or_else(|said| said)
    }

    /// Changes a node's state like an administrator: `down`, `drain`, `resume`.
    pub fn set_node(&self, node: &str, state: &str) {
        let words = [
            "update",
            &format!("nodename={node}"),
            &format!("state={state}"),
            "reason=test",
        ];
        self.administer("scontrol", &words);
    }

    /// Runs one of Slurm's programs until it succeeds: a busy controller may not have answered.
    pub fn administer(&self, name: &str, arguments: &[&str]) {
        wait_for(name, || self.try_slurm(name, arguments).ok());
    }

    /// The output of one of Slurm's programs that has succeeded.
    fn try_slurm(&self, name: &str, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new(program(name).unwrap())
            .args(arguments)
            .env("SLURM_CONF", self.conf())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            Ok(said)
        } else {
            Err(said)
        }
    }

    /// How long the controller remembers an ended job.
    pub fn keep_jobs(&self, seconds: u32) {
        let text = fs::read_to_string(self.conf()).unwrap();
        let lines = text.lines().map(|line| match line.split_once('=') {
            Some(("MinJobAge", _)) => format!("MinJobAge={seconds}\n"),
            _ => format!("{line}\n"),
        });
        fs::write(self.conf(), lines.collect::<String>()).unwrap();
        self.administer("scontrol", &["reconfigure"]);
    }

    fn logs(&self) -> String {
        let logs = fs::read_dir(self.path("log"))
            .into_iter()
            .flatten()
            .flatten();
        logs.map(|log| {
            let text = fs::read_to_string(log.path()).unwrap_or_default();
            let last: Vec<&str> = text.lines().rev().take(10).collect();
            format!(
                "\n{}:\n{}",
                log.path().display(),
                last.into_iter().rev().collect::<Vec<_>>().join("\n")
            )
        })
        .collect()
    }

    /// `retort` in a lab, with this Slurm.
    pub fn command(&self, lab: &Lab, arguments: &[&str]) -> Command {
        let mut command = lab.command(arguments);
        command.env("SLURM_CONF", self.conf());
        command
    }

    pub fn retort(&self, lab: &Lab, arguments: &[&str]) -> CommandOutput {
        let output = self.command(lab, arguments).output().unwrap();
        CommandOutput {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// `retort run r.yaml` on this Slurm, with a poll every second.
    pub fn run(&self, lab: &Lab, arguments: &[&str]) -> CommandOutput {
        self.retort(lab, &[&ON_SLURM, arguments].concat())
    }

    pub fn start_run(&self, lab: &Lab, arguments: &[&str]) -> Running {
        self.begin(lab, &[&ON_SLURM, arguments].concat())
    }

    pub fn start_tail(&self, lab: &Lab) -> Running {
        self.begin(lab, &["tail", "latest"])
    }

    fn begin(&self, lab: &Lab, arguments: &[&str]) -> Running {
        let mut command = self.command(lab, arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::new(command.spawn().unwrap())
    }
}

pub const ON_SLURM: [&str; 6] = ["run", "r.yaml", "--executor", "slurm", "--slurm", "poll=1s"];

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let jobs = self.slurm("squeue", &["--states=all", "--format=%i %T %r %N"]);
            eprintln!("{jobs}");
        }
        self.slurm("scancel", &["--user=root"]);
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until && !self.slurm("squeue", &["--noheader"]).trim().is_empty() {
            std::thread::sleep(Duration::from_millis(200));
        }
        if std::thread::panicking() {
            let nodes = self.slurm("sinfo", &["--Node", "--format=%N %T %E"]);
            eprintln!("{nodes}{}", self.logs());
        }
        let daemons = [
            "slurmd-n1.pid",
            "slurmd-n2.pid",
            "slurmctld.pid",
            "munged.pid",
        ];
        let pids: Vec<i32> = daemons
            .iter()
            .filter_map(|name| self.daemon_pid(name))
            .collect();
        for &pid in &pids {
            // SAFETY: a plain system call on a daemon that this test has started; its file names it while it is alive.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
        for pid in pids {
            for _ in 0..50 {
                if !Path::new(&format!("/proc/{pid}")).exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}
