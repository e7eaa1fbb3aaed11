//! LPIPS between the images of sets that were made from the same noise, one by one.
//!
//! Two images belong together if samplers map the same noise to both. A sampler that draws tokens does not use noise,
//! whatever its seed.

use std::ops::Range;
use std::path::Path;

use super::Options;
use super::measure::Measurement;
use super::shards::FeatureShards;
use crate::backend::Backend;
use crate::context::Context;
use crate::data::pieces;
use crate::error::{Error, Result};
use crate::files::resolve;
use crate::model::lpips::{self, Lpips};
use crate::samples::{Manifest, Samples};
use crate::stage::sample::drawer::Sampler;
use crate::tape::Variable;
use crate::weights::{CheckpointWeights, Loader, ParameterSource};

/// Mean LPIPS of each set's images to those of the set that `lpips` names. A part of the stage measures only its share.
pub fn lpips_distances<B: Backend>(
    context: &Context<'_, B>,
    o: &Options,
    sets: &[(&str, Samples)],
) -> Result<Vec<Measurement<f64>>> {
    let Some(options) = &o.lpips else {
        return Ok(Vec::new());
    };
    let base = &context.job.base_dir;
    let [vgg, linear] = [&options.vgg, &options.linear].map(|file| resolve(base, file));
    let (trunk, layers) = (
        CheckpointWeights::open(&vgg, None)?,
        CheckpointWeights::open(&linear, None)?,
    );
    let loader = |weights, path: &Path| {
        let origin = path.display().to_string();
        let source = ParameterSource::Files(std::slice::from_ref(weights));
        Loader::new(context.backend, source, false, origin)
    };
    let lpips = Lpips::load(&mut loader(&trunk, &vgg), &mut loader(&layers, &linear))?;
    let find = |name: &str| sets.iter().find(|(own, _)| *own == name);
    let (_, beside) = find(&options.beside)
        .ok_or_else(|| Error::Internal(format!("no set {}", options.beside)))?;
    let mut shards = FeatureShards::new(context, LPIPS, o.batch);
    let mut out = Vec::new();
    for (name, set) in sets {
        if *name == options.beside {
            out.push(Err(
                "it is the set that the others are compared with".to_owned()
            ));
            continue;
        }
        out.push(
            match unpaired((name, set), (&options.beside, beside), o.batch)? {
                Some(reason) => Err(reason),
                None => Ok(mean_lpips(
                    context,
                    &lpips,
                    (set, beside),
                    o.batch,
                    &mut shards,
                )?),
            },
        );
    }
    Ok(out)
}

/// Why the images of two sets cannot be paired, if so.
fn unpaired(
    own: (&str, &Samples),
    other: (&str, &Samples),
    batch: usize,
) -> Result<Option<String>> {
    let ((name, a), (beside, b)) = (own, other);
    let described = unlike((name, &a.manifest), (beside, &b.manifest));
    if described.is_some() {
        return Ok(described);
    }
    Ok(if a.labels != b.labels {
        Some(format!(
            "other classes or captions, or another number of samples, than {beside}"
        ))
    } else if a.manifest.kept.noise && !same_noise(a, b, batch)? {
        Some(other_noise(beside))
    } else {
        None
    })
}

/// The same, according to the sets' manifests.
fn unlike((name, own): (&str, &Manifest), (beside, other): (&str, &Manifest)) -> Option<String> {
    let [_, h, w] = own.image;
    for (name, manifest) in [(name, own), (beside, other)] {
        if let Some(why) = noiseless(manifest) {
            return Some(format!(
                "the images of {name} were not made from noise: {why}"
            ));
        }
    }
    if own.image != other.image {
        Some(format!("images of another size than {beside}"))
    } else if h.min(w) < lpips::LEAST_SIDE {
        let least = lpips::LEAST_SIDE;
        Some(format!(
            "images of {h} x {w}, too small for it: at least {least} x {least}"
        ))
    } else if own.captions != other.captions {
        Some(format!("other captions than {beside}"))
    } else if (own.tokens, own.dim) != (other.tokens, other.dim)
        || own.kept.noise != other.kept.noise
        || (!own.kept.noise && own.seed != other.seed)
    {
        Some(other_noise(beside))
    } else {
        None
    }
}

/// Why images are not a function of noise, if so.
fn noiseless(manifest: &Manifest) -> Option<String> {
    match serde_json::from_value::<Sampler>(manifest.sampler.clone()) {
        Ok(sampler) if sampler.maps_noise() => None,
        Ok(_) => {
            let kind = manifest.sampler["kind"].as_str().unwrap_or_default();
            Some(format!("a sampler of kind `{kind}` draws tokens at random"))
        }
        Err(_) => Some("this version does not know its sampler".into()),
    }
}

fn other_noise(beside: &str) -> String {
    format!("made from other noise than {beside}: give both `sample` stages the same `seed`")
}

fn same_noise(a: &Samples, b: &Samples, batch: usize) -> Result<bool> {
    for first in (0..a.len()).step_by(batch) {
        let n = batch.min(a.len() - first);
        if a.noise(first, n)? != b.noise(first, n)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// LPIPS of the images of two sets, this many at a time. In a part of the stage only the files it writes are meaningful.
fn mean_lpips<B: Backend>(
    context: &Context<'_, B>,
    lpips: &Lpips<B>,
    (a, b): (&Samples, &Samples),
    batch: usize,
    shards: &mut FeatureShards,
) -> Result<f64> {
    let [c, h, w] = a.manifest.image;
    let images = |set: &Samples, images: Range<usize>| -> Result<Variable<B>> {
        let n = images.len();
        let pixels: Vec<f32> = set
            .images(images.start, n)?
            .iter()
            .map(|x| 2.0 * x - 1.0)
            .collect();
        Ok(Variable::constant(
            context.backend.floats(&pixels, &[n, c, h, w])?,
        ))
    };
    let mut sum = 0.0;
    for shard in shards.next(a.len()) {
        let stored = shard.read().and_then(|mut arrays| arrays.remove(LPIPS));
        let found = match stored {
            Some(stored) => stored,
            None if context.job.part.is_some() && !shard.own => continue,
            None => {
                let mut found = Vec::with_capacity(shard.images.len());
                for picks in pieces(shard.images.clone(), batch) {
                    context.go_on()?;
                    let distances =
                        lpips.distance(&images(a, picks.clone())?, &images(b, picks)?)?;
                    found.extend(B::to_floats(distances.value())?);
                }
                if shard.own {
                    shard.write([(LPIPS.to_owned(), found.clone())].into())?;
                }
                found
            }
        };
        let batches = found.chunks(batch);
        sum += batches
            .map(|found| found.iter().map(|&x| f64::from(x)).sum::<f64>())
            .sum::<f64>();
    }
    Ok(sum / a.len() as f64)
}

/// Name of the files of distances in the work directory, and of their array.
const LPIPS: &str = "lpips";

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::samples::{FORMAT, ImagesKept, KeptTensors};

    fn manifest(sampler: Value) -> Manifest {
        Manifest {
            format: FORMAT,
            count: 10,
            seed: 5,
            sampler,
            captions: None,
            passes: None,
            image: [3, 32, 32],
            decoded: None,
            tokens: 16,
            vocabulary: 16,
            dim: 4,
            labels: 10,
            kept: KeptTensors {
                images: ImagesKept::U8,
                latents: false,
                tokens: false,
                noise: false,
            },
            shards: Vec::new(),
        }
    }

    #[test]
    fn sets_are_paired_whose_samplers_map_the_same_noise() {
        let flow = || json!({"kind": "flow", "teacher": "t"});
        let student = || json!({"kind": "student", "student": "s", "timesteps": [0]});
        let of = |own: &Manifest, other: &Manifest| unlike(("own", own), ("other", other));
        let beside = manifest(flow());
        assert_eq!(of(&manifest(student()), &beside), None);
        assert_eq!(of(&beside, &manifest(student())), None);

        // These draw their tokens, with any seed.
        for sampler in [
            json!({"kind": "teacher", "teacher": "t"}),
            json!({"kind": "skip", "teacher": "t", "skip": 2}),
            json!({"kind": "independent", "teacher": "t", "trajectories": "x"}),
            json!({"kind": "assisted", "student": "s", "teacher": "t", "timesteps": [0, 6], "teacher_start": 3}),
        ] {
            let kind = sampler["kind"].as_str().unwrap().to_owned();
            let drawn = manifest(sampler);
            let expected = format!("a sampler of kind `{kind}` draws tokens at random");
            for (found, name) in [(of(&drawn, &beside), "own"), (of(&beside, &drawn), "other")] {
                let found = found.unwrap_or_else(|| panic!("{kind} was paired"));
                assert!(found.ends_with(&expected), "{found}");
                assert!(found.contains(&format!("the images of {name}")), "{found}");
            }
            assert!(of(&drawn, &drawn).is_some());
        }
        assert!(of(&manifest(json!({"kind": "later"})), &beside).is_some());

        let changed = |change: &dyn Fn(&mut Manifest), expected: &str| {
            let mut own = manifest(student());
            change(&mut own);
            let found = of(&own, &beside).unwrap_or_default();
            assert!(found.contains(expected), "{found}");
        };
        changed(&|own| own.seed = 6, "made from other noise than other");
        changed(&|own| own.kept.noise = true, "made from other noise");
        // The same number of values in another shape.
        changed(
            &|own| (own.tokens, own.dim) = (4, 16),
            "made from other noise",
        );
        changed(&|own| own.image = [3, 64, 64], "images of another size");
        changed(&|own| own.captions = Some("a".into()), "other captions");
    }
}
