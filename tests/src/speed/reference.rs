//! Networks of published shapes with random weights, and the phases of distillation that are timed on them.

use retort_candle::Candle;
use retort_engine::backend::{FlowSolver, flow};
use retort_engine::bundle::{Family, NetworkConfig, TokenizerConfig};
use retort_engine::error::Result;
use retort_engine::model::autoencoder::Shape;
use retort_engine::published::{self, ShapeHints};
use retort_engine::random::{Sequence, Stream};
use retort_engine::weights::{self, Loader, ParameterSource, Weights};

use super::work::{decoder, step_bytes};

pub(super) const SOLVER: FlowSolver = FlowSolver { steps: flow::STEPS };

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
    pub(super) const ALL: [Self; 11] = [
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
    pub(super) fn key(self) -> Option<&'static str> {
        match self {
            Self::Teacher => Some("teacher"),
            Self::Student => Some("student"),
            Self::Decode => Some("decode"),
            Self::Train => Some("train"),
            Self::Flow | Self::Map(_) | Self::Plain(_) => None,
        }
    }

    /// Its name in tables.
    pub(super) fn name(self) -> String {
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
#[derive(Clone)]
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

    /// The shape of the tokenizer's encoder and decoder.
    pub(super) fn autoencoder(&self) -> &Shape {
        match &self.tokenizer {
            TokenizerConfig::Vq(c) => &c.autoencoder,
            TokenizerConfig::Msvq(c) => &c.autoencoder,
        }
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
                let c = self.autoencoder();
                (rows(self.batch) * decoder(c).operations, 0.0)
            }
            Phase::Train => {
                // Gradients cost twice a forward pass.
                let (flop, _) = self.work(Phase::Student);
                (3.0 * flop, step_bytes(weights, false))
            }
            Phase::Map(n) | Phase::Plain(n) => flow(rows(n)),
        }
    }
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
        let tokenizer = draw_tokenizer(r)?;
        let codes = || Loader::new(&backend, ParameterSource::Host(&tokenizer), false, "drawn");
        Ok(Self {
            teacher: draw(|l| r.network.teacher(l, (&r.tokenizer, &mut codes())).map(drop))?,
            student: draw(|l| r.network.student(l).map(drop))?,
            tokenizer,
        })
    }
}

/// Random weights of a reference's tokenizer alone.
pub(super) fn draw_tokenizer(r: &Reference) -> Result<Weights> {
    draw(|l| r.tokenizer.build(l).map(drop))
}

/// Random weights of the network that `build` loads.
pub(super) fn draw(build: impl FnOnce(&mut Loader<'_, Candle>) -> Result<()>) -> Result<Weights> {
    let backend = Candle::open("cpu", "f32", 0)?;
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
}
