//! The same work in PyTorch, in another process: `tests/peers/speed.py` and `tests/peers/stages.py`.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use retort_engine::error::{Error, Result};

use super::ratio::Side;
use super::reference::{Drawn, Phase, Reference};
use super::stage_row::{RowFiles, StageRow};
use super::timed::Timed;
use crate::golden;

/// PyTorch in one type, as it is or compiled.
pub struct Peer {
    /// A Python that has torch.
    pub python: String,
    /// `f32`, or `bf16` by autocast.
    pub dtype: &'static str,
    /// Threads of torch.
    pub threads: usize,
    /// The mode in which torch.compile makes kernels, if any.
    pub compile: Option<String>,
}

impl Peer {
    /// Seconds of phases, named as the script names them, of a family at a batch, on a device of torch. Under `compile` those
    /// that it took to compile them.
    pub(crate) fn run(
        &self,
        device: &str,
        family: &str,
        batch: usize,
        phases: &[&str],
    ) -> Result<BTreeMap<String, f64>> {
        let [batch, threads] = [batch, self.threads].map(|n| n.to_string());
        let mut arguments = vec![family, self.dtype, batch.as_str(), threads.as_str()];
        arguments.extend(phases);
        self.script("speed.py", device, &arguments)
    }

    /// The figures that a script prints.
    fn script(
        &self,
        name: &str,
        device: &str,
        arguments: &[&str],
    ) -> Result<BTreeMap<String, f64>> {
        let script = golden::folder().with_file_name("peers").join(name);
        let mut command = Command::new(&self.python);
        command
            .arg(&script)
            .args(arguments)
            .env("DEVICE", device)
            .stderr(Stdio::inherit());
        match &self.compile {
            Some(mode) => command.env("COMPILE", mode),
            None => command.env_remove("COMPILE"),
        };
        let output = command
            .output()
            .map_err(Error::io(Path::new(&self.python)))?;
        serde_json::from_slice(&output.stdout)
            .map_err(|e| Error::data(&script, format!("{e}; it ended with {}", output.status)))
    }

    /// Prints how long the compiler took.
    fn tell(&self, what: &str, figures: &BTreeMap<String, f64>) {
        if let Some(seconds) = figures.get("compile") {
            println!("{what}: {} took {seconds:.0} s to compile", self.name());
        }
    }
}

impl Timed for Peer {
    fn name(&self) -> &str {
        match (self.dtype, &self.compile) {
            ("f32", None) => "PyTorch",
            (_, None) => "PyTorch bf16",
            ("f32", _) => "compiled",
            _ => "compiled bf16",
        }
    }

    fn side(&self) -> Side {
        match (self.dtype, &self.compile) {
            ("f32", None) => Side::Full,
            (_, None) => Side::Half,
            _ => Side::Compiled,
        }
    }

    fn times(&mut self, r: &Reference, _: &Drawn, phases: &[Phase]) -> Result<Vec<Option<f64>>> {
        let keys: Vec<&str> = phases.iter().filter_map(|p| p.key()).collect();
        if keys.is_empty() {
            return Ok(vec![None; phases.len()]);
        }
        let times = self.run("cpu", &r.family.to_string(), r.batch, &keys)?;
        self.tell(r.name, &times);
        let of = |p: &Phase| p.key().and_then(|key| times.get(key).copied());
        Ok(phases.iter().map(of).collect())
    }

    fn stage_seconds(&mut self, row: &StageRow, files: &RowFiles) -> Result<Option<f64>> {
        let description = row.description(files)?.to_string();
        let threads = self.threads.to_string();
        let arguments = [description.as_str(), self.dtype, threads.as_str()];
        let figures = self.script("stages.py", "cpu", &arguments)?;
        self.tell(&row.title, &figures);
        Ok(figures.get("seconds").copied())
    }
}
