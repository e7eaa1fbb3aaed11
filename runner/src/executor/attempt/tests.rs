//! The end of an attempt, from its workers' events.

use std::collections::BTreeMap;
use std::path::PathBuf;

use retort_abi::{Failure, FailureCode, Part, StageResult};
use serde_json::json;

use super::event_handler::WorkerReport;
use super::event_loop::FinishedWorker;
use super::shutdown::{ShutdownSequence, StopReason};
use super::*;
use crate::executor::end::Hang;
use crate::frame::Progress;
use crate::plan::{Digest, PlannedStage, PluginIdentity, Threads};
use crate::store::StageId;
use crate::worker::death::{ExitStatus, UnexpectedExit};
use crate::worker::process::WorkerExit;

fn spec() -> AttemptSpec {
    AttemptSpec {
        stage: PlannedStage {
            name: "s".into(),
            kind: "make".into(),
            description: None,
            plugin: PluginIdentity {
                name: "p".into(),
                path: PathBuf::new(),
                version: "1".into(),
                hash: String::new(),
            },
            device: "cpu".into(),
            dtype: "f32".into(),
            threads: Threads::Share,
            workers: Vec::new(),
            together: false,
            min_workers: None,
            retries: 0,
            seed: 0,
            timeout: Some(Duration::from_secs(60)),
            options: json!({}),
            references: Vec::new(),
            files: Vec::new(),
            free: Vec::new(),
            output_kind: "thing".into(),
            revision: 0,
            origins: BTreeMap::new(),
            position: None,
            added_for: Vec::new(),
        },
        id: StageId(1),
        digest: Digest {
            hex: String::new(),
            components: json!({}),
        },
        base_dir: PathBuf::new(),
        threads: 1,
        retries: 0,
        inputs: BTreeMap::new(),
        sources: Vec::new(),
        work_dir: PathBuf::new(),
    }
}

fn shutdown(cause: Option<StopReason>, sent: Option<i32>) -> ShutdownSequence {
    ShutdownSequence {
        cause,
        sent,
        ..ShutdownSequence::new(Duration::ZERO)
    }
}

#[track_caller]
fn check(
    report: WorkerReport,
    exit: ExitStatus,
    shutdown: ShutdownSequence,
    reason: &str,
    message: &str,
) {
    let end = report.judge(exit, shutdown, &spec(), false);
    assert_eq!(end.reason(), reason);
    assert!(
        end.message().unwrap_or_default().contains(message),
        "{:?}",
        end.message()
    );
}

fn failed(code: FailureCode) -> WorkerReport {
    WorkerReport {
        answer: Some(Err(Failure::new(code, "why"))),
        ..WorkerReport::default()
    }
}

fn made(kind: &str, output: u64) -> WorkerReport {
    let record = ArtifactRecord {
        hash: "h".into(),
        kind: kind.into(),
        name: "n".into(),
        size: 0,
        files: Vec::new(),
        meta: Default::default(),
    };
    WorkerReport {
        answer: Some(Ok(StageResult {
            output,
            summary: Value::Null,
        })),
        artifacts: BTreeMap::from([(1, record)]),
        ..WorkerReport::default()
    }
}

#[test]
fn every_end_has_its_own_reason() {
    use ExitStatus::{Code, Signal};
    let free = shutdown(None, None);
    check(made("thing", 1), Code(0), free, "succeeded", "");
    check(
        made("thing", 1),
        Signal(libc::SIGSEGV),
        free,
        "succeeded",
        "",
    );
    check(
        made("thing", 2),
        Code(0),
        free,
        "protocol error",
        "artifact 2, which was not committed",
    );
    check(
        made("other", 1),
        Code(0),
        free,
        "protocol error",
        "promises a `thing`",
    );
    check(
        failed(FailureCode::BadData),
        Code(0),
        free,
        "failed: bad_data",
        "why",
    );
    check(failed(FailureCode::Panic), Code(0), free, "panic", "why");
    for (code, reason) in [
        (FailureCode::WorkersDiffer, "workers differ"),
        (FailureCode::WorkerLost, "lost contact with a worker"),
    ] {
        check(failed(code), Code(0), free, reason, "why");
    }
    let hung = WorkerReport {
        hang: part(1).map(|part| Hang::silent(part, 30)),
        ..WorkerReport::default()
    };
    check(
        hung,
        Signal(libc::SIGKILL),
        free,
        "rank 1 hangs",
        "worker 2 of 2 gave no sign of life for 30 seconds, and was ended",
    );
    check(
        failed(FailureCode::Cancelled),
        Code(0),
        free,
        "failed: cancelled",
        "why",
    );
    check(
        WorkerReport::default(),
        Signal(libc::SIGSEGV),
        free,
        "killed by SIGSEGV",
        "memory that is not its own",
    );
    check(
        WorkerReport::default(),
        Signal(libc::SIGABRT),
        free,
        "killed by SIGABRT",
        "abort",
    );
    check(
        WorkerReport::default(),
        Signal(libc::SIGKILL),
        free,
        "killed by SIGKILL",
        "memory runs out",
    );
    check(
        WorkerReport::default(),
        Code(3),
        free,
        "exited with code 3",
        "without a result",
    );
}

#[test]
fn the_loss_of_a_worker_is_tried_again_and_no_other_failure() {
    let mut spec = spec();
    spec.stage.workers = vec!["cpu".into(); 2];
    let killed = |out_of_memory| {
        let status = ExitStatus::Signal(libc::SIGKILL);
        End::Died(UnexpectedExit::new(
            status,
            std::iter::empty(),
            out_of_memory,
        ))
    };
    let failed = |code, retryable| {
        End::Failed(Failure {
            retryable,
            ..Failure::new(code, "why")
        })
    };
    let is_tried = |spec: &AttemptSpec, end: End| {
        let reason = shrink::tried_again(spec, end).reason();
        reason.starts_with("lost a worker: ")
    };
    for (together, retries) in [(false, 1), (true, 0)] {
        (spec.stage.together, spec.retries) = (together, retries);
        assert!(!is_tried(&spec, killed(false)));
    }
    spec.retries = 2;
    assert!(is_tried(&spec, killed(false)));
    assert!(is_tried(&spec, failed(FailureCode::WorkerLost, true)));
    let hung = part(1).map(Hang::unresponsive).map(End::Hung);
    assert!(is_tried(&spec, hung.unwrap()));
    assert!(!is_tried(&spec, killed(true)), "memory ran out");
    assert!(!is_tried(&spec, failed(FailureCode::WorkersDiffer, false)));
    assert!(!is_tried(&spec, failed(FailureCode::Numerical, false)));
}

#[test]
fn being_stopped_is_told_from_failing() {
    use ExitStatus::{Code, Signal};
    for (cause, reason) in [
        (StopReason::Interrupt, "interrupted"),
        (StopReason::Timeout, "timeout"),
    ] {
        let asked = shutdown(Some(cause), None);
        check(
            failed(FailureCode::Cancelled),
            Code(0),
            asked,
            reason,
            "stopped at a checkpoint",
        );
        check(
            failed(FailureCode::BadData),
            Code(0),
            asked,
            "failed: bad_data",
            "why",
        );
        check(
            WorkerReport::default(),
            Signal(libc::SIGSEGV),
            asked,
            "killed by SIGSEGV",
            "",
        );
        let signalled = shutdown(Some(cause), Some(libc::SIGTERM));
        check(
            WorkerReport::default(),
            Signal(libc::SIGTERM),
            signalled,
            reason,
            "was ended with SIGTERM",
        );
        check(
            WorkerReport::default(),
            Code(143),
            signalled,
            reason,
            "ended without a result",
        );
    }
}

fn part(index: usize) -> Option<Part> {
    Some(Part { index, of: 2 })
}

#[test]
fn parts_share_threads_and_devices() {
    let mut spec = spec();
    spec.threads = 5;
    assert_eq!(spec.parts().count(), 0);
    spec.stage.workers = vec!["cpu".into(), "cuda:1".into()];
    let parts: Vec<Option<Part>> = spec.parts().map(Some).collect();
    assert_eq!(parts, [part(0), part(1)]);
    let of = |part| (spec.threads_of(part), spec.device_of(part));
    assert_eq!(of(part(0)), (2, "cpu"));
    assert_eq!(of(part(1)), (2, "cuda:1"));
    assert_eq!(of(None), (5, "cpu"));
    assert_eq!(spec.devices(), "cpu, cuda:1");
    spec.threads = 1;
    assert_eq!(spec.threads_of(part(0)), 1);
}

#[test]
fn progress_of_parts_adds_up_and_does_not_fall_back() {
    let told = PartProgress::default();
    let check = |part, (done, total, unit): (u64, u64, &str), expected| {
        let unit = unit.to_owned();
        let shown = told.together(part, Progress { done, total, unit });
        assert_eq!((shown.done, shown.total), expected);
    };
    check(part(0), (0, 60, "samples"), (0, 60));
    check(part(1), (3, 7, "captions"), (3, 7));
    check(part(0), (20, 60, "samples"), (20, 60));
    check(part(1), (0, 40, "samples"), (20, 100));
    check(part(1), (40, 40, "samples"), (60, 100));
    check(part(0), (60, 60, "samples"), (100, 100));
    check(None, (50, 100, "samples"), (100, 100));
    check(None, (1, 2, "files"), (1, 2));
    // As from a worker that miscounts.
    check(
        part(0),
        (u64::MAX, u64::MAX, "samples"),
        (u64::MAX, u64::MAX),
    );
    check(part(1), (u64::MAX, 3, "samples"), (u64::MAX, u64::MAX));
}

#[test]
fn the_part_that_says_most_is_the_reason() {
    let finished = |index, cause, sent| FinishedWorker {
        part: part(index),
        report: WorkerReport::default(),
        shutdown: shutdown(cause, sent),
        exit: WorkerExit {
            status: ExitStatus::Signal(libc::SIGKILL),
            usage: Usage::default(),
            out_of_memory: None,
        },
    };
    let died = finished(0, None, None);
    let asked = finished(0, Some(StopReason::Interrupt), None);
    let made_to = finished(1, Some(StopReason::Interrupt), Some(libc::SIGTERM));
    assert!(!made_to.is_graver_than(&died), "it was stopped for that");
    assert!(made_to.is_graver_than(&asked));
    assert!(!asked.is_graver_than(&made_to));
}
