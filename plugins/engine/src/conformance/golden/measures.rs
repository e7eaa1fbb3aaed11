//! The networks that measure images, and the figures taken from their features.

use std::path::Path;

use super::{Parts, Suite};
use crate::backend::Backend;
use crate::conformance::Case;
use crate::error::{Error, Result};
use crate::model::inception::{FEATURES, Inception, Preparation};
use crate::model::lpips::Lpips;
use crate::statistics::neighbours::precision_recall;
use crate::statistics::{Moments, frechet_distance, inception_score};
use crate::tape::{Variable, backward};
use crate::weights::Floats;

/// Compares the networks that measure images, and the figures taken from their features, with the results of pytorch-fid,
/// lpips and torch-fidelity in `measures` of `dir`.
///
/// # Errors
/// As [`super::check`].
pub fn measures<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
    let dir = dir.join("measures");
    let parts = Parts::open(&dir)?;
    let load = |part: &str| parts.loader(backend, part);
    let mut suite = Suite::open(backend, "measures", &dir.join("expected.safetensors"))?;

    let lpips = Lpips::load(&mut load("vgg")?, &mut load("linear")?)?;
    let side = |side: &str| {
        let half = |i: usize| parts.tensor("pairs", &format!("{side}.{i}"));
        let both = [half(0)?, half(1)?];
        let data = both.map(|x| &x.data[..]).concat();
        backend.floats(&data, &[&[2], &both[0].shape[..]].concat())
    };
    let grey = |x: &B::Tensor| Ok::<_, Error>(Variable::constant(B::narrow(x, 1, 0, 1)?));
    let (a, b) = (side("a")?, side("b")?);
    let found = lpips.distance(&grey(&a)?, &grey(&b)?)?;
    suite.floats("lpips.grey", found.value())?;
    let image = Variable::parameter(a);
    let distance = lpips.distance(&image, &Variable::constant(b))?;
    suite.floats("lpips.distance", distance.value())?;
    let sum = distance.sum(&[0])?;
    drop(distance);
    let gradient = backward(sum, &[("image".into(), image)])?;
    suite.floats("lpips.gradient", &gradient[0])?;

    let inception = Inception::load(&mut load("inception")?)?;
    for (name, count) in [("small", 2), ("exact", 2), ("large", 1), ("grey", 1)] {
        let image = |i: usize| parts.tensor("images", &format!("{name}.{i}"));
        let images: Vec<&Floats> = (0..count).map(image).collect::<Result<_>>()?;
        let byte = |x: &f32| (x.clamp(0.0, 1.0) * 255.0 + 0.5).floor() / 255.0;
        let pixels = images.iter().flat_map(|x| x.data.iter().map(byte));
        let shape = [&[count], &images[0].shape[..]].concat();
        let x = backend.floats(&pixels.collect::<Vec<_>>(), &shape)?;
        let x = Variable::constant(x);
        let found = inception.look(&x, Preparation::Pytorch)?;
        for (features, dims) in found.features.iter().zip(FEATURES) {
            suite.floats(&format!("inception.{name}.{dims}"), features.value())?;
        }
        suite.floats(&format!("inception.{name}.spatial"), found.spatial.value())?;
        let found = inception.look(&x, Preparation::Tensorflow)?;
        suite.floats(
            &format!("tensorflow.{name}.2048"),
            found.features[3].value(),
        )?;
        suite.floats(&format!("tensorflow.{name}.logits"), found.logits.value())?;
    }

    let set = |name: &str| parts.tensor("sets", name);
    let moments = |name: &str| -> Result<Moments> {
        let set = set(name)?;
        Ok(Moments::of(&set.data, set.shape[1])?)
    };
    let (real, logits) = (moments("real")?, set("logits")?);
    let score = inception_score(&logits.data, logits.shape[1], 10)?;
    let (images, fakes) = (&set("real")?.data, &set("fake")?.data);
    let both = precision_recall(images, fakes, real.dim(), 3, &mut || true)?;
    let figures = [
        ("fake", frechet_distance(&real, &moments("fake")?)?),
        ("few", frechet_distance(&real, &moments("few")?)?),
        ("inception score", score.mean),
        ("its deviation", score.deviation),
        ("precision", both.precision),
        ("recall", both.recall),
    ];
    let expected = suite.expected.floats("sets.figures")?;
    if expected.len() != figures.len() {
        let message = format!("{} figures, expected {}", expected.len(), figures.len());
        return Err(Error::data(&suite.expected.path, message));
    }
    for ((name, found), expected) in figures.into_iter().zip(expected) {
        let error = (found / f64::from(expected) - 1.0).abs();
        let name = format!("measures/sets.{name}");
        suite.cases.push(Case::new(name, error, 1e-6));
    }
    let shorter = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
    for (name, found) in [("mean", &real.mean), ("covariance", &real.covariance)] {
        let name = format!("sets.{name}");
        let shape = suite.expected.shape(&name)?;
        suite.values(&name, &shape, &shorter(found))?;
    }
    suite.expected.all_seen(None)?;
    Ok(suite.cases)
}
