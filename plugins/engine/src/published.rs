//! Published checkpoint files: which network a file holds, where in the file, and its shape.
//!
//! In: downloaded files. Out: the dictionary with the weights of the requested network, and the configuration implied by its
//! shapes. What shapes do not determine (attention heads of LlamaGen, scales of VAR) comes from the table of published sizes,
//! or from the recipe.
//!
//! LlamaGen: arXiv 2406.06525. VAR: arXiv 2404.02905. Students of both: arXiv 2412.17153.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;

use retort_checkpoint::sharded_weights::SingleShard;
use retort_checkpoint::{Checkpoint, Dictionary, shown};

use crate::bundle::{Family, NetworkConfig, TokenizerConfig};
use crate::error::{Error, Result};
use crate::model::autoencoder::Shape;
use crate::model::{CODEBOOK, CaptionShape, ConditioningShape, llamagen, msvq, var, vq};
use crate::size::Sides;
use crate::weights::CheckpointWeights;

/// What a network is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkRole {
    /// Images to tokens and back.
    Tokenizer,
    /// Predicts tokens one AR step after the other.
    Teacher,
    /// Predicts all tokens at once.
    Student,
}

impl NetworkRole {
    /// Its usual name; also the kind of its artifact.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tokenizer => "tokenizer",
            Self::Teacher => "teacher",
            Self::Student => "student",
        }
    }

    /// Where published files keep such weights, the usual place first. For a student, the averages, which are used for
    /// sampling.
    fn places(self) -> &'static [&'static str] {
        match self {
            Self::Tokenizer | Self::Teacher => &["model", "module", "state_dict", ""],
            Self::Student => &[
                "trainer.ema_parameters",
                "ema",
                "model",
                "trainer.var_wo_ddp",
                "",
            ],
        }
    }
}

/// A weight that only one network has, a description of that network, and the role in which it can be loaded.
type Signature = (&'static str, &'static str, Option<(Family, NetworkRole)>);

const SIGNATURES: [Signature; 7] = [
    (
        "encoder.conv_blocks.0.res.0.conv1.weight",
        "a LlamaGen tokenizer",
        Some((Family::Llamagen, NetworkRole::Tokenizer)),
    ),
    (
        "encoder.down.0.block.0.conv1.weight",
        "a VAR tokenizer",
        Some((Family::Var, NetworkRole::Tokenizer)),
    ),
    (
        "cls_embedding.cap_proj.fc1.weight",
        "a text-conditional LlamaGen teacher",
        Some((Family::Llamagen, NetworkRole::Teacher)),
    ),
    (
        "layers.0.attention.wqkv.weight",
        "a LlamaGen teacher",
        Some((Family::Llamagen, NetworkRole::Teacher)),
    ),
    (
        "blocks.0.attn.mat_qkv.weight",
        "a VAR teacher",
        Some((Family::Var, NetworkRole::Teacher)),
    ),
    ("Conv2d_1a_3x3.conv.weight", "an Inception network", None),
    ("features.0.weight", "a VGG network", None),
];

/// Only students have it.
const STUDENT: &str = "n_d_embed.weight";

/// The network that a dictionary seems to contain: in words, and as a loadable role.
fn recognise(dictionary: &Dictionary) -> Option<(String, Option<(Family, NetworkRole)>)> {
    let has = |name: &str| dictionary.get(name).is_some();
    let &(_, words, network) = SIGNATURES.iter().find(|(name, ..)| has(name))?;
    match network {
        Some((family, NetworkRole::Teacher)) if has(STUDENT) => Some((
            words.replace("teacher", "student"),
            Some((family, NetworkRole::Student)),
        )),
        network => Some((words.to_owned(), network)),
    }
}

/// Opens a file, or the folder or index of several, at the dictionary with such a network. Files of other networks are
/// refused with an explanation.
pub fn open(
    path: &Path,
    family: Family,
    role: NetworkRole,
    select: Option<&str>,
) -> Result<CheckpointWeights> {
    if let Some(lone) = SingleShard::of(path)
        && path.is_file()
    {
        let beside = path.parent().unwrap_or(Path::new(""));
        let message = format!(
            "by its name this is file {} of the {} that a network lies in: give the folder, or the index in it, {}",
            lone.number,
            lone.of,
            beside.join(lone.index).display()
        );
        return Err(Error::data(path, message));
    }
    let checkpoint = Checkpoint::open(path).map_err(Error::checkpoint(path))?;
    let chosen = match select {
        Some(_) => {
            let chosen = checkpoint.select(select).map_err(Error::checkpoint(path))?;
            let chosen = Network::of(chosen, family, role);
            if let Some((words, network)) = recognise(&chosen.weights)
                && network != Some((family, role))
            {
                let place = shown(&chosen.weights.path);
                let wanted = wanted(family, role);
                return Err(Error::data(
                    path,
                    format!("{place} looks like {words}; {wanted}"),
                ));
            }
            // An unrecognised file may lack only one weight: let the loader name it.
            chosen
        }
        None => {
            let all = checkpoint.dictionaries().iter();
            let weights = all.filter(|d| !d.is_optimiser());
            let weights = weights.map(|d| Network::of(d, family, role)).collect();
            choose(weights, family, role).map_err(|message| Error::data(path, message))?
        }
    };
    let (weights, prefix) = (chosen.weights.into_owned(), chosen.prefix);
    Ok(CheckpointWeights::of(path, checkpoint, weights).without(prefix))
}

/// A dictionary under the names of the network itself.
struct Network<'d> {
    weights: Cow<'d, Dictionary>,
    /// The removed prefix, from a wrapper of the network, such as `module.`, `_orig_mod.` or `model.`.
    prefix: String,
}

impl<'d> Network<'d> {
    /// Removes the common prefix of all names. If there are other tensors beside the network, the network is those with its
    /// prefix.
    fn of(dictionary: &'d Dictionary, family: Family, role: NetworkRole) -> Self {
        let mut found = Self {
            weights: Cow::Borrowed(dictionary),
            prefix: String::new(),
        };
        while recognise(&found.weights).is_none() {
            let common = found.weights.prefix();
            let Some(dot) = common.find('.') else { break };
            let step = common[..=dot].to_owned();
            let Some(inner) = found.weights.part(&step) else {
                break;
            };
            found = Self {
                weights: Cow::Owned(inner),
                prefix: found.prefix + &step,
            };
        }
        if recognise(&found.weights).is_some() {
            return found;
        }
        let fitting = |prefix: String| {
            let part = dictionary.part(&prefix)?;
            (recognise(&part)?.1 == Some((family, role))).then_some(Self {
                weights: Cow::Owned(part),
                prefix,
            })
        };
        let mut parts = prefixes(dictionary).into_iter().filter_map(fitting);
        match (parts.next(), parts.next()) {
            (Some(only), None) => only,
            _ => found,
        }
    }
}

/// Prefixes under which a dictionary holds networks.
fn prefixes(dictionary: &Dictionary) -> BTreeSet<String> {
    let names = dictionary.tensors().map(|(name, _)| name);
    let of = |name: &str| {
        SIGNATURES.iter().find_map(|(signature, ..)| {
            let prefix = name.strip_suffix(signature)?;
            prefix.ends_with('.').then(|| prefix.to_owned())
        })
    };
    names.filter_map(of).collect()
}

fn wanted(family: Family, role: NetworkRole) -> String {
    format!("expected the weights of a {family} {}", role.name())
}

/// The dictionary with such a network: the only one, or the one in the usual place.
fn choose(all: Vec<Network<'_>>, family: Family, role: NetworkRole) -> Result<Network<'_>, String> {
    let fits = |n: &&Network| recognise(&n.weights).is_some_and(|(_, n)| n == Some((family, role)));
    let place = |n: &Network| n.weights.path.clone();
    let list = |networks: &[&Network]| {
        let paths: Vec<String> = networks
            .iter()
            .take(12)
            .map(|n| shown(&n.weights.path))
            .collect();
        paths.join(", ")
    };
    let fitting: Vec<&Network> = all.iter().filter(fits).collect();
    let mut places = role.places().iter();
    let usual = places.find(|&&usual| fitting.iter().any(|n| n.weights.path == usual));
    let chosen = match (fitting.as_slice(), usual) {
        (&[only], _) => place(only),
        (_, Some(&usual)) => usual.to_owned(),
        ([], None) => {
            let wanted = wanted(family, role);
            let words = all.iter().find_map(|n| recognise(&n.weights));
            return Err(match words {
                Some((words, _)) => format!("this looks like {words}; {wanted}"),
                None => {
                    let there = list(&all.iter().collect::<Vec<_>>());
                    let names = names(&all);
                    format!("no known network under {there}; {wanted}{names}")
                }
            });
        }
        (several, None) => {
            return Err(format!(
                "weights in several places, select one: {}",
                list(several)
            ));
        }
    };
    let mut all = all.into_iter();
    all.find(|n| n.weights.path == chosen && fits(&n))
        .ok_or_else(|| format!("nothing under {}", shown(&chosen)))
}

/// Some of the names found instead, and a hint.
fn names(all: &[Network<'_>]) -> String {
    let Some(largest) = all.iter().max_by_key(|n| n.weights.tensors().len()) else {
        return String::new();
    };
    let count = largest.weights.tensors().len();
    let names = largest.weights.tensors().take(3);
    let shown: Vec<String> = names
        .map(|(name, _)| format!("{}{name}", largest.prefix))
        .collect();
    let more = match count.saturating_sub(shown.len()) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let mut text = format!("; there are `{}`{more}", shown.join("`, `"));
    let prefixes = prefixes(&largest.weights);
    if prefixes.len() > 1 {
        let prefixes: Vec<String> = prefixes.into_iter().take(4).collect();
        text.push_str(&format!(
            "; several networks lie under `{}`: save the one to take in a file of its own",
            prefixes.join("`, `")
        ));
    }
    text
}

/// Parts of the names of buffers, which carry no weights: attention masks, tables, counters.
const BUFFERS: [&str; 9] = [
    "attn_bias",
    "mask",
    "lvl_1L",
    "zero_k_bias",
    "ema_vocab_hit",
    "codebook_used",
    "freqs_cis",
    "num_batches_tracked",
    "uncond_embedding",
];

/// Whether a name is that of a buffer of a published network.
pub fn is_buffer(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    BUFFERS.iter().any(|part| last.contains(part))
}

/// A recipe's information about a network's shape.
#[derive(Debug, Clone, Default)]
pub struct ShapeHints {
    /// A published size, by name.
    pub size: Option<String>,
    /// Attention heads.
    pub heads: Option<usize>,
    /// Sides of LlamaGen's images in pixels; 256 x 256, if left out.
    pub image_size: Option<Sides>,
    /// Sides of VAR's token maps, coarse to fine.
    pub scales: Option<Vec<usize>>,
}

impl ShapeHints {
    fn image_size(&self) -> Sides {
        self.image_size.unwrap_or(Sides::square(256))
    }
}

/// LlamaGen's sizes: name, blocks, heads, width.
const LLAMAGEN: [(&str, usize, usize, usize); 5] = [
    ("B", 12, 12, 768),
    ("L", 24, 16, 1024),
    ("XL", 36, 20, 1280),
    ("XXL", 48, 24, 1536),
    ("3B", 24, 32, 3200),
];

/// VAR's sizes.
const VAR: [&str; 5] = ["d16", "d20", "d24", "d30", "d36"];

/// Groups of the group normalisation in both published tokenizers.
const NORM_GROUPS: usize = 32;

/// The published shape of a family at a size.
pub fn published(family: Family, hints: &ShapeHints) -> Result<(TokenizerConfig, NetworkConfig)> {
    let size = hints.size.as_deref().unwrap_or_default();
    match family {
        Family::Llamagen => {
            let &(_, depth, heads, width) = llamagen_size(size)?;
            let tokenizer = vq::Config {
                autoencoder: Shape {
                    image_channels: 3,
                    image_size: hints.image_size(),
                    channels: 128,
                    multipliers: vec![1, 1, 2, 2, 4],
                    res_blocks: 2,
                    norm_groups: NORM_GROUPS,
                    z_channels: 256,
                },
                vocabulary: 16_384,
                codebook_dim: 8,
                l2_norm: true,
            };
            let network = llamagen::Config {
                width,
                depth,
                heads,
                vocabulary: tokenizer.vocabulary,
                codebook_dim: tokenizer.codebook_dim,
                map: tokenizer.autoencoder.map(),
                condition: ConditioningShape::Classes(1000),
            };
            Ok((
                TokenizerConfig::Vq(tokenizer),
                NetworkConfig::Llamagen(network),
            ))
        }
        Family::Var => {
            let network = var_size(size)?;
            let tokenizer = msvq::Config::published(&network.scales);
            Ok((
                TokenizerConfig::Msvq(tokenizer),
                NetworkConfig::Var(network),
            ))
        }
    }
}

/// Refuses a size that no network of the family has.
pub fn check_size(family: Family, size: &str) -> Result<()> {
    match family {
        Family::Llamagen => llamagen_size(size).map(drop),
        Family::Var => var_size(size).map(drop),
    }
}

fn llamagen_size(size: &str) -> Result<&'static (&'static str, usize, usize, usize)> {
    let names = LLAMAGEN.map(|(name, ..)| name);
    let found = LLAMAGEN.iter().find(|(name, ..)| *name == size);
    found.ok_or_else(|| unknown_size(size, Family::Llamagen, &names))
}

fn var_size(size: &str) -> Result<var::Config> {
    var::Config::published(size).ok_or_else(|| unknown_size(size, Family::Var, &VAR))
}

fn unknown_size(size: &str, family: Family, names: &[&str]) -> Error {
    let names = names.join(", ");
    Error::option(
        "/size",
        format!("size {size:?}: {family} was published as {names}"),
    )
}

/// The shapes of a tokenizer and a teacher or student, from their weights.
pub fn shapes(
    family: Family,
    role: NetworkRole,
    tokenizer: &CheckpointWeights,
    network: &CheckpointWeights,
    hints: &ShapeHints,
) -> Result<(TokenizerConfig, NetworkConfig)> {
    let found = match family {
        Family::Llamagen => {
            let tokenizer = llamagen_tokenizer(tokenizer, hints)?;
            let network = llamagen_network(network, &tokenizer, role, hints)?;
            (
                TokenizerConfig::Vq(tokenizer),
                NetworkConfig::Llamagen(network),
            )
        }
        Family::Var => {
            let network = var_network(network, role, hints)?;
            let tokenizer = var_tokenizer(tokenizer, &network.scales)?;
            (
                TokenizerConfig::Msvq(tokenizer),
                NetworkConfig::Var(network),
            )
        }
    };
    let (codes, dim) = found.0.codebook();
    let tokens = found.1.token_shape();
    if (tokens.vocabulary, tokens.dim) != (codes, dim) {
        let message = format!(
            "this {} was made for a codebook of {} codes in {} dimensions, but the tokenizer {} has {codes} in {dim}",
            role.name(),
            tokens.vocabulary,
            tokens.dim,
            tokenizer.path().display(),
        );
        return Err(Error::data(network.path(), message));
    }
    Ok(found)
}

/// One size of a weight.
fn size(stored: &CheckpointWeights, name: &str, dim: usize) -> Result<usize> {
    let missing = || Error::data(stored.path(), format!("weight {name} is missing"));
    let shape = stored.shape(name).ok_or_else(missing)?;
    shape.get(dim).copied().ok_or_else(|| {
        let message = format!("weight {name} has shape {shape:?}, expected more dimensions");
        Error::data(stored.path(), message)
    })
}

/// How many consecutive numbers from 0 give the name of an existing weight.
fn count(stored: &CheckpointWeights, name: impl Fn(usize) -> String) -> usize {
    let exists = |i: &usize| stored.shape(&name(*i)).is_some();
    (0..).take_while(exists).count()
}

/// Rows of an embedding of classes, the unconditional one left out.
fn classes(stored: &CheckpointWeights, name: &str) -> Result<usize> {
    match size(stored, name, 0)? {
        rows @ (0 | 1) => Err(Error::data(
            stored.path(),
            format!("weight {name} has {rows} rows, expected one for each class and one more"),
        )),
        rows => Ok(rows - 1),
    }
}

/// Encoder and decoder, from the names and shapes of the encoder. `level` names the weight of residual block j of level
/// i, `image_size` gives the sides of the images for pixels per token.
fn autoencoder(
    stored: &CheckpointWeights,
    level: impl Fn(usize, usize) -> String,
    image_size: impl FnOnce(usize) -> Sides,
) -> Result<Shape> {
    let channels = size(stored, "encoder.conv_in.weight", 0)?;
    let levels = count(stored, |i| level(i, 0));
    if !(1..=16).contains(&levels) {
        let message = format!("{levels} levels of the encoder, expected 1 to 16");
        return Err(Error::data(stored.path(), message));
    }
    let multiplier = |i| {
        let width = size(stored, &level(i, 0), 0)?;
        if channels > 0 && width.is_multiple_of(channels) {
            return Ok(width / channels);
        }
        let message = format!("level {i} has {width} channels, expected a multiple of {channels}");
        Err(Error::data(stored.path(), message))
    };
    let factor = 1 << (levels - 1);
    let sides = image_size(factor);
    if sides.area() == 0 || !sides.is_multiple_of(factor) {
        let message = format!(
            "images of {sides}: {} has {levels} levels, so expected sides that are a multiple of {factor}",
            stored.path().display()
        );
        return Err(Error::option("/image_size", message));
    }
    Ok(Shape {
        image_channels: size(stored, "encoder.conv_in.weight", 1)?,
        image_size: sides,
        channels,
        multipliers: (0..levels).map(multiplier).collect::<Result<_>>()?,
        res_blocks: count(stored, |j| level(0, j)),
        norm_groups: NORM_GROUPS,
        z_channels: size(stored, "encoder.conv_out.weight", 0)?,
    })
}

fn llamagen_tokenizer(stored: &CheckpointWeights, hints: &ShapeHints) -> Result<vq::Config> {
    let level = |i, j| format!("encoder.conv_blocks.{i}.res.{j}.conv1.weight");
    Ok(vq::Config {
        autoencoder: autoencoder(stored, level, |_| hints.image_size())?,
        vocabulary: size(stored, CODEBOOK, 0)?,
        codebook_dim: size(stored, CODEBOOK, 1)?,
        l2_norm: true,
    })
}

fn llamagen_network(
    stored: &CheckpointWeights,
    tokenizer: &vq::Config,
    role: NetworkRole,
    hints: &ShapeHints,
) -> Result<llamagen::Config> {
    let depth = count(stored, |i| format!("layers.{i}.attention.wqkv.weight"));
    let width = size(stored, "output.weight", 1)?;
    let mut sizes = LLAMAGEN.iter();
    let known = sizes.find(|&&(_, d, _, w)| (d, w) == (depth, width));
    if let Some(name) = &hints.size {
        let wanted = llamagen_size(name)?;
        check_same(stored, name, (wanted.1, wanted.3), (depth, width))?;
    }
    let heads = hints.heads.or(known.map(|size| size.2)).ok_or_else(|| {
        let message = format!(
            "{depth} blocks of width {width} are no published size, and no weight tells the number of attention \
             heads: say it with `heads`"
        );
        Error::option("/heads", message)
    })?;
    Ok(llamagen::Config {
        width,
        depth,
        heads,
        vocabulary: size(stored, "output.weight", 0)?,
        codebook_dim: match role {
            NetworkRole::Student => size(stored, "tok_embeddings.weight", 1)?,
            // A teacher contains only the numbers of codes, no vectors.
            _ => tokenizer.codebook_dim,
        },
        map: tokenizer.autoencoder.map(),
        condition: llamagen_condition(stored)?,
    })
}

/// Most tokens of a caption, in published networks.
const CAPTION_TOKENS: usize = 120;

fn llamagen_condition(stored: &CheckpointWeights) -> Result<ConditioningShape> {
    const FEATURES: &str = "cls_embedding.cap_proj.fc1.weight";
    if stored.shape(FEATURES).is_none() {
        let table = "cls_embedding.embedding_table.weight";
        return classes(stored, table).map(ConditioningShape::Classes);
    }
    let without = stored.shape("cls_embedding.uncond_embedding");
    Ok(ConditioningShape::Captions(CaptionShape {
        // For students nothing determines it.
        positions: without
            .and_then(|s| s.first())
            .map_or(CAPTION_TOKENS, |&n| n),
        width: size(stored, FEATURES, 1)?,
    }))
}

/// Refuses a network whose size differs from the recipe's.
fn check_same(
    stored: &CheckpointWeights,
    name: &str,
    wanted: (usize, usize),
    found: (usize, usize),
) -> Result<()> {
    if wanted == found {
        return Ok(());
    }
    let message = format!(
        "size {name} has {} blocks of width {}, this network has {} of width {}",
        wanted.0, wanted.1, found.0, found.1
    );
    Err(Error::data(stored.path(), message))
}

/// Has the learned lengths of the queries, one a head, where queries and keys are normalised.
const LENGTHS: &str = "blocks.0.attn.scale_mul_1H11";

fn var_network(
    stored: &CheckpointWeights,
    role: NetworkRole,
    hints: &ShapeHints,
) -> Result<var::Config> {
    let depth = count(stored, |i| format!("blocks.{i}.attn.mat_qkv.weight"));
    let width = size(stored, "word_embed.weight", 0)?;
    if let Some(name) = &hints.size {
        let wanted = var_size(name)?;
        check_same(stored, name, (wanted.depth, wanted.width), (depth, width))?;
    }
    // A student has the class as a separate first scale.
    let extra = usize::from(role == NetworkRole::Student);
    let levels = size(stored, "lvl_embed.weight", 0)?.saturating_sub(extra);
    let tokens = size(stored, "pos_1LC", 1)?.saturating_sub(extra);
    let sum = |scales: &[usize]| scales.iter().map(|n| n * n).sum::<usize>();
    let mut candidates: Vec<Vec<usize>> = hints.scales.clone().into_iter().collect();
    let published = VAR.iter().filter_map(|name| var::Config::published(name));
    candidates.extend(published.map(|config| config.scales));
    candidates.retain(|scales| (scales.len(), sum(scales)) == (levels, tokens));
    let scales = candidates.into_iter().next().ok_or_else(|| {
        let message = format!(
            "{tokens} tokens in {levels} scales: say the sides of the scales with `scales`, as in [1, 2, 4]"
        );
        Error::option("/scales", message)
    })?;
    let attn_l2_norm = stored.shape(LENGTHS).is_some();
    Ok(var::Config {
        width,
        depth,
        heads: match hints.heads {
            Some(heads) => heads,
            None if attn_l2_norm => size(stored, LENGTHS, 1)?,
            None => depth,
        },
        vocabulary: size(stored, "head.weight", 0)?,
        codebook_dim: size(stored, "word_embed.weight", 1)?,
        scales,
        classes: classes(stored, "class_emb.weight")?,
        shared_adaln: stored.shape("shared_ada_lin.1.weight").is_some(),
        attn_l2_norm,
    })
}

fn var_tokenizer(stored: &CheckpointWeights, scales: &[usize]) -> Result<msvq::Config> {
    let level = |i, j| format!("encoder.down.{i}.block.{j}.conv1.weight");
    let side = scales.last().copied().unwrap_or(1);
    Ok(msvq::Config {
        autoencoder: autoencoder(stored, level, |factor| {
            Sides::square(side.saturating_mul(factor))
        })?,
        vocabulary: size(stored, CODEBOOK, 0)?,
        scales: scales.to_vec(),
        phi_convs: count(stored, |i| {
            format!("quantize.quant_resi.qresi_ls.{i}.weight")
        }),
    })
}
