//! The only place that turns a module's error into an exit code, a message and a hint.
//!
//! Modules of the library know nothing of exit codes: each gets a `From` here.

use std::error::Error as StdError;
use std::path::Path;

use crate::artifact;
use crate::cli::{Context, output};
use crate::diagnostic::Report;
use crate::executor::ExecutorError;
use crate::filter::FilterError;
use crate::input::InputError;
use crate::plan::DescribeError;
use crate::plan::decision::SelectError;
use crate::settings::SettingsError;
use crate::store::StoreError;
use crate::terminal::paint;

/// Exit codes: public, documented in `retort --help`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Success = 0,
    /// A bug, or the machine: a store that cannot be written, a full disk.
    Internal = 1,
    /// The command line is wrong.
    Usage = 2,
    /// The recipe is wrong.
    InvalidRecipe = 3,
    /// Nothing matches what was asked for.
    NothingMatches = 4,
    /// A plugin is missing or broken.
    Plugin = 5,
    /// The store is in use; trying again may help (EX_TEMPFAIL).
    StoreBusy = 75,
    /// A stage failed.
    StageFailed = 100,
    /// The terminal was closed.
    HungUp = 129,
    /// Interrupted by Ctrl-C.
    Interrupted = 130,
    /// Terminated by SIGTERM.
    Terminated = 143,
}

impl Exit {
    /// The numeric exit code.
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// Why a command failed.
#[derive(Debug, Clone)]
pub struct Error {
    /// With which code to leave.
    pub exit: Exit,
    /// What happened, where, and what was expected. Empty if everything has been printed already.
    pub message: String,
    /// Causes, outermost first.
    pub causes: Vec<String>,
    /// What to do.
    pub hint: Option<String>,
    /// Findings about a recipe, a filter or a settings file, shown before the message.
    pub report: Option<Box<Report>>,
}

impl Error {
    /// An error with a message.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            causes: Vec::new(),
            hint: None,
            report: None,
        }
    }

    /// When everything has been printed already.
    pub fn said(exit: Exit) -> Self {
        Self::new(exit, "")
    }

    /// Adds an error and its sources as causes.
    pub fn cause(mut self, error: &dyn StdError) -> Self {
        let mut next = Some(error);
        while let Some(error) = next {
            self.causes.push(error.to_string());
            next = error.source();
        }
        self
    }

    /// Says what to do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// An error while planning: the store's, or that of reading a file.
    pub fn of_history(error: Box<dyn StdError>) -> Self {
        match error.downcast::<StoreError>() {
            Ok(error) => (*error).into(),
            Err(error) => match error.downcast::<InputError>() {
                Ok(error) => (*error).into(),
                Err(error) => Self::new(Exit::Internal, error.to_string()),
            },
        }
    }

    /// An output file that cannot be written, or that would replace a file of another kind.
    pub fn unwritten(path: &Path, error: &std::io::Error) -> Self {
        let path = path.display();
        match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Self::new(Exit::Usage, format!("{path} is there already"))
                    .cause(error)
                    .hint("name another file, or remove this one")
            }
            _ => Self::new(Exit::Internal, format!("{path} cannot be written")).cause(error),
        }
    }

    /// Writes the error to stderr.
    pub fn show(&self, context: &Context) {
        if let Some(report) = &self.report {
            output::say(&report.render(context.color_stderr()));
        }
        if self.message.is_empty() {
            return;
        }
        let color = context.color_stderr();
        let mut text = format!("{}: {}", paint("error", "1;31", color), self.message);
        for cause in &self.causes {
            text.push_str(&format!("\n  because: {cause}"));
        }
        let hint = self.hint.as_deref().or_else(|| artifact::repair_of(&text));
        if let Some(hint) = hint {
            text.push_str(&format!("\n  {}: {hint}", paint("help", "1;36", color)));
        }
        output::say(&text);
    }
}

impl From<std::io::Error> for Error {
    /// An error of printing: a reader that went away (`| head`) counts as success.
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::said(Exit::Success),
            _ => Self::new(Exit::Internal, "the output could not be written").cause(&error),
        }
    }
}

impl From<Report> for Error {
    fn from(report: Report) -> Self {
        let exit = if report.only_plugins() {
            Exit::Plugin
        } else {
            Exit::InvalidRecipe
        };
        let errors = report.errors();
        // A single finding needs no summary.
        let message = if errors > 1 {
            format!("{errors} errors in {}", report.path.display())
        } else {
            String::new()
        };
        Self {
            report: Some(Box::new(report)),
            ..Self::new(exit, message)
        }
    }
}

impl From<FilterError> for Error {
    fn from(error: FilterError) -> Self {
        Self {
            report: Some(Box::new(error.into())),
            ..Self::said(Exit::Usage)
        }
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let error = match error {
            StoreError::Filter(error) => return (*error).into(),
            error => error,
        };
        if let Some(message) = error.of_disk() {
            let message = format!(
                "the disk with the store's history.db does not read or write it: {message}"
            );
            return Self::new(Exit::Internal, message).hint(artifact::DISK);
        }
        let (exit, hint) = match &error {
            StoreError::Missing { .. } => (
                Exit::NothingMatches,
                Some("`retort run RECIPE` makes one; --store names another"),
            ),
            StoreError::NoRun { runs: 0, .. } => (
                Exit::NothingMatches,
                Some("there are no runs yet; `retort run RECIPE` makes one"),
            ),
            StoreError::NoRun { .. } => (
                Exit::NothingMatches,
                Some("`retort runs list` shows them all"),
            ),
            StoreError::NothingToResume { imported: 0 } => (
                Exit::NothingMatches,
                Some("there are no runs yet; `retort run RECIPE` makes one"),
            ),
            StoreError::NothingToResume { .. } => (
                Exit::NothingMatches,
                Some(
                    "name it to continue one of them: `retort resume RUN`; `retort runs list` shows them",
                ),
            ),
            StoreError::NotMlflow { .. } => (
                Exit::Usage,
                Some("`mlflow db upgrade sqlite:///mlflow.db` makes one"),
            ),
            StoreError::NotImportable { .. } => (
                Exit::Usage,
                Some(
                    "nothing was imported; `retort --store DIR runs export -o FILE` writes a valid file",
                ),
            ),
            StoreError::HistoryGone { .. } => (
                Exit::Internal,
                Some("`retort doctor` says what can be done"),
            ),
            StoreError::NoArtifact { .. } => (
                Exit::NothingMatches,
                Some("`retort artifacts list` shows them all; RUN/STAGE names a stage's output"),
            ),
            StoreError::AmbiguousArtifact { .. } => {
                (Exit::NothingMatches, Some("give more of the hash"))
            }
            StoreError::NoSweep { .. } => (
                Exit::NothingMatches,
                Some("`retort sweep list` shows them all; `retort run RECIPE --sweep` makes one"),
            ),
            StoreError::AmbiguousRun { .. } | StoreError::AmbiguousSweep { .. } => {
                (Exit::NothingMatches, Some("give more of the id"))
            }
            StoreError::Busy | StoreError::InUse => (Exit::StoreBusy, None),
            StoreError::Elsewhere { .. } => (
                Exit::StoreBusy,
                Some(
                    "use that host, or retry when it has ended; a dead machine is forgotten after two minutes",
                ),
            ),
            StoreError::FileTooLong { .. } => (Exit::Internal, Some(artifact::FILE_LIMIT)),
            _ => (Exit::Internal, None),
        };
        let shown = Self::new(exit, error.to_string());
        let damaged =
            "`retort doctor` says what can be saved, `retort runs export -o FILE` saves it";
        let hint = match &error {
            StoreError::Damaged { .. } => Some(damaged),
            _ => hint,
        };
        match hint {
            Some(hint) => shown.hint(hint),
            None => shown,
        }
    }
}

impl From<InputError> for Error {
    /// A path in a recipe is not of the kind its option expects.
    fn from(error: InputError) -> Self {
        Self::new(Exit::InvalidRecipe, error.to_string())
    }
}

impl From<SettingsError> for Error {
    fn from(error: SettingsError) -> Self {
        match error.report {
            Some(report) => Self {
                report: Some(report),
                ..Self::said(Exit::Usage)
            },
            None => Self {
                hint: error.hint,
                ..Self::new(Exit::Usage, error.message)
            },
        }
    }
}

impl From<DescribeError> for Error {
    fn from(error: DescribeError) -> Self {
        Self {
            hint: error.hint,
            ..Self::new(Exit::Plugin, error.message)
        }
    }
}

impl From<SelectError> for Error {
    fn from(error: SelectError) -> Self {
        let hint = match &error {
            SelectError::NoSuchStage { hint, .. } => hint.clone(),
            SelectError::Nothing { .. } => None,
        };
        Self {
            hint,
            ..Self::new(Exit::NothingMatches, error.to_string())
        }
    }
}

impl From<ExecutorError> for Error {
    fn from(error: ExecutorError) -> Self {
        match error {
            ExecutorError::Store(error) => error.into(),
            ExecutorError::Input(error) => error.into(),
            ExecutorError::NoArtifact { .. } => Self::new(Exit::NothingMatches, error.to_string())
                .hint("`retort artifacts list` lists them; `retort runs import` adds others"),
            ExecutorError::Damaged { .. } => {
                Self::new(Exit::Internal, error.to_string()).hint(artifact::REPAIR)
            }
            ExecutorError::Missing { .. } => Self::new(Exit::NothingMatches, error.to_string())
                .hint("run it without --from first"),
            ExecutorError::Interrupted => Self::new(Exit::Interrupted, error.to_string()),
            ExecutorError::Artifact(_) | ExecutorError::System { .. } => {
                Self::new(Exit::Internal, error.to_string())
            }
        }
    }
}
