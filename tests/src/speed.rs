//! Times of the phases of distillation at published shapes, with random weights: what `cargo bench --bench speed` prints.
//!
//! Every backend computes the same phases, one after the other in one run, so that the columns may be compared on a busy
//! machine too. Beside each stands the least time that the machine allows: operations over the rate of a large matrix
//! product, or bytes of weights and caches that must be read over the rate at which memory is read, whichever is longer.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use rayon::prelude::*;
use retort_candle::Candle;
use retort_engine::backend::flow;
use retort_engine::backend::{AdamwStep, Backend, FlowSolver, Tensors, Unary};
use retort_engine::bundle::{Family, NetworkConfig, TokenizerConfig};
use retort_engine::error::{Error, Result};
use retort_engine::model::autoencoder::Shape;
use retort_engine::model::{BatchConditioning, Guidance, Teacher};
use retort_engine::published::{self, ShapeHints};
use retort_engine::random::{Sequence, Stream, noise};
use retort_engine::tape::{Variable, backward};
use retort_engine::weights::{self, Loader, ParameterSource, Weights};

use crate::golden;

/// Guidance scale of the teachers: two rows of the batch per image.
const GUIDANCE: f64 = 2.0;
const SOLVER: FlowSolver = FlowSolver { steps: flow::STEPS };

/// A timed phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// All AR steps of the teacher with guidance, tokens by the flow map; the map itself is a separate phase.
    Teacher,
    /// The flow map of those tokens.
    Flow,
    /// One pass of the student.
    Student,
    /// Latents to images.
    Decode,
    /// One step of distillation: forward, cross-entropy, backward, AdamW.
    Train,
    /// The flow map of this many tokens at a time.
    Map(usize),
    /// The same in plain tensor operations.
    Plain(usize),
}

impl Phase {
    const ALL: [Self; 11] = [
        Self::Teacher,
        Self::Flow,
        Self::Student,
        Self::Decode,
        Self::Train,
        Self::Map(1),
        Self::Plain(1),
        Self::Map(4),
        Self::Plain(4),
        Self::Map(256),
        Self::Plain(256),
    ];

    /// Its name in the PyTorch script.
    fn key(self) -> Option<&'static str> {
        match self {
            Self::Teacher => Some("teacher"),
            Self::Student => Some("student"),
            Self::Decode => Some("decode"),
            Self::Train => Some("train"),
            Self::Flow | Self::Map(_) | Self::Plain(_) => None,
        }
    }

    /// Its name in tables.
    fn name(self) -> String {
        match self {
            Self::Teacher => "teacher".into(),
            Self::Flow => "flow map of it".into(),
            Self::Student => "student pass".into(),
            Self::Decode => "decode".into(),
            Self::Train => "training step".into(),
            Self::Map(n) => format!("flow map, {n} at a time"),
            Self::Plain(n) => format!("the same, plain, {n}"),
        }
    }
}

/// A family at its published size, and the batch.
pub struct Reference {
    /// The family.
    pub family: Family,
    /// Its name.
    pub name: &'static str,
    /// The batch.
    pub batch: usize,
    pub(crate) tokenizer: TokenizerConfig,
    pub(crate) network: NetworkConfig,
}

impl Reference {
    /// A family at a published size.
    pub fn new(family: Family, name: &'static str, size: &str, batch: usize) -> Result<Self> {
        let hints = ShapeHints {
            size: Some(size.into()),
            ..Default::default()
        };
        let (tokenizer, network) = published::published(family, &hints)?;
        Ok(Self {
            family,
            name,
            batch,
            tokenizer,
            network,
        })
    }

    /// LlamaGen-B at batch 4 and VAR-d16 at batch 2.
    pub fn all() -> Result<[Self; 2]> {
        Ok([
            Self::new(Family::Llamagen, "LlamaGen-B", "B", 4)?,
            Self::new(Family::Var, "VAR-d16", "d16", 2)?,
        ])
    }

    /// Operations of a phase, a multiplication with its addition counted as two, and bytes in f32 that it must read.
    pub fn work(&self, phase: Phase) -> (f64, f64) {
        let shape = self.network.token_shape();
        let (k, d, l) = (shape.vocabulary, shape.dim, shape.count());
        let (depth, width, block) = match &self.network {
            NetworkConfig::Llamagen(c) => (c.depth, c.width, 4 * c.width + 3 * c.hidden()),
            NetworkConfig::Var(c) => (c.depth, c.width, 12 * c.width),
        };
        let blocks = depth * width * block;
        let weights = (blocks + k * width) as f64;
        let rows = |n: usize| n as f64;
        // Query-key and value products of `seen` keys over all positions.
        let attention = |seen: f64| 4.0 * (depth * width) as f64 * seen;
        let causal = (l * (l + 1) / 2) as f64;
        let flow = |n: f64| {
            // Per evaluation and code: two inner products of D, and about twenty for the exponential.
            let evaluations = (SOLVER.steps + 1) as f64;
            (
                n * evaluations * (k * (4 * d + 20)) as f64,
                n * 4.0 * k as f64,
            )
        };
        match phase {
            Phase::Teacher => {
                let n = rows(2 * self.batch);
                let seen: usize = {
                    let mut before = 0;
                    shape
                        .steps
                        .iter()
                        .map(|&count| {
                            before += count;
                            count * before
                        })
                        .sum()
                };
                let caches = match self.family {
                    Family::Llamagen => 8.0 * (depth * width) as f64 * causal * n,
                    Family::Var => 0.0,
                };
                (
                    n * (2.0 * weights * l as f64 + attention(seen as f64)),
                    4.0 * weights * shape.steps.len() as f64 + caches,
                )
            }
            Phase::Flow => flow(rows(self.batch * l)),
            Phase::Student => {
                let n = rows(self.batch);
                (
                    n * (2.0 * weights * l as f64 + attention(causal)),
                    4.0 * weights,
                )
            }
            Phase::Decode => {
                let c = match &self.tokenizer {
                    TokenizerConfig::Vq(c) => &c.autoencoder,
                    TokenizerConfig::Msvq(c) => &c.autoencoder,
                };
                (rows(self.batch) * decoder(c), 0.0)
            }
            Phase::Train => {
                // Gradients cost twice a forward pass; AdamW reads and writes three tensors and reads a fourth.
                let (flop, _) = self.work(Phase::Student);
                (3.0 * flop, 4.0 * 7.0 * weights)
            }
            Phase::Map(n) | Phase::Plain(n) => flow(rows(n)),
        }
    }
}

/// Operations of a decoder per image.
fn decoder(c: &Shape) -> f64 {
    let levels = c.multipliers.len();
    let mut side = c.map().height as f64;
    let conv = |input: usize, output: usize, kernel: usize, side: f64| {
        2.0 * (input * output * kernel * kernel) as f64 * side * side
    };
    let residual = |input: usize, output: usize, side: f64| {
        let shortcut = if input == output {
            0.0
        } else {
            conv(input, output, 1, side)
        };
        conv(input, output, 3, side) + conv(output, output, 3, side) + shortcut
    };
    let attention = |width: usize, side: f64| {
        4.0 * conv(width, width, 1, side) + 4.0 * width as f64 * side.powi(4)
    };
    let mut width = c.channels * c.multipliers[levels - 1];
    let mut total = conv(c.z_channels, width, 3, side);
    total += 2.0 * residual(width, width, side) + attention(width, side);
    for (i, multiplier) in c.multipliers.iter().rev().enumerate() {
        let output = c.channels * multiplier;
        for _ in 0..=c.res_blocks {
            total += residual(width, output, side);
            width = output;
            if i == 0 {
                total += attention(width, side);
            }
        }
        if i + 1 < levels {
            side *= 2.0;
            total += conv(width, width, 3, side);
        }
    }
    total + conv(width, c.image_channels, 3, side)
}

/// Random weights of a reference, as training would begin with them, but for the heads, which begin at zero and get
/// logits with a spread of 2 here.
pub struct Drawn {
    pub(crate) teacher: Weights,
    pub(crate) student: Weights,
    pub(crate) tokenizer: Weights,
}

impl Drawn {
    pub(crate) fn new(r: &Reference) -> Result<Self> {
        let backend = Candle::open("cpu", "f32", 0)?;
        let draw = |build: &dyn Fn(&mut Loader<'_, Candle>) -> Result<()>| -> Result<Weights> {
            let mut loader = Loader::new(&backend, ParameterSource::Init(1), true, "drawn");
            build(&mut loader)?;
            let mut all = weights::from_params(&loader.into_params())?;
            for head in ["output.weight", "head.weight"] {
                if let Some(w) = all.get_mut(head) {
                    Sequence::new(3, Stream::Init, 0).normals(&mut w.data);
                    let spread = 2.0 / (w.shape[1] as f32).sqrt();
                    w.data.iter_mut().for_each(|x| *x *= spread);
                }
            }
            Ok(all)
        };
        let tokenizer = draw(&|l| r.tokenizer.build(l).map(drop))?;
        let codes = || Loader::new(&backend, ParameterSource::Host(&tokenizer), false, "drawn");
        Ok(Self {
            teacher: draw(&|l| r.network.teacher(l, (&r.tokenizer, &mut codes())).map(drop))?,
            student: draw(&|l| r.network.student(l).map(drop))?,
            tokenizer,
        })
    }
}

/// An implementation that can be timed.
pub trait Timed {
    /// The head of its column.
    fn name(&self) -> &str;
    /// Seconds of a reference's phases, in order, each the least of several repetitions; None if it cannot run.
    fn times(
        &mut self,
        reference: &Reference,
        drawn: &Drawn,
        phases: &[Phase],
    ) -> Result<Vec<Option<f64>>>;
}

/// A backend under a name.
pub struct BackendRun<B: Backend> {
    /// The head of its column.
    pub name: String,
    /// The backend.
    pub backend: B,
}

/// How often a phase is repeated; the shortest time counts.
fn repetitions(first: f64) -> usize {
    if first > 5.0 { 2 } else { 3 }
}

/// The shortest of several repetitions.
pub(crate) fn least(mut once: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut time = || -> Result<f64> {
        let clock = Instant::now();
        once()?;
        Ok(clock.elapsed().as_secs_f64())
    };
    let mut best = time()?;
    for _ in 1..repetitions(best) {
        best = best.min(time()?);
    }
    Ok(best)
}

impl<B: Backend> BackendRun<B> {
    /// Waits until a tensor is computed.
    pub(crate) fn wait(x: &B::Tensor) -> Result<()> {
        let rank = B::shape(x).len();
        let first = (0..rank).try_fold(x.clone(), |x, d| B::narrow(&x, d, 0, 1))?;
        B::to_floats(&first).map(drop)
    }

    /// Seconds of the teacher and of the flow map in one generation.
    fn generation(
        &self,
        teacher: &dyn Teacher<B>,
        codebook: &B::Tensor,
        batch: usize,
    ) -> Result<[f64; 2]> {
        let shape = teacher.token_shape();
        let labels: Vec<u32> = (0..batch as u32).collect();
        let labels = BatchConditioning::Classes(self.backend.indices(&labels, &[batch])?);
        let guidance = Guidance {
            scale: GUIDANCE,
            interval: None,
        };
        let mut generation = teacher.generate(&labels, Some(guidance))?;
        let (mut seconds, mut previous, mut sample) = ([0.0; 2], None, 0);
        for &count in &shape.steps {
            let eps: Vec<f32> = noise(5, sample, batch * count, shape.dim);
            let eps = self.backend.floats(&eps, &[batch * count, shape.dim])?;
            sample += 1;
            let clock = Instant::now();
            let logits = generation.advance(previous.as_ref())?;
            Self::wait(&logits)?;
            seconds[0] += clock.elapsed().as_secs_f64();
            let clock = Instant::now();
            let logits = B::reshape(&logits, &[batch * count, shape.vocabulary])?;
            let ids = B::flow_map(&logits, &eps, codebook, &SOLVER)?;
            previous = Some(B::reshape(&ids, &[batch, count])?);
            B::to_indices(&ids)?;
            seconds[1] += clock.elapsed().as_secs_f64();
        }
        Ok(seconds)
    }

    /// Seconds of the flow map of `n` tokens, fused or in plain operations.
    fn map(&self, r: &Reference, n: usize, plain: bool) -> Result<f64> {
        let (k, d) = r.tokenizer.codebook();
        let floats = |seed, rows, scale: f32| {
            let data: Vec<f32> = noise(seed, 0, rows, d).iter().map(|x| scale * x).collect();
            self.backend.floats(&data, &[rows, d])
        };
        // Codes of about unit length, like LlamaGen's.
        let codebook = floats(1, k, (d as f32).sqrt().recip())?;
        let eps = floats(2, n, 1.0)?;
        let logits: Vec<f32> = noise(3, 0, n, k).iter().map(|x| 2.0 * x).collect();
        let logits = self.backend.floats(&logits, &[n, k])?;
        least(|| {
            let ids = if plain {
                flow::composed::<B>(&logits, &eps, &codebook, &SOLVER)?
            } else {
                B::flow_map(&logits, &eps, &codebook, &SOLVER)?
            };
            B::to_indices(&ids).map(drop)
        })
    }

    /// Seconds of a training step of the student.
    pub(crate) fn train(&self, r: &Reference, drawn: &Drawn) -> Result<f64> {
        let mut loader = Loader::new(
            &self.backend,
            ParameterSource::Host(&drawn.student),
            true,
            "drawn",
        );
        let student = r.network.student(&mut loader)?;
        let params = loader.into_params();
        let zeros = |(_, p): &(String, Variable<B>)| self.backend.full(&p.shape(), 0.0);
        let first: Vec<_> = params.iter().map(zeros).collect::<Result<_>>()?;
        let second: Vec<_> = params.iter().map(zeros).collect::<Result<_>>()?;
        let numbers = AdamwStep {
            lr: 1e-5,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.01,
            correction1: 0.1,
            correction2: 0.05,
            grad_scale: 1.0,
        };
        let (b, shape) = (r.batch, r.network.token_shape());
        let (l, k) = (shape.count(), shape.vocabulary);
        let (eps, labels, kinds) = self.inputs(r)?;
        let targets: Vec<u32> = (0..b * l).map(|i| (i * 37 % k) as u32).collect();
        let targets = self.backend.indices(&targets, &[b * l])?;
        least(|| {
            let prediction = student.predict(&eps, &labels, &kinds)?;
            let continuous = student.continuous(&prediction)?;
            let loss = prediction
                .logits
                .reshape(&[b * l, k])?
                .cross_entropy(&targets)?
                .add(&continuous.unary(Unary::Square)?.mean_all()?)?;
            drop((prediction, continuous));
            let gradients = backward(loss, &params)?;
            for ((((_, p), m), v), g) in params.iter().zip(&first).zip(&second).zip(&gradients) {
                B::adamw_(p.value(), m, v, g, &numbers)?;
            }
            Self::wait(params[0].1.value())
        })
    }

    /// Noise (b, L, D), class ids (b), and that all of it is noise (b, L).
    pub(crate) fn inputs(
        &self,
        r: &Reference,
    ) -> Result<(B::Tensor, BatchConditioning<B>, B::Tensor)> {
        let (b, shape) = (r.batch, r.network.token_shape());
        let l = shape.count();
        let labels: Vec<u32> = (0..b as u32).collect();
        Ok((
            self.backend
                .floats(&noise(5, 0, b * l, shape.dim), &[b, l, shape.dim])?,
            BatchConditioning::Classes(self.backend.indices(&labels, &[b])?),
            self.backend.indices(&vec![0; b * l], &[b, l])?,
        ))
    }
}

impl<B: Backend> Timed for BackendRun<B> {
    fn name(&self) -> &str {
        &self.name
    }

    fn times(
        &mut self,
        r: &Reference,
        drawn: &Drawn,
        phases: &[Phase],
    ) -> Result<Vec<Option<f64>>> {
        let frozen = |weights| {
            Loader::new(
                &self.backend,
                ParameterSource::Host(weights),
                false,
                "drawn",
            )
        };
        let tokenizer = r.tokenizer.build(&mut frozen(&drawn.tokenizer))?;
        let wanted = |phase| phases.contains(&phase);
        let generation = if wanted(Phase::Teacher) || wanted(Phase::Flow) {
            let codes = (&r.tokenizer, &mut frozen(&drawn.tokenizer));
            let teacher = r.network.teacher(&mut frozen(&drawn.teacher), codes)?;
            let codebook = tokenizer.codebook()?;
            let mut least = self.generation(&*teacher, &codebook, r.batch)?;
            for _ in 1..repetitions(least[0]) {
                let next = self.generation(&*teacher, &codebook, r.batch)?;
                least = [least[0].min(next[0]), least[1].min(next[1])];
            }
            least
        } else {
            [0.0; 2]
        };
        let mut all = Vec::with_capacity(phases.len());
        for &phase in phases {
            all.push(Some(match phase {
                Phase::Teacher => generation[0],
                Phase::Flow => generation[1],
                Phase::Student => {
                    let student = r.network.student(&mut frozen(&drawn.student))?;
                    let (eps, labels, kinds) = self.inputs(r)?;
                    least(|| {
                        let prediction = student.predict(&eps, &labels, &kinds)?;
                        Self::wait(prediction.logits.value())?;
                        Self::wait(student.continuous(&prediction)?.value())
                    })?
                }
                Phase::Decode => {
                    let latents = Variable::constant(self.inputs(r)?.0.clone());
                    least(|| Self::wait(tokenizer.decode(&latents)?.value()))?
                }
                Phase::Train => self.train(r, drawn)?,
                Phase::Map(n) => self.map(r, n, false)?,
                Phase::Plain(n) => self.map(r, n, true)?,
            }));
        }
        Ok(all)
    }
}

/// The same networks written in PyTorch: `tests/peers/speed.py`.
pub struct Peer {
    /// A Python that has torch.
    pub python: String,
    /// `f32`, or `bf16` by autocast.
    pub dtype: &'static str,
    /// Threads of torch.
    pub threads: usize,
    /// The mode in which torch.compile makes kernels of them, if any.
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
        let script = golden::folder().with_file_name("peers").join("speed.py");
        let mut command = Command::new(&self.python);
        command
            .arg(&script)
            .args([family, self.dtype])
            .args([batch, self.threads].map(|n| n.to_string()))
            .args(phases)
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

    fn times(&mut self, r: &Reference, _: &Drawn, phases: &[Phase]) -> Result<Vec<Option<f64>>> {
        let keys: Vec<&str> = phases.iter().filter_map(|p| p.key()).collect();
        if keys.is_empty() {
            return Ok(vec![None; phases.len()]);
        }
        let times = self.run("cpu", &r.family.to_string(), r.batch, &keys)?;
        if let Some(seconds) = times.get("compile") {
            eprintln!("{}: {} took {seconds:.0} s to compile", r.name, self.name());
        }
        let of = |p: &Phase| p.key().and_then(|key| times.get(key).copied());
        Ok(phases.iter().map(of).collect())
    }
}

/// This machine's limits: operations per second in a large product, bytes read per second.
pub fn machine() -> Result<[f64; 2]> {
    let backend = Candle::open("cpu", "f32", 0)?;
    let n = 1536;
    let x = backend.full(&[n, n], 1.0)?;
    let product = least(|| Candle::matmul(&x, &x, false, false).map(drop))?;
    let long = vec![1.0f32; 1 << 27];
    let read = least(|| {
        let sums: f32 = long
            .par_chunks(1 << 20)
            .map(|part| {
                let mut lanes = [0.0f32; 32];
                for x in part.as_chunks::<32>().0 {
                    (0..32).for_each(|i| lanes[i] += x[i]);
                }
                lanes.iter().sum::<f32>()
            })
            .sum();
        assert!(sums > 0.0);
        Ok(())
    })?;
    Ok([
        2.0 * (n as f64).powi(3) / product,
        4.0 * long.len() as f64 / read,
    ])
}

/// Prints the table of all phases, or of those whose line holds the first argument of this program; columns are all, or
/// those that the second names, between commas.
pub fn report(mut all: Vec<Box<dyn Timed>>) -> Result<()> {
    let mut given = std::env::args().skip(1).filter(|a| !a.starts_with('-'));
    let [only, column] = [given.next(), given.next()].map(Option::unwrap_or_default);
    all.retain(|c| column.is_empty() || column.split(',').any(|name| name == c.name()));
    let [rate, bandwidth] = machine()?;
    println!(
        "This machine: {:.0} GFLOP/s in a product of 1536 x 1536 matrices, {:.1} GB/s read from memory. Seconds; the least \
         of two or three.",
        rate / 1e9,
        bandwidth / 1e9
    );
    let heads: Vec<String> = all.iter().map(|c| format!("{:>14}", c.name())).collect();
    println!(
        "{:<34}{:>10}{:>10}{:>8}{}",
        "",
        "GFLOP",
        "MB",
        "floor",
        heads.concat()
    );
    for r in Reference::all()? {
        let title = |phase: Phase| format!("{}, batch {}: {}", r.name, r.batch, phase.name());
        let phases: Vec<Phase> = Phase::ALL
            .into_iter()
            .filter(|&phase| title(phase).contains(&only))
            .collect();
        if phases.is_empty() {
            continue;
        }
        let drawn = Drawn::new(&r)?;
        let mut columns = Vec::new();
        for timed in all.iter_mut() {
            eprintln!("{}: {} ..", r.name, timed.name());
            columns.push(timed.times(&r, &drawn, &phases)?);
        }
        for (i, &phase) in phases.iter().enumerate() {
            let (flop, bytes) = r.work(phase);
            let floor = (flop / rate).max(bytes / bandwidth);
            let cells: Vec<String> = columns
                .iter()
                .map(|column| match column[i] {
                    Some(seconds) => format!("{seconds:>9.3} {:>3.1}x", seconds / floor),
                    None => format!("{:>14}", "-"),
                })
                .collect();
            println!(
                "{:<34}{:>10.1}{:>10.0}{:>8.3}{}",
                title(phase),
                flop / 1e9,
                bytes / 1e6,
                floor,
                cells.concat()
            );
            if let Phase::Map(n) | Phase::Plain(n) = phase {
                let each = columns.iter().map(|column| match column[i] {
                    Some(seconds) => format!("{:>14.3}", 1e3 * seconds / n as f64),
                    None => format!("{:>14}", "-"),
                });
                println!(
                    "{:<62}{}",
                    format!(
                        "  milliseconds a token, of {} evaluations at most",
                        SOLVER.steps + 1
                    ),
                    each.collect::<String>()
                );
            }
        }
    }
    Ok(())
}
