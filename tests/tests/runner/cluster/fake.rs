//! Slurm's programs as scripts, in a lab whose commands call them.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use retort_tests::program::script;

use super::imagined::programs;
use crate::lab::{CommandOutput, Lab, Running, compile, wait_for};

/// A cluster whose programs print files: `queue` and `accounts`.
pub struct FakeSlurm {
    pub lab: Lab,
}

impl FakeSlurm {
    pub fn new() -> Self {
        Self::of("a: {kind: do}")
    }

    pub fn of(stage: &str) -> Self {
        let lab = Lab::new(&[stage]);
        programs(lab.dir.path());
        Self { lab }
    }

    /// Whose only job has the number 1. It writes what is cancelled into a file, and while there is a file `slow` or `silent`,
    /// `sbatch` does not return and `squeue` fails.
    pub fn of_one_job() -> Self {
        let cluster = Self::new();
        cluster.program(
            "sbatch",
            "mkdir -p \"$SIM/jobs/1\"; printf '%s\\n' \"$@\" > \"$SIM/jobs/1/draft\"
             mv \"$SIM/jobs/1/draft\" \"$SIM/jobs/1/args\"; while [ -e \"$SIM/slow\" ]; do sleep 0.1; done; echo 1",
        );
        cluster.program(
            "squeue",
            "[ -e \"$SIM/silent\" ] && { echo 'Unable to contact slurm controller' >&2; exit 1; }
             case \"$*\" in *--name=*) echo 1;; *) cat \"$SIM/queue\";; esac",
        );
        cluster.program("scancel", "echo \"$@\" >> \"$SIM/cancelled\"");
        cluster.queue("1|N/A|RUNNING|None|node1\n");
        cluster
    }

    /// With a stage of three parts.
    pub fn divided() -> Self {
        let cluster = Self::of("a: {kind: do, plugin: parted, workers: 3}");
        fs::create_dir(cluster.path("plugins")).unwrap();
        let flags = ["-DFAULTY_NAME=\"parted\"", "-DFAULTY_DIVISIBLE=\"true\""];
        let library = cluster.path("plugins/libretort_parted.so");
        compile("faulty.c", &flags, &library);
        cluster
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.lab.dir.path().join(name)
    }

    /// What `squeue` prints.
    pub fn queue(&self, text: &str) {
        fs::write(self.path("queue"), text).unwrap();
    }

    /// Replaces a program of Slurm. The lab's directory is `$SIM`.
    pub fn program(&self, name: &str, text: &str) {
        let path = self.path("bin").join(name);
        script(&path, &format!("#!/bin/sh\n{text}\n"));
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.lab.command(arguments);
        let path = std::env::var("PATH").unwrap_or_default();
        if self.path("plugins").exists() {
            command.arg("--plugin-dir").arg(self.path("plugins"));
        }
        command
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("SIM", self.lab.dir.path());
        command
    }

    pub fn start(&self, arguments: &[&str]) -> Running {
        let mut command = self.command(arguments);
        let started = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::new(started.spawn().unwrap())
    }

    pub fn retort(&self, arguments: &[&str]) -> CommandOutput {
        self.start(arguments).end()
    }

    /// The spool of the job with this number, once it is submitted.
    pub fn spool(&self, job: usize) -> PathBuf {
        let arguments = self.path(&format!("jobs/{job}/args"));
        let arguments = wait_for("a job", || fs::read_to_string(&arguments).ok());
        let spool = arguments
            .lines()
            .find_map(|line| line.strip_prefix("--chdir="));
        PathBuf::from(spool.unwrap())
    }
}
