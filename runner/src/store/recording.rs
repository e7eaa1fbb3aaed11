//! An attempt's output, written together: points, lines, and the read positions of its jobs' spools.
//!
//! A read mark means that an element's records before it are in the history. So it is written together with them or not at all:
//! a runner that takes over a job continues after the mark, and neither repeats nor omits anything.

use super::{AttemptId, Batch, JobKey, LogLine, Store, StoreError};

/// The read position in an element's records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadMark {
    /// The job.
    pub job: JobKey,
    /// Its element.
    pub element: usize,
    /// The number of the first record that has not been processed.
    pub number: u64,
}

impl ReadMark {
    /// The position after a record.
    pub fn after(job: JobKey, element: usize, record: u64) -> Self {
        Self {
            job,
            element,
            number: record.saturating_add(1),
        }
    }
}

/// What is written together.
#[derive(Debug, Default)]
pub struct Recording {
    /// Points of any number of series.
    pub points: Vec<Batch>,
    /// Lines of the log.
    pub lines: Vec<LogLine>,
    /// The read positions of elements after these points and lines.
    pub marks: Vec<ReadMark>,
}

impl Recording {
    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty() && self.lines.is_empty() && self.marks.is_empty()
    }
}

impl Store {
    /// Appends points and lines to an attempt, and stores the read marks of its jobs: all of it or nothing.
    ///
    /// # Errors
    /// [`StoreError::Busy`], [`StoreError::Full`], [`StoreError::ReadOnly`]: never a reason to fail a stage. Nothing is
    /// recorded then, and the call may be repeated.
    pub async fn record(
        &self,
        attempt: AttemptId,
        recording: &Recording,
    ) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        // Removed now and put back on success: after a failed transaction it would be wrong, and is read again when needed.
        let series = match recording.points.as_slice() {
            [] => None,
            points => {
                let known = self.lock_series().remove(&attempt).unwrap_or_default();
                Some(super::series::append_points(&mut write, attempt, known, points).await?)
            }
        };
        super::log::append_lines(&mut write, attempt, &recording.lines).await?;
        super::jobs::note_marks(&mut write, &recording.marks).await?;
        write.commit().await?;
        if let Some(series) = series {
            self.lock_series().insert(attempt, series);
        }
        Ok(())
    }

    /// Appends points, of any number of series, to an attempt.
    ///
    /// # Errors
    /// As [`Store::record`].
    pub async fn append_metrics(
        &self,
        attempt: AttemptId,
        points: &[Batch],
    ) -> Result<(), StoreError> {
        let recording = Recording {
            points: points.to_vec(),
            ..Recording::default()
        };
        self.record(attempt, &recording).await
    }

    /// Appends lines to the log of an attempt.
    ///
    /// # Errors
    /// As [`Store::record`].
    pub async fn append_log(
        &self,
        attempt: AttemptId,
        lines: &[LogLine],
    ) -> Result<(), StoreError> {
        let recording = Recording {
            lines: lines.to_vec(),
            ..Recording::default()
        };
        self.record(attempt, &recording).await
    }
}
