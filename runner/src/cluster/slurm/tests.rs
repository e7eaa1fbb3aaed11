//! How Slurm's answers are read.

use super::*;

#[test]
fn lines_of_the_queue() {
    let said = |state, reason: &str, node: &str| ElementStatus {
        state,
        reason: reason.into(),
        node: node.into(),
    };
    for (text, expected) in [
        (
            "3|0|RUNNING|None|n1",
            Some(((3, Some(0)), said(State::Running, "None", "n1"))),
        ),
        (
            "7|N/A|PENDING|Resources|",
            Some(((7, None), said(State::Pending, "Resources", ""))),
        ),
        (
            "7|12|COMPLETING|None|n1",
            Some(((7, Some(12)), said(State::Running, "None", "n1"))),
        ),
        (
            "7|12|NODE_FAIL|x|",
            Some(((7, Some(12)), said(State::NodeFailed, "x", ""))),
        ),
        ("", None),
        ("slurm_load_jobs error", None),
        ("x|1|RUNNING|None|", None),
        ("3|1-5|PENDING|None|", None),
    ] {
        assert_eq!(line(text), expected, "{text}");
    }
    assert_eq!(State::parse("CANCELLED by 1000"), State::Cancelled);
    assert_eq!(State::parse("SUSPENDED"), State::Running);
}

#[test]
fn states_of_the_queue() {
    for (name, state, fault) in [
        ("PENDING", State::Pending, None),
        ("REQUEUED", State::Pending, None),
        ("REQUEUE_HOLD", State::Pending, None),
        ("SPECIAL_EXIT", State::Pending, None),
        ("CONFIGURING", State::Running, None),
        ("RUNNING", State::Running, None),
        ("STOPPED", State::Running, None),
        ("SIGNALING", State::Running, None),
        ("COMPLETING", State::Running, None),
        ("COMPLETED", State::Completed, None),
        ("FAILED", State::Failed, None),
        ("CANCELLED", State::Cancelled, Some("cancelled in Slurm")),
        ("CANCELLED+", State::Cancelled, Some("cancelled in Slurm")),
        ("REVOKED", State::Cancelled, Some("cancelled in Slurm")),
        ("TIMEOUT", State::Timeout, Some("time limit")),
        ("NODE_FAIL", State::NodeFailed, Some("node failed")),
        ("BOOT_FAIL", State::NodeFailed, Some("node failed")),
        ("PREEMPTED", State::Preempted, Some("preempted")),
        ("DEADLINE", State::Deadline, Some("deadline")),
        (
            "OUT_OF_MEMORY",
            State::OutOfMemory,
            Some("out of memory in Slurm"),
        ),
    ] {
        let found = State::parse(name);
        assert_eq!((found, found.fault()), (state, fault), "{name}");
        let ended = !matches!(state, State::Pending | State::Running);
        assert_eq!(found.is_final(), ended, "{name}");
    }
}

#[test]
fn lines_of_the_accounts() {
    for (text, expected) in [
        (
            "17_3|OUT_OF_MEMORY|n1",
            Some(((17, Some(3)), State::OutOfMemory, "n1")),
        ),
        (
            "17_12|CANCELLED by 0|n2",
            Some(((17, Some(12)), State::Cancelled, "n2")),
        ),
        (
            "17|CANCELLED by 1000|None assigned",
            Some(((17, None), State::Cancelled, "None assigned")),
        ),
        (
            "18|PREEMPTED|n1",
            Some(((18, None), State::Preempted, "n1")),
        ),
        (
            "18_0|TIMEOUT|n1",
            Some(((18, Some(0)), State::Timeout, "n1")),
        ),
        (
            "19|NODE_FAIL|n[1-4]",
            Some(((19, None), State::NodeFailed, "n[1-4]")),
        ),
        ("19|COMPLETED|", Some(((19, None), State::Completed, ""))),
        ("19|FAILED", Some(((19, None), State::Failed, ""))),
        // Elements that have not started are grouped: the controller knows them.
        ("17_[4-9]|PENDING|None assigned", None),
        ("17_[4-9%2]|PENDING|None assigned", None),
        // A step is not a job.
        ("17.batch|OUT_OF_MEMORY|n1", None),
        ("17_3.extern|COMPLETED|n1", None),
        ("", None),
        ("17", None),
    ] {
        let found = account(text);
        let found = found
            .as_ref()
            .map(|(key, said)| (*key, said.state, said.node.as_str()));
        assert_eq!(found, expected, "{text}");
    }
}

#[test]
fn refusals_say_what_to_do() {
    use std::os::unix::process::ExitStatusExt;
    let failed = |stderr: &str| ProgramOutput {
        status: Some(ExitStatus::from_raw(256)),
        stdout: String::new(),
        stderr: stderr.into(),
    };
    // The text of sbatch 22.05.
    for (stderr, hint) in [
        (
            "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid partition name specified",
            "set `partition`",
        ),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            "set `account`",
        ),
        (
            "sbatch: error: Invalid generic resource (gres) specification",
            "set `gres`",
        ),
        (
            "sbatch: error: Memory specification can not be satisfied\nsbatch: error: Batch job submission failed: Requested node configuration is not available",
            "set `memory`",
        ),
        (
            "sbatch: error: Invalid --time specification",
            "as Slurm writes it",
        ),
        (
            "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
            "the longest times",
        ),
        (
            "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            "list the limits",
        ),
        ("sbatch: error: something new", "retort doctor"),
    ] {
        let error = refusal(&failed(stderr), false);
        let SlurmError::Refused { said, hint: found } = &error else {
            panic!("{error:?}");
        };
        assert!(found.contains(hint), "{stderr}: {found}");
        assert!(!said.contains("sbatch: error"), "{said}");
    }
    let full = "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying";
    let policy = "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)";
    for stderr in [full, policy] {
        let error = refusal(&failed(stderr), true);
        assert!(matches!(error, SlurmError::Full { .. }), "{error:?}");
    }
    let gone = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)";
    let error = refusal(&failed(gone), true);
    assert!(matches!(error, SlurmError::Silent { .. }), "{error:?}");
}

fn profile() -> Profile {
    Profile {
        partition: None,
        account: None,
        qos: None,
        time: None,
        gres: None,
        cpus: None,
        memory: None,
        array_limit: None,
        sbatch: Vec::new(),
        prologue: String::new(),
        requeue: 3,
        signal: Duration::from_secs(120),
        poll: Duration::from_secs(10),
        shrink_after: Duration::from_secs(600),
    }
}

fn arguments_of(profile: &Profile, layout: Layout) -> Vec<String> {
    arguments(&NewJob {
        name: "retort-1",
        script: Path::new("/spool/batch.sh"),
        spool: Path::new("/spool"),
        layout,
        cpus: 2,
        profile,
    })
}

#[test]
fn every_option_of_a_profile_reaches_sbatch() {
    let bare = arguments_of(&profile(), Layout::Array(8));
    let text = |value: &str| Some(value.to_owned());
    type Set = (fn(&mut Profile, Option<String>), &'static str, &'static str);
    let options: [Set; 6] = [
        (|to, value| to.partition = value, "long", "--partition=long"),
        (|to, value| to.account = value, "lab", "--account=lab"),
        (|to, value| to.qos = value, "low", "--qos=low"),
        (|to, value| to.time = value, "4:00:00", "--time=4:00:00"),
        (|to, value| to.gres = value, "gpu:2", "--gres=gpu:2"),
        (|to, value| to.memory = value, "8G", "--mem=8G"),
    ];
    for (set, value, expected) in options {
        let mut profile = profile();
        set(&mut profile, text(value));
        let words = arguments_of(&profile, Layout::Array(8));
        let new: Vec<&String> = words.iter().filter(|word| !bare.contains(word)).collect();
        assert_eq!(new, [expected]);
        assert_eq!(words.len(), bare.len() + 1, "{expected}");
    }
    let more = Profile {
        sbatch: vec!["--constraint=a100".into(), "--exclusive".into()],
        ..profile()
    };
    let words = arguments_of(&more, Layout::Single);
    // Options come before the script, and after those that they may override.
    let end = ["--constraint=a100", "--exclusive", "/spool/batch.sh"];
    assert_eq!(words[words.len() - 3..], end);
    let limited = Profile {
        array_limit: Some(3),
        ..profile()
    };
    let has = |words: &[String], word: &str| words.iter().any(|known| known == word);
    assert!(has(
        &arguments_of(&limited, Layout::Array(8)),
        "--array=0-7%3"
    ));
    assert!(has(&bare, "--array=0-7") && has(&bare, "--output=%a.out"));
    let short = Profile {
        signal: Duration::from_secs(60),
        ..profile()
    };
    assert!(has(
        &arguments_of(&short, Layout::Single),
        "--signal=B:USR1@60"
    ));
    let ranks = arguments_of(&short, Layout::Ranks(4));
    assert!(has(&ranks, "--signal=USR1@60") && has(&ranks, "--ntasks=4"));
    for word in [
        "--cpus-per-task=2",
        "--requeue",
        "--job-name=retort-1",
        "--chdir=/spool",
    ] {
        assert!(has(&bare, word), "{word}");
    }
}

#[test]
fn starts_in_the_accounts() {
    let past = |place, state, ended| {
        Some(PastStart {
            place,
            state,
            ended,
        })
    };
    for (text, expected) in [
        (
            "17|NODE_FAIL|n1|1795000000",
            past((17, None), State::NodeFailed, 1_795_000_000),
        ),
        (
            "17_3|PREEMPTED|n2|1795000000",
            past((17, Some(3)), State::Preempted, 1_795_000_000),
        ),
        (
            "17|REQUEUED|n1|1795000000",
            past((17, None), State::Pending, 1_795_000_000),
        ),
        // It is not over.
        ("17|PENDING|None assigned|Unknown", None),
        ("17|RUNNING|n1|Unknown", None),
        ("17|NODE_FAIL|n1", None),
        ("", None),
    ] {
        assert_eq!(past_start(text), expected, "{text}");
    }
}

#[test]
fn nodes_that_have_failed() {
    let line = |state: &str| {
        format!("NodeName=n1 Arch=x86_64 CoresPerSocket=1 State={state} ThreadsPerCore=1 Reason=x")
    };
    for (state, failed) in [
        ("IDLE", false),
        ("ALLOCATED+DRAIN", false),
        ("IDLE+POWERED_DOWN", false),
        ("DOWN", true),
        ("DOWN*", true),
        ("DOWN*+DRAIN", true),
        ("IDLE*", true),
        ("IDLE+NOT_RESPONDING", true),
        ("FAIL", true),
    ] {
        let found = failed_node(&line(state));
        assert_eq!(found.as_deref(), failed.then_some("n1"), "{state}");
    }
    assert_eq!(failed_node("Node n7 not found"), None);
}

#[test]
fn what_a_cluster_says_of_itself() {
    let said = "Configuration data as of 2026-11-30T00:00:00\n\
        AccountingStorageHost   = localhost\n\
        ClusterName             = far\n\
        MaxArraySize            = 31\n";
    let expected = ClusterConfig {
        name: "far".into(),
        array_size: 31,
    };
    assert_eq!(cluster_config(said), expected);
    assert_eq!(cluster_config(""), ClusterConfig::default());
    assert_eq!(cluster_config("MaxArraySize = 0").array_size, 1);
}

#[test]
fn variables_of_the_shell_that_steer_slurm() {
    for name in [
        "SLURM_CLUSTERS",
        "SBATCH_CLUSTERS",
        "SBATCH_ARRAY_INX",
        "SBATCH_WAIT",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_JOB_ID",
        "SLURM_PROCID",
        "SQUEUE_PARTITION",
        "SCANCEL_STATE",
    ] {
        assert!(is_stray(name, false), "{name}");
    }
    for name in ["SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "PATH"] {
        assert!(!is_stray(name, false) && !is_stray(name, true), "{name}");
    }
    assert!(!is_stray("SLURM_CPU_BIND", false) && is_stray("SLURM_CPU_BIND", true));
}
