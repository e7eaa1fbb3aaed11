//! Checks of a worker's frames: a broken or lying worker must not make the runner record false artifacts, nor store unbounded
//! data. Odd values (a name with control characters, a time before 1970, a long line) are corrected; impossible ones are
//! refused.

use std::time::Duration;

use retort_abi::{Failure, LogLevel};
use retort_checkpoint::json;
use serde::Serialize;

use crate::artifact::{self, Layout};
use crate::frame::{Line, Points, Progress};
use crate::store::{ArtifactRecord, Time, Usage};
use crate::worker::shortened;

/// Bytes of the longest name, the same limit as for imports.
const LONGEST_NAME: usize = 1024;
/// Bytes of the longest summary of a stage, and of the longest facts about an artifact, as JSON.
const LONGEST_FACTS: usize = 4 << 20;
/// The most memory that either takes when it is read.
const HEAVIEST_FACTS: usize = 64 << 20;
/// Maximum artifacts of an attempt.
pub(super) const MOST_ARTIFACTS: usize = 4096;
/// How often, and at what interval, to look again for another machine's files on a shared file system.
const LOOKS: usize = 12;
const LOOK: Duration = Duration::from_millis(250);

/// A name in the history's form.
pub(super) fn name(text: String) -> String {
    let is_plain = |c: char| !c.is_control();
    if text.len() <= LONGEST_NAME && text.chars().all(is_plain) {
        return text;
    }
    let mut name = String::new();
    for c in text.chars() {
        let c = if is_plain(c) {
            c
        } else {
            char::REPLACEMENT_CHARACTER
        };
        if name.len() + c.len_utf8() > LONGEST_NAME {
            break;
        }
        name.push(c);
    }
    name
}

/// Points with valid times.
pub(super) fn points(mut points: Points) -> Points {
    points.series = name(points.series);
    for at in &mut points.at {
        *at = Time(*at).or_now().0;
    }
    points
}

/// A line, cut to the maximum length.
pub(super) fn line(line: Line) -> Line {
    let known = LogLevel::Error as u32..=LogLevel::Trace as u32;
    Line {
        level: match known.contains(&line.level) {
            true => line.level,
            false => LogLevel::Info as u32,
        },
        text: shortened(&line.text),
        at: Time(line.at).or_now().0,
    }
}

pub(super) fn progress(progress: Progress) -> Progress {
    Progress {
        unit: name(progress.unit),
        ..progress
    }
}

/// A failure, with its texts cut to the length of log lines.
pub(super) fn failure(failure: Failure) -> Failure {
    let short = |text: String| shortened(&text);
    Failure {
        message: short(failure.message),
        chain: failure.chain.into_iter().take(100).map(short).collect(),
        pointer: failure.pointer.map(short),
        hint: failure.hint.map(short),
        ..failure
    }
}

/// A process's resource usage, with impossible values removed.
pub(super) fn usage(usage: Usage) -> Usage {
    Usage {
        cpu_seconds: usage
            .cpu_seconds
            .filter(|seconds| (0.0..1e12).contains(seconds)),
        max_rss: usage.max_rss.filter(|&bytes| i64::try_from(bytes).is_ok()),
    }
}

/// Refuses facts that would fill the history.
pub(super) fn facts(what: &str, facts: &impl Serialize) -> Result<(), String> {
    let text = serde_json::to_vec(facts).unwrap_or_default();
    let length = text.len();
    if length > LONGEST_FACTS {
        return Err(format!(
            "{what} takes {length} bytes, and at most {LONGEST_FACTS} are kept: large results belong in an artifact's files"
        ));
    }
    json::check_weight(&text, HEAVIEST_FACTS)
        .map_err(|error| format!("{what}: {error}: large results belong in an artifact's files"))
}

/// Checks an artifact before it is recorded: its hash must match its list of files, and the files must be in place. Their
/// content is not read again; `retort artifacts verify` does that. `elsewhere`: another machine made them.
pub(super) async fn artifact(
    layout: &Layout,
    mut record: ArtifactRecord,
    elsewhere: bool,
) -> Result<ArtifactRecord, String> {
    artifact::check_list(&record.hash, record.size, &record.files)?;
    let preview = record.meta.preview.as_deref();
    if !preview.is_none_or(artifact::is_inner_path) {
        return Err("the preview of an artifact is not a path within it".into());
    }
    facts("the metadata of an artifact", &record.meta)?;
    (record.kind, record.name) = (name(record.kind), name(record.name));
    for look in 0..if elsewhere { LOOKS } else { 1 } {
        if look > 0 {
            tokio::time::sleep(LOOK).await;
            // Reopening a directory makes NFS ask the server.
            let _ = std::fs::read_dir(layout.artifacts());
        }
        let (layout, asked) = (layout.clone(), record.clone());
        let held = tokio::task::spawn_blocking(move || layout.holds(&asked));
        if held.await.unwrap_or(false) {
            return Ok(record);
        }
    }
    Err(format!(
        "the files of artifact {} are not in {}, or have other sizes than the worker said",
        record.hash,
        layout.artifacts().display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::{ArtifactFile, commit, list_hash};
    use serde_json::json;

    fn made(root: &std::path::Path) -> (Layout, ArtifactRecord) {
        let layout = Layout::new(root).unwrap();
        let staging = root.join("staging");
        std::fs::create_dir_all(staging.join("d")).unwrap();
        std::fs::write(staging.join("d/a"), "12").unwrap();
        std::fs::write(staging.join("b"), "345").unwrap();
        let contents = commit(&staging, &layout.artifacts()).unwrap();
        let record = ArtifactRecord {
            hash: contents.hash,
            kind: "thing".into(),
            name: "n".into(),
            size: contents.size,
            files: contents.files,
            meta: Default::default(),
        };
        (layout, record)
    }

    /// Changes a valid record and expects it to be refused; with `again` its list of files is rehashed.
    async fn check(change: impl FnOnce(&mut ArtifactRecord), again: bool, expected: &str) {
        let root = tempfile::tempdir().unwrap();
        let (layout, mut record) = made(root.path());
        change(&mut record);
        if again {
            record.hash = list_hash(&record.files);
        }
        let error = artifact(&layout, record, false).await.unwrap_err();
        assert!(error.contains(expected), "{error}");
    }

    #[tokio::test]
    async fn an_artifact_is_what_lies_in_its_place() {
        let root = tempfile::tempdir().unwrap();
        let (layout, record) = made(root.path());
        let admitted = artifact(&layout, record.clone(), true).await.unwrap();
        assert_eq!(admitted, record);
        std::fs::remove_file(layout.artifact(&record.hash).join("b")).unwrap();
        let error = artifact(&layout, record, false).await.unwrap_err();
        assert!(error.contains("are not in"), "{error}");
        check(
            |record| record.hash = "../../x".into(),
            false,
            "is not a hash",
        )
        .await;
        check(
            |record| record.hash = "a".repeat(64),
            false,
            "what its hash says",
        )
        .await;
        check(|record| record.size += 1, false, "add up to").await;
        check(|record| record.files.clear(), false, "add up to").await;
        let outside = |record: &mut ArtifactRecord| record.files[0].path = "../b".into();
        check(outside, true, "not a path within").await;
        let twice = |record: &mut ArtifactRecord| {
            record.files = vec![record.files[0].clone(), record.files[0].clone()];
            record.size = 6;
        };
        check(twice, true, "what its hash says").await;
        let overflow = |record: &mut ArtifactRecord| {
            record.files[0].size = u64::MAX;
            record.size = 1;
        };
        check(overflow, true, "add up to").await;
        let more = |record: &mut ArtifactRecord| {
            let hash = "b".repeat(64);
            let path = "z".into();
            record.files.push(ArtifactFile {
                path,
                size: 0,
                hash,
            });
        };
        check(more, true, "are not in").await;
        let preview = |record: &mut ArtifactRecord| record.meta.preview = Some("/etc/x".into());
        check(preview, false, "preview").await;
        let long = |record: &mut ArtifactRecord| {
            record
                .meta
                .extra
                .insert("x".into(), json!("y".repeat(LONGEST_FACTS)));
        };
        check(long, false, "at most").await;
    }

    #[test]
    fn what_is_odd_is_put_right() {
        assert_eq!(name("loss/größe".into()), "loss/größe");
        assert_eq!(name("a\nb\x1b".into()), "a\u{fffd}b\u{fffd}");
        assert_eq!(name("ö".repeat(3000)).len(), LONGEST_NAME);
        let odd = Points {
            series: "\0".into(),
            steps: vec![u64::MAX, 1],
            values: vec![f64::NAN, 1.0],
            at: vec![i64::MAX, 7],
        };
        let put_right = points(odd);
        assert_eq!((&*put_right.series, put_right.at[1]), ("\u{fffd}", 7));
        assert!(put_right.at[0] <= Time::now().0);
        let long = line(Line {
            level: 77,
            text: "x".repeat(1 << 20),
            at: -1,
        });
        assert!(long.level == 3 && long.at > 0 && long.text.len() < 20 << 10);
        let told = Failure {
            chain: vec!["y".repeat(1 << 20); 1000],
            ..Failure::new(retort_abi::FailureCode::Io, "x".repeat(1 << 20))
        };
        let kept = failure(told);
        assert!(kept.message.len() < 20 << 10 && kept.chain.len() == 100);
        let taken = |cpu_seconds, max_rss| {
            usage(Usage {
                cpu_seconds: Some(cpu_seconds),
                max_rss: Some(max_rss),
            })
        };
        assert_eq!(taken(1.5, 7).cpu_seconds, Some(1.5));
        for wrong in [-1.0, f64::INFINITY, 1e300] {
            assert_eq!(taken(wrong, u64::MAX), Usage::default(), "{wrong}");
        }
        facts("a summary", &json!({ "x": 1 })).unwrap();
        let large = facts("a summary", &vec![[0]; 200_000]).unwrap_err();
        assert!(large.contains("so many values"), "{large}");
    }
}
