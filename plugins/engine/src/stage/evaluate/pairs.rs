//! LPIPS between the images of sets that were made from the same noise, one by one.

use std::path::Path;

use super::Options;
use super::measure::Measurement;
use crate::backend::Backend;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::files::resolve;
use crate::model::lpips::{self, Lpips};
use crate::samples::Samples;
use crate::tape::Variable;
use crate::weights::{Loader, Source, Stored};

/// Mean LPIPS of each set's images to those of the set that `lpips` names.
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
    let (trunk, layers) = (Stored::open(&vgg, None)?, Stored::open(&linear, None)?);
    let loader = |weights, path: &Path| {
        let origin = path.display().to_string();
        let source = Source::Files(std::slice::from_ref(weights));
        Loader::new(context.backend, source, false, origin)
    };
    let lpips = Lpips::load(&mut loader(&trunk, &vgg), &mut loader(&layers, &linear))?;
    let find = |name: &str| sets.iter().find(|(own, _)| *own == name);
    let (_, beside) = find(&options.beside)
        .ok_or_else(|| Error::Internal(format!("no set {}", options.beside)))?;
    let mut out = Vec::new();
    for (name, set) in sets {
        if *name == options.beside {
            out.push(Err(
                "it is the set that the others are compared with".to_owned()
            ));
            continue;
        }
        out.push(match unlike(set, beside, o.batch)? {
            Some(reason) => Err(format!("{reason} than {}", options.beside)),
            None => Ok(mean_lpips(context, &lpips, set, beside, o.batch)?),
        });
    }
    Ok(out)
}

/// Why images of two sets do not belong together one by one, if so.
fn unlike(a: &Samples, b: &Samples, batch: usize) -> Result<Option<&'static str>> {
    let (own, other) = (&a.manifest, &b.manifest);
    let [_, h, w] = own.image;
    Ok(if own.image != other.image {
        Some("images of another size")
    } else if h.min(w) < lpips::LEAST_SIDE {
        Some("images too small for it, as small")
    } else if a.labels != b.labels {
        Some("other classes or captions, or another number of samples,")
    } else if own.kept.noise != other.kept.noise
        || (!own.kept.noise && own.seed != other.seed)
        || (own.kept.noise && !same_noise(a, b, batch)?)
    {
        Some("made from other noise")
    } else {
        None
    })
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

fn mean_lpips<B: Backend>(
    context: &Context<'_, B>,
    lpips: &Lpips<B>,
    a: &Samples,
    b: &Samples,
    batch: usize,
) -> Result<f64> {
    let [c, h, w] = a.manifest.image;
    let mut sum = 0.0;
    for first in (0..a.len()).step_by(batch) {
        context.go_on()?;
        let n = batch.min(a.len() - first);
        let images = |set: &Samples| -> Result<Variable<B>> {
            let pixels: Vec<f32> = set
                .images(first, n)?
                .iter()
                .map(|x| 2.0 * x - 1.0)
                .collect();
            Ok(Variable::constant(
                context.backend.floats(&pixels, &[n, c, h, w])?,
            ))
        };
        let distances = lpips.distance(&images(a)?, &images(b)?)?;
        let distances = B::to_floats(distances.value())?;
        sum += distances.iter().map(|&x| f64::from(x)).sum::<f64>();
    }
    Ok(sum / a.len() as f64)
}
