//! `retort log` and `retort tail`.

use std::time::Duration;

use clap::ValueEnum;

use crate::artifact::Layout;
use crate::cli::spooled::Spools;
use crate::cli::{Context, Error, Exit, Format, FormatArgs, detached, output, why};
use crate::cluster::slurm::SlurmError;
use crate::store::{Access, LogSource, RunDetail, RunId, RunLine, RunState, Store, Time};
use crate::table::{Cell, CellStyle, Rows};
use crate::terminal::{clean_line, paint};

/// How often a running run is polled for new lines.
const INTERVAL: Duration = Duration::from_millis(300);
/// How often Slurm is asked about a detached run.
const ASK: Duration = Duration::from_secs(10);
/// How often the spools of its jobs are read, on a shared file system.
const LOOK: Duration = Duration::from_secs(2);
/// Lines read at a time.
const BATCH: u32 = 10_000;

/// Arguments of `log`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The run: an id or a prefix of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN", default_value = "latest")]
    pub run: String,
    /// Which lines.
    #[command(flatten)]
    pub which: WhichArgs,
    /// Only the last N lines.
    #[arg(short = 'n', long, value_name = "N")]
    pub lines: Option<usize>,
    /// How to print; a table is one text line for each.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `tail`.
#[derive(Debug, clap::Args)]
pub struct TailArgs {
    /// The run: an id or a prefix of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN", default_value = "latest")]
    pub run: String,
    /// Which lines.
    #[command(flatten)]
    pub which: WhichArgs,
    /// Begin with the last N lines.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 10)]
    pub lines: usize,
    /// How to print; a table is one text line for each, JSON an object per line.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Which lines of a log.
#[derive(Debug, Clone, clap::Args)]
pub struct WhichArgs {
    /// Only lines from this stage.
    #[arg(long, value_name = "STAGE")]
    pub stage: Option<String>,
    /// The lowest level to show.
    #[arg(long, value_name = "LEVEL", default_value = "trace")]
    pub level: Level,
}

/// How much a line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// Errors.
    Error,
    /// Warnings too.
    Warn,
    /// Informational messages of the stages too.
    Info,
    /// What plugins print too.
    Debug,
    /// Everything.
    Trace,
}

impl WhichArgs {
    fn means(&self, line: &RunLine) -> bool {
        line.line.level <= self.level as u32 + 1
            && self.stage.as_ref().is_none_or(|stage| line.stage == *stage)
    }

    /// Refuses a stage that the run does not have: no line would ever come. The stages of a queued run may not be recorded yet.
    async fn check(&self, store: &Store, run: &RunId) -> Result<(), Error> {
        let Some(name) = &self.stage else {
            return Ok(());
        };
        let run = store.run_detail(run).await?;
        let has = run.stages.iter().any(|stage| stage.name == *name);
        match has || run.summary.state == RunState::Queued {
            true => Ok(()),
            false => Err(why::no_such_stage(&run, name)),
        }
    }
}

/// Prints a run's log.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let layout = Layout::new(&context.store)?;
    let lines = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let run = store.resolve_run(&args.run).await?;
        args.which.check(&store, &run).await?;
        let mut lines = Vec::new();
        let mut after = 0;
        loop {
            let more = store.run_log(&run, after, BATCH).await?;
            let Some(last) = more.last() else { break };
            after = last.key;
            lines.extend(more.into_iter().filter(|line| args.which.means(line)));
        }
        let state = store.run_detail(&run).await?.summary.state;
        if has_no_runner(&store, &run, state).await? {
            let more = Spools::default().lines(&store, &layout, &run).await?;
            lines.extend(more.into_iter().filter(|line| args.which.means(line)));
        }
        store.close().await;
        Ok::<_, Error>(lines)
    })?;
    let first = args
        .lines
        .map_or(0, |count| lines.len().saturating_sub(count));
    let lines = &lines[first..];
    let text = match args.format.get() {
        Format::Table => texts(lines, context.color_stdout()),
        Format::Json => format!("{:#}\n", serde_json::json!(lines)),
        Format::Csv | Format::Md => rows(lines).render(args.format.style(context)),
    };
    output::print(&text)?;
    if lines.is_empty() && !context.quiet {
        output::say("no match");
    }
    Ok(())
}

/// Prints the last lines of a run's log, and new ones until the run has ended.
pub fn tail(args: &TailArgs, context: &Context) -> Result<(), Error> {
    let layout = Layout::new(&context.store)?;
    let ended = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let run = store.resolve_run(&args.run).await?;
        args.which.check(&store, &run).await?;
        let mut recent = Vec::new();
        let mut spools = Spools::default();
        let mut after = 0;
        let mut begun = false;
        let mut headed = false;
        let (mut silence, mut cannot_ask) = (None, None);
        let (mut ask_at, mut look_at) = (tokio::time::Instant::now(), tokio::time::Instant::now());
        loop {
            // Another machine may have taken the store up since the last look.
            store.check_host().await?;
            if tokio::time::Instant::now() >= ask_at {
                cannot_ask = ask(&store, &run, &mut silence, context).await?;
                ask_at = tokio::time::Instant::now() + ASK;
            }
            // Read the state first, so that everything logged before the end is still printed.
            let detail = store.run_detail(&run).await?;
            loop {
                let more = store.run_log(&run, after, BATCH).await?;
                let Some(last) = more.last() else { break };
                after = last.key;
                let new = more.into_iter().filter(|line| !spools.has_given(line));
                recent.extend(new.filter(|line| args.which.means(line)));
            }
            let state = detail.summary.state;
            let over = !state.is_under_way();
            if (over || cannot_ask.is_some() || tokio::time::Instant::now() >= look_at)
                && has_no_runner(&store, &run, state).await?
            {
                look_at = tokio::time::Instant::now() + LOOK;
                let more = spools.lines(&store, &layout, &run).await?;
                recent.extend(more.into_iter().filter(|line| args.which.means(line)));
            }
            if !std::mem::replace(&mut begun, true) {
                recent.drain(..recent.len().saturating_sub(args.lines));
            }
            // Column heads are printed once, at the beginning.
            output::print(&shown(&recent, args, &mut headed, context))?;
            recent.clear();
            if over {
                store.close().await;
                return Ok::<_, Error>((run, detail));
            }
            if let Some(error) = cannot_ask.take() {
                store.close().await;
                return Err(error);
            }
            tokio::time::sleep(INTERVAL).await;
        }
    })?;
    say_end(&ended.0, &ended.1, context);
    Ok(())
}

/// Asks Slurm about the run, if that has no runner. Returns an error if it can never be asked here: then nobody on this machine
/// will learn of the run's end.
async fn ask(
    store: &Store,
    run: &RunId,
    silence: &mut Option<String>,
    context: &Context,
) -> Result<Option<Error>, Error> {
    let asked = detached::ask(store).await?;
    let Some(error) = asked.silence else {
        *silence = None;
        return Ok(None);
    };
    if !asked.left.iter().any(|left| left.run == *run) {
        return Ok(None);
    }
    if matches!(error, SlurmError::NotInstalled { .. }) {
        let message = format!("the jobs of run {run} cannot be followed here");
        return Ok(Some(
            Error::new(Exit::Internal, message).cause(&error).hint(
                "run `retort tail` or `retort resume` on a machine that has Slurm's programs",
            ),
        ));
    }
    let said = error.to_string();
    // It is asked again, and says the same for as long as it is down.
    if silence.as_ref() != Some(&said) && !context.quiet {
        output::say(&format!("{said}; the run is shown as it was last known"));
    }
    *silence = Some(said);
    Ok(None)
}

/// Whether no runner collects the output of a run's jobs.
async fn has_no_runner(store: &Store, run: &RunId, state: RunState) -> Result<bool, Error> {
    if !state.is_under_way() {
        return Ok(true);
    }
    let left = store.left_to_scheduler().await?;
    Ok(left.iter().any(|left| left.run == *run))
}

fn shown(lines: &[RunLine], args: &TailArgs, headed: &mut bool, context: &Context) -> String {
    match args.format.get() {
        Format::Table => texts(lines, context.color_stdout()),
        Format::Json => lines
            .iter()
            .map(|line| format!("{}\n", serde_json::json!(line)))
            .collect(),
        Format::Csv | Format::Md => {
            let style = args.format.style(context);
            match std::mem::replace(headed, true) {
                false => rows(lines).render(style),
                true => rows(lines).render_more(style),
            }
        }
    }
}

fn say_end(run: &RunId, detail: &RunDetail, context: &Context) {
    if !context.quiet {
        let error = detail.summary.error.as_deref().unwrap_or_default();
        let why = if error.is_empty() {
            String::new()
        } else {
            format!(": {error}")
        };
        output::say(&format!("run {run} {}{why}", detail.summary.state));
    }
}

/// One line of text for each: time (UTC), stage, message.
fn texts(lines: &[RunLine], color: bool) -> String {
    let width = lines
        .iter()
        .map(|line| line.stage.chars().count())
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    for RunLine { stage, line, .. } in lines {
        let time = moment(line.at);
        let (mark, code) = match (line.level, line.source) {
            (1, _) => ("error: ", "31"),
            (2, _) => ("warning: ", "33"),
            (_, LogSource::Stdout | LogSource::Stderr) => ("", "2"),
            _ => ("", ""),
        };
        // Always on one line: text after a line feed could be mistaken for a line of another stage.
        let said = paint(&clean_line(&format!("{mark}{}", line.text)), code, color);
        text += &format!("{time} {stage:width$}  {said}\n");
    }
    text
}

/// `2026-01-31 12:00:00Z`: to the second, and in words that sort.
fn moment(at: Time) -> String {
    let time = at.to_string();
    // RFC 3339: date and time of day stand at fixed places.
    let (date, clock) = (time.get(..10), time.get(11..19));
    format!(
        "{} {}Z",
        date.unwrap_or_default(),
        clock.unwrap_or_default()
    )
}

fn rows(lines: &[RunLine]) -> Rows {
    let mut rows = Rows::new(&["at", "stage", "level", "source", "text"]);
    for RunLine { stage, line, .. } in lines {
        let level = match line.level {
            1 => Cell::from("error").style(CellStyle::Error),
            2 => Cell::from("warn").style(CellStyle::Warning),
            3 => "info".into(),
            4 => "debug".into(),
            _ => "trace".into(),
        };
        rows.push([
            line.at.to_string().into(),
            stage.as_str().into(),
            level,
            line.source.name().into(),
            line.text.as_str().into(),
        ]);
    }
    rows
}
