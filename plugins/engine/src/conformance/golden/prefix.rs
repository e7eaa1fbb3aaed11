//! VAR continuing from a prefix, causally and as in the released code: `var-prefix`, whose two files differ in the strength
//! of attention (the scale of `attn.mat_qkv.weight` and `attn.proj.weight`).

use std::path::Path;

use super::classes::var_networks;
use super::{Numbers, Parts, Suite};
use crate::backend::Backend;
use crate::conformance::Case;
use crate::error::Result;
use crate::model::{BatchConditioning, PrefixMask, Teacher, msvq, var};
use crate::sampler::{Choice, Distribution, Prefix, autoregressive, choices};
use crate::weights::{Loader, ParameterSource};

/// Compares the tokens that follow.
pub(super) fn check<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
    let var = dir.join("var");
    let (numbers, mut parts) = (Numbers::open(var.join("config.json"))?, Parts::open(&var)?);
    let (network, tokenizer) = var_networks(&numbers)?;
    let mut cases = Vec::new();
    for (name, factor) in [("x1", 1.0), ("x4", 4.0)] {
        for (weight, values) in parts.1.entry("var".into()).or_default() {
            if weight.ends_with("attn.mat_qkv.weight") || weight.ends_with("attn.proj.weight") {
                values.data.iter_mut().for_each(|x| *x *= factor);
            }
        }
        let quantiser = msvq::Quantiser::load(&mut parts.loader(backend, "vae")?, &tokenizer)?;
        let source = ParameterSource::Host(parts.get("var")?);
        let mut loader = Loader::new(backend, source, false, name);
        let teacher = var::Transformer::load(&mut loader, &network, quantiser)?;
        let file = dir.join(format!("var-prefix/expected-{name}.safetensors"));
        let mut suite = Suite::open(backend, "var-prefix", &file)?;
        suite.chosen = true;
        let labels = suite.ids("labels")?;
        let n = B::shape(&labels)[0];
        let labels = BatchConditioning::Classes(labels);
        let tokens = suite.ids("prefix")?;
        let distribution = Distribution {
            guidance: Some(2.0),
            top_k: 1,
            ..Default::default()
        };
        for (way, mask) in [
            ("causal", PrefixMask::Causal),
            ("published", PrefixMask::Published),
        ] {
            let mut sequences = choices(0, 0, n);
            let found = autoregressive(
                &teacher,
                &labels,
                &distribution,
                &mut Choice::Random(&mut sequences),
                Some(Prefix {
                    tokens: &tokens,
                    mask,
                }),
                teacher.token_shape().steps.len(),
            )?;
            suite.tokens(&format!("{way}.tokens"), &found)?;
        }
        suite.expected.all_seen(None)?;
        cases.extend(suite.cases.into_iter().map(|case| Case {
            name: format!("{} {name}", case.name),
            ..case
        }));
    }
    Ok(cases)
}
