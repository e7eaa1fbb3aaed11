//! Output of a run's jobs that no runner has collected yet, read from their spools without changing them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use retort_abi::{LogLevel, Part};

use crate::artifact::Layout;
use crate::cli::Error;
use crate::cluster::spool::{self, Reader, Record, SpoolEvent};
use crate::executor::spec::title;
use crate::frame::FromWorker;
use crate::store::{LogLine, LogSource, RunId, RunLine, Store, Time};
use crate::worker::shortened;

/// The spools of a run without a runner. Lines that a runner collects later are recognised by their content.
#[derive(Default)]
pub struct Spools {
    /// The elements of each job, by its name.
    jobs: HashMap<String, Vec<Element>>,
    /// How often each line was returned that the history did not have yet.
    given: HashMap<(String, i64, String), usize>,
}

struct Element {
    stage: String,
    title: String,
    reader: Reader,
    /// Records below this number are in the history.
    mark: u64,
}

impl Spools {
    /// The new lines since the last call, in order of time.
    pub async fn lines(
        &mut self,
        store: &Store,
        layout: &Layout,
        run: &RunId,
    ) -> Result<Vec<RunLine>, Error> {
        for (stage, digest, job) in store.open_jobs_of(run).await? {
            let elements = match self.jobs.entry(job.name) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let dir = layout.work(&digest).join(spool::FOLDER).join(new.key());
                    // A spool that cannot be read now is read later; the runner that collects it reports its errors.
                    let Ok(spec) = spool::read_job_spec(&dir) else {
                        continue;
                    };
                    let parts = spec.elements.iter().enumerate();
                    let element = |(number, part): (usize, &Option<Part>)| Element {
                        stage: stage.clone(),
                        title: title(*part),
                        reader: Reader::new(spool::element_dir(&dir, number)),
                        mark: 0,
                    };
                    new.insert(parts.map(element).collect())
                }
            };
            for (element, mark) in job.imported {
                if let Some(element) = elements.get_mut(element) {
                    // A runner may have come, and gone again.
                    element.mark = element.mark.max(mark);
                }
            }
        }
        let elements = self.jobs.values_mut().flatten();
        let mut lines: Vec<RunLine> = elements.flat_map(Element::lines).collect();
        lines.sort_by(|a, b| (a.line.at, &a.stage).cmp(&(b.line.at, &b.stage)));
        for line in &lines {
            *self.given.entry(identity(line)).or_default() += 1;
        }
        Ok(lines)
    }

    /// Whether a line of the history was already returned from a spool.
    pub fn has_given(&mut self, line: &RunLine) -> bool {
        match self.given.get_mut(&identity(line)) {
            Some(count) if *count > 1 => {
                *count -= 1;
                true
            }
            Some(_) => self.given.remove(&identity(line)).is_some(),
            None => false,
        }
    }
}

fn identity(line: &RunLine) -> (String, i64, String) {
    (line.stage.clone(), line.line.at.0, line.line.text.clone())
}

impl Element {
    fn lines(&mut self) -> Vec<RunLine> {
        let mut lines: Vec<LogLine> = Vec::new();
        loop {
            let mut records = Vec::new();
            let more = self.reader.look_on(&mut records);
            let fresh = records
                .into_iter()
                .filter(|record| record.number >= self.mark);
            lines.extend(fresh.flat_map(lines_of));
            // The runner that collects it reports damage.
            if !more.unwrap_or(false) {
                break;
            }
        }
        let line = |mut line: LogLine| {
            // As the runner that collects it records it.
            line.at = line.at.or_now();
            line.text = shortened(&line.text);
            line.text.insert_str(0, &self.title);
            RunLine {
                key: 0,
                stage: self.stage.clone(),
                line,
            }
        };
        lines.into_iter().map(line).collect()
    }
}

/// A record's log line.
fn lines_of(record: Record) -> Vec<LogLine> {
    let said = |level, source, text| {
        vec![LogLine {
            at: Time(record.at),
            level,
            source,
            text,
        }]
    };
    const DEBUG: u32 = LogLevel::Debug as u32;
    const WARN: u32 = LogLevel::Warn as u32;
    match record.word {
        SpoolEvent::Began { job, node, pid } => {
            said(DEBUG, LogSource::Runner, spool::begins(&job, &node, pid))
        }
        SpoolEvent::Line { source, text } => said(DEBUG, source, text),
        SpoolEvent::Frame(FromWorker::Log(lines)) => lines
            .into_iter()
            .map(|line| LogLine {
                at: Time(line.at),
                level: line.level,
                source: LogSource::Plugin,
                text: line.text,
            })
            .collect(),
        SpoolEvent::Over(end) => match end.why_again() {
            Some(reason) => said(WARN, LogSource::Runner, spool::goes_on(reason)),
            None => Vec::new(),
        },
        _ => Vec::new(),
    }
}
