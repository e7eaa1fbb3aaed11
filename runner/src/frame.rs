//! Frames: the messages between the runner and a worker, and their wire format.
//!
//! A frame is a length (u32, little endian) and that many bytes of JSON. They use a separate socket, so that nothing a plugin
//! prints can be mistaken for one. Both sides are the same binary, so there is no version to negotiate. Deliberately absent:
//! sockets, and the handling of messages.

use retort_abi::{Description, Device, Diagnostic, Failure, StageJob, StageResult};
use retort_checkpoint::json;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

use crate::store::{ArtifactRecord, HEAVIEST_VALUE};

/// Longest frame that is sent or accepted, in bytes.
pub const LIMIT: usize = 64 << 20;
/// From the runner to a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToWorker {
    /// Load a plugin and make one call; always the first frame, and only that.
    Start(Box<Task>),
    /// Stop at the next checkpoint.
    StopAtCheckpoint,
    /// Stop at once.
    StopNow,
}

/// What a worker is to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// The plugin's shared object.
    pub plugin: PathBuf,
    /// Hex BLAKE3 that the file must have, so that the planned plugin runs. `None`: any file.
    pub hash: Option<String>,
    /// What to ask of it.
    pub call: Call,
}

/// What to ask of a plugin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// What it is.
    Describe,
    /// Devices really present.
    Probe,
    /// Its own checks of the options of several stages.
    Validate(Vec<StageJob>),
    /// The same with arbitrary options, continuing after failures.
    Provoke(Vec<StageJob>),
    /// Run a stage.
    Run {
        /// The stage.
        job: Box<StageJob>,
        /// Directory in which artifacts are written before they are committed.
        staging: PathBuf,
        /// Directory of committed artifacts.
        artifacts: PathBuf,
        /// How long to listen for late calls before the process exits.
        linger: Duration,
    },
}

/// From a worker to the runner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromWorker {
    /// The plugin is loaded; later errors belong to the call.
    Loaded,
    /// The plugin could not be loaded.
    NotLoaded {
        /// Why.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// A heartbeat, independent of the stage.
    Heartbeat,
    /// From its supervisor: no more heartbeats.
    Silent {
        /// How long it has been silent.
        seconds: u64,
    },
    /// Lines for the log.
    Log(Vec<Line>),
    /// Points of metric series.
    Metrics(Vec<Points>),
    /// The stage's progress.
    Progress(Progress),
    /// An artifact has been published.
    Artifact {
        /// The plugin's id for it.
        id: u64,
        /// What it is.
        record: Box<ArtifactRecord>,
    },
    /// The plugin kept calling after `run` had returned.
    Late {
        /// So often.
        calls: u64,
    },
    /// The call succeeded; the last frame.
    Answer(Answer),
    /// The call failed; the last frame.
    Failed(Failure),
}

/// A call's result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Call::Describe`].
    Description(Box<Description>),
    /// To [`Call::Probe`].
    Devices(Vec<Device>),
    /// To [`Call::Validate`], one list per job.
    Findings(Vec<Vec<Diagnostic>>),
    /// To [`Call::Provoke`], one per job.
    Provoked(Vec<Result<Vec<Diagnostic>, Failure>>),
    /// To [`Call::Run`].
    Result(StageResult),
}

/// A line that a plugin wrote to the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// `retort_abi::LogLevel as u32`.
    pub level: u32,
    /// What it says.
    pub text: String,
    /// When: milliseconds since 1970.
    pub at: i64,
}

/// Points of a metric series, column by column, because there may be very many.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(try_from = "Columns")]
pub struct Points {
    /// Name of the series.
    pub series: String,
    /// Step of each.
    pub steps: Vec<u64>,
    /// The bits of each value, because JSON has neither NaN nor infinity.
    #[serde(with = "bits")]
    pub values: Vec<f64>,
    /// When: milliseconds since 1970.
    pub at: Vec<i64>,
}

/// [`Points`] as received: columns may have different lengths.
#[derive(Deserialize)]
struct Columns {
    series: String,
    steps: Vec<u64>,
    #[serde(with = "bits")]
    values: Vec<f64>,
    at: Vec<i64>,
}

impl TryFrom<Columns> for Points {
    type Error = String;

    fn try_from(columns: Columns) -> Result<Self, String> {
        let Columns {
            series,
            steps,
            values,
            at,
        } = columns;
        let (n, v, t) = (steps.len(), values.len(), at.len());
        if (v, t) != (n, n) {
            return Err(format!("points of {n} steps, {v} values and {t} times"));
        }
        Ok(Self {
            series,
            steps,
            values,
            at,
        })
    }
}

impl PartialEq for Points {
    /// NaN equals NaN here: points are compared as data.
    fn eq(&self, other: &Self) -> bool {
        let bits = |points: &Self| -> Vec<u64> {
            points.values.iter().map(|value| value.to_bits()).collect()
        };
        (&self.series, &self.steps, bits(self), &self.at)
            == (&other.series, &other.steps, bits(other), &other.at)
    }
}

/// A stage's progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Units done.
    pub done: u64,
    /// The total; 0 if unknown.
    pub total: u64,
    /// Of what: `steps`, `samples`.
    pub unit: String,
}

/// Why a frame is invalid.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length is invalid.
    #[error("a frame of {length} bytes is longer than the {LIMIT} allowed")]
    TooLong {
        /// As claimed.
        length: usize,
    },
    /// It is short, but would be large in memory.
    #[error("a message of {length} bytes would take more than {} MiB of memory", HEAVIEST_VALUE >> 20)]
    TooManyElements {
        /// Its length.
        length: usize,
    },
    /// The bytes are no message.
    #[error("invalid frame: {0}")]
    Malformed(serde_json::Error),
}

/// A message as bytes of the wire.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message).map_err(FrameError::Malformed)?;
    let length = bytes.len() - 4;
    if length > LIMIT {
        return Err(FrameError::TooLong { length });
    }
    // LIMIT fits into 32 bits.
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

/// Parses a message from JSON.
///
/// # Errors
/// [`FrameError::TooManyElements`], [`FrameError::Malformed`].
pub fn decode<T: DeserializeOwned>(text: &[u8]) -> Result<T, FrameError> {
    let length = text.len();
    json::check_weight(text, HEAVIEST_VALUE).map_err(|_| FrameError::TooManyElements { length })?;
    serde_json::from_slice(text).map_err(FrameError::Malformed)
}

/// Bytes received so far, from which whole frames are taken.
#[derive(Debug, Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    /// Bytes of `bytes` already consumed.
    taken: usize,
}

impl Inbox {
    /// Adds received bytes.
    pub fn extend(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the next whole frame, if there is one.
    ///
    /// # Errors
    /// [`FrameError`]; after that nothing on this socket can be trusted.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let rest = &self.bytes[self.taken..];
        let Some((length, rest)) = rest.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > LIMIT {
            return Err(FrameError::TooLong { length });
        }
        let Some(frame) = rest.get(..length) else {
            return Ok(None);
        };
        let message = decode(frame)?;
        self.taken += 4 + length;
        Ok(Some(message))
    }
}

/// Floats as their bits.
mod bits {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(|value| value.to_bits()))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        let bits = Vec::<u64>::deserialize(deserializer)?;
        Ok(bits.into_iter().map(f64::from_bits).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(values: &[f64]) -> Points {
        Points {
            series: "loss".into(),
            steps: vec![u64::MAX; values.len()],
            values: values.to_vec(),
            at: vec![7; values.len()],
        }
    }

    /// Sends the messages in pieces of `size` bytes and expects them back.
    #[track_caller]
    fn check(messages: &[FromWorker], size: usize) {
        let wire: Vec<u8> = messages
            .iter()
            .flat_map(|message| encode(message).unwrap())
            .collect();
        let (mut inbox, mut received) = (Inbox::default(), Vec::new());
        for piece in wire.chunks(size) {
            inbox.extend(piece);
            while let Some(message) = inbox.take().unwrap() {
                received.push(message);
            }
        }
        assert_eq!(messages, received);
    }

    #[test]
    fn frames_survive_any_cutting() {
        let messages = [
            FromWorker::Loaded,
            FromWorker::Metrics(vec![points(&[f64::NAN, f64::NEG_INFINITY, -0.1])]),
            FromWorker::Log(vec![Line {
                level: 3,
                text: "ζ\n\0".into(),
                at: -1,
            }]),
        ];
        for size in [1, 3, 4, 5, 1000] {
            check(&messages, size);
        }
    }

    #[test]
    fn what_is_small_on_the_wire_and_large_in_memory_is_refused() {
        for (one, count) in [("[],", 4 << 20), ("{\"\":0},", 1 << 20), ("0,", 16 << 20)] {
            let summary = format!("[{}0]", one.repeat(count));
            let text =
                format!("{{\"answer\":{{\"result\":{{\"output\":1,\"summary\":{summary}}}}}}}");
            let error = decode::<FromWorker>(text.as_bytes()).unwrap_err();
            assert!(
                matches!(error, FrameError::TooManyElements { .. }),
                "{one}: {error}"
            );
        }
        // Equally long, but all text.
        let text = "[{,\\\"".repeat(6 << 20);
        let line = Line {
            level: 3,
            text,
            at: 0,
        };
        let long = serde_json::to_vec(&FromWorker::Log(vec![line.clone()])).unwrap();
        assert!(long.len() > LIMIT / 2);
        assert_eq!(
            decode::<FromWorker>(&long).unwrap(),
            FromWorker::Log(vec![line])
        );
        // The record of an artifact with a hundred thousand files.
        let file = r#"{"path":"a","size":1,"hash":"b"},"#.repeat(100_000);
        let text = format!("[{}]", file.trim_end_matches(','));
        assert_eq!(
            decode::<Vec<crate::store::ArtifactFile>>(text.as_bytes())
                .unwrap()
                .len(),
            100_000
        );
    }

    #[test]
    fn nonsense_is_refused() {
        let mut inbox = Inbox::default();
        inbox.extend(b"hello, world");
        assert!(matches!(
            inbox.take::<FromWorker>(),
            Err(FrameError::TooLong { .. })
        ));
        let mut inbox = Inbox::default();
        let uneven = br#"{"metrics":[{"series":"a","steps":[1,2],"values":[0],"at":[0,0]}]}"#;
        inbox.extend(&(uneven.len() as u32).to_le_bytes());
        inbox.extend(uneven);
        let error = inbox.take::<FromWorker>().unwrap_err().to_string();
        assert!(error.contains("2 steps, 1 values and 2 times"), "{error}");
        let mut inbox = Inbox::default();
        inbox.extend(&[2, 0, 0, 0, b'{', b'!']);
        assert!(matches!(
            inbox.take::<FromWorker>(),
            Err(FrameError::Malformed(_))
        ));
    }
}
