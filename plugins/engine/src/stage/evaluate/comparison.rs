//! The metrics of a set: its measurements compared with the reference.

use retort_abi::Cancel;

use super::Options;
use super::measure::{Measurement, SetMeasurements, had};
use super::metric::{KernelSubsets, Metric};
use crate::backend::Backend;
use crate::context::Context;
use crate::error::Result;
use crate::random::{Sequence, Stream};
use crate::statistics::kernel::{KernelDistance, kernel_distance};
use crate::statistics::neighbours::{PrecisionRecall, precision_recall};
use crate::statistics::{InceptionScore, Moments, frechet_distance};

/// The reference of a set.
pub struct ReferenceMeasurements<'a> {
    /// Moments of their features.
    pub moments: Measurement<&'a Moments>,
    /// Moments of their spatial features.
    pub spatial: Measurement<&'a Moments>,
    /// The real images, if they were measured.
    pub images: Option<&'a SetMeasurements>,
}

/// The metrics of a set, and the subsets of its kernel distance.
pub fn metrics<B: Backend>(
    context: &Context<'_, B>,
    o: &Options,
    real: &ReferenceMeasurements<'_>,
    set: &SetMeasurements,
) -> Result<(Vec<Metric>, Option<KernelSubsets>)> {
    let go_on = &mut || context.host.cancelled() == Cancel::Run;
    let distance =
        |real: &Measurement<&Moments>, own: &Measurement<Moments>| -> Result<Measurement<f64>> {
            match (real, own) {
                (Ok(real), Ok(own)) => Ok(Ok(frechet_distance(real, own)?)),
                (Err(reason), _) | (_, Err(reason)) => Ok(Err(reason.clone())),
            }
        };
    let value = distance(&real.moments, &set.moments)?;
    let mut metrics = vec![Metric::new(
        "frechet_distance",
        "Frechet distance",
        3,
        value,
    )];
    let mut add = |key, title, digits, value| metrics.push(Metric::new(key, title, digits, value));
    if let Some(own) = &set.spatial {
        let value = distance(&real.spatial, own)?;
        add("spatial_frechet_distance", "spatial", 3, value);
    }
    if let Some(score) = &set.score {
        let of = |metric: fn(&InceptionScore) -> f64| match score {
            Ok(score) => Ok(metric(score)),
            Err(reason) => Err(reason.clone()),
        };
        add("inception_score", "inception score", 3, of(|s| s.mean));
        add("inception_score_deviation", "+-", 3, of(|s| s.deviation));
    }
    if let Some(agreement) = set.agreement {
        add("class_agreement", "class agreement", 4, Ok(agreement));
    }
    let dim = match &set.moments {
        Ok(moments) => moments.dim(),
        Err(_) => 0,
    };
    let pairs = match (real.images, &set.moments) {
        (None, _) => Err("statistics stand for the real images".to_owned()),
        (_, Err(reason)) => Err(reason.clone()),
        (Some(real), _) => Ok((&real.features, &set.features)),
    };
    if o.neighbours > 0 {
        let both = match &pairs {
            Ok((real, own)) => had(precision_recall(real, own, dim, o.neighbours, go_on))?,
            Err(reason) => Err(reason.clone()),
        };
        let of = |metric: fn(&PrecisionRecall) -> f64| match &both {
            Ok(both) => Ok(metric(both)),
            Err(reason) => Err(reason.clone()),
        };
        add("precision", "precision", 4, of(|both| both.precision));
        add("recall", "recall", 4, of(|both| both.recall));
    }
    let mut subsets = None;
    if let Some(kernel) = &o.kernel {
        // The same subsets for every seed, so that metrics of several runs are comparable.
        let mut sequence = Sequence::new(0, Stream::Subset, 0);
        let below = &mut |n| sequence.below(n);
        let sizes = (kernel.subsets, kernel.size);
        let found = match &pairs {
            Ok((real, own)) => had(kernel_distance(real, own, dim, sizes, below, go_on))?,
            Err(reason) => Err(reason.clone()),
        };
        let (mean, deviation) = match &found {
            Ok(found) => (Ok(found.mean), deviation(found)),
            Err(reason) => (Err(reason.clone()), Err(reason.clone())),
        };
        add("kernel_distance", "kernel distance", 5, mean);
        add("kernel_distance_deviation", "+-", 5, deviation);
        subsets = found.ok().map(|found| KernelSubsets {
            subsets: found.subsets,
            size: found.size,
        });
    }
    Ok((metrics, subsets))
}

/// The spread of the estimates, if there are several.
fn deviation(found: &KernelDistance) -> Measurement<f64> {
    found.deviation.ok_or_else(|| {
        let size = found.size;
        format!("a single estimate, from all {size} samples: a smaller `size` gives several")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::evaluate::metric::SetMetrics;

    #[test]
    fn a_single_estimate_has_no_deviation() {
        let found = |subsets, deviation| KernelDistance {
            mean: 0.25,
            deviation,
            subsets,
            size: 24,
        };
        assert_eq!(deviation(&found(5, Some(0.5))), Ok(0.5));
        let reason = deviation(&found(1, None)).unwrap_err();
        assert!(reason.contains("a single estimate, from all 24 samples"));
        // A row reports the actual number and size of subsets, not the requested ones.
        let row = SetMetrics {
            name: "drawn".into(),
            count: 24,
            passes: None,
            metrics: vec![Metric::new(
                "kernel_distance_deviation",
                "+-",
                5,
                Err(reason),
            )],
            kernel: Some(KernelSubsets {
                subsets: 1,
                size: 24,
            }),
        };
        let summary = row.summary();
        assert_eq!(summary["kernel"]["subsets"], 1);
        assert_eq!(summary["kernel"]["size"], 24);
        assert!(summary["kernel_distance_deviation"].is_null());
    }
}
