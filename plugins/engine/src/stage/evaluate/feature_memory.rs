//! Whether the features for comparing images in pairs fit into memory. Checked before images are decoded and measured, which
//! may take days.

use super::Options;
use crate::error::Result;
use crate::memory;
use crate::stage::classifier::FEATURES_FOR_FIGURES;

/// Whether features are kept: if there is a set to compare with the real images, and a figure that compares pairs.
pub fn keeps(o: &Options) -> bool {
    let has_sets = !o.samples.is_empty() || !o.tokenizers.is_empty();
    has_sets && (o.neighbours > 0 || o.kernel.is_some())
}

/// Refuses too many real images before the network is opened. The feature size of another stage's classifier is not known
/// yet.
pub fn check_real(o: &Options, real: usize) -> Result<()> {
    match (&o.inception, &o.classifier) {
        (Some(_), _) => check(o, o.dims, real, 0),
        (None, None) => check(o, FEATURES_FOR_FIGURES, real, 0),
        (None, Some(_)) => Ok(()),
    }
}

/// Refuses too many real images and samples, whose features, `dim` for each, are kept at the same time.
pub fn check(o: &Options, dim: usize, real: usize, samples: usize) -> Result<()> {
    let Some(needed) = FeatureMemory::of(o, dim, real, samples) else {
        return Ok(());
    };
    memory::check(needed.pointer, &needed.what, needed.bytes, needed.advice)
}

/// The kept features, and advice if they do not fit.
struct FeatureMemory {
    pointer: &'static str,
    what: String,
    bytes: Option<u64>,
    advice: &'static str,
}

impl FeatureMemory {
    /// None if no features are kept.
    fn of(o: &Options, dim: usize, real: usize, samples: usize) -> Option<Self> {
        if real == 0 || !keeps(o) {
            return None;
        }
        let (pointer, advice) = match (o.neighbours > 0, o.kernel.is_some()) {
            (_, false) => (
                "/neighbours",
                "leave precision and recall out (`neighbours: 0`), or give fewer real images",
            ),
            (false, true) => (
                "/kernel",
                "leave the kernel distance out, or give fewer real images",
            ),
            (true, true) => (
                "/neighbours",
                "leave precision, recall and the kernel distance out (`neighbours: 0` and no `kernel`), or give fewer real \
                 images",
            ),
        };
        let beside = match samples {
            0 => String::new(),
            _ => format!(" and {samples} samples"),
        };
        let count = real.saturating_add(samples);
        Some(Self {
            pointer,
            what: format!("features of {real} real images{beside}, {dim} of each,"),
            bytes: memory::floats(&[count, dim]),
            advice,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::KernelOptions;
    use super::*;

    fn options(text: serde_json::Value) -> Options {
        serde_json::from_value(text).unwrap()
    }

    #[test]
    fn features_are_asked_for_where_they_are_kept() {
        let samples = serde_json::json!({ "drawn": "stage" });
        let mut o = options(serde_json::json!({ "samples": samples, "inception": "i.pth" }));
        let needed = FeatureMemory::of(&o, 2048, 1_281_167, 50_000).unwrap();
        assert_eq!(needed.pointer, "/neighbours");
        assert_eq!(
            needed.what,
            "features of 1281167 real images and 50000 samples, 2048 of each,"
        );
        assert_eq!(needed.bytes, Some(1_331_167 * 2048 * 4));
        assert!(needed.advice.contains("`neighbours: 0`)"));
        // Before the network and the samples exist.
        assert!(check_real(&o, usize::MAX).is_err());
        assert!(check_real(&o, 1000).is_ok());
        o.kernel = Some(KernelOptions::default());
        let needed = FeatureMemory::of(&o, 2048, 10, 0).unwrap();
        assert!(needed.advice.contains("`neighbours: 0` and no `kernel`"));
        o.neighbours = 0;
        assert_eq!(
            FeatureMemory::of(&o, 2048, 10, 0).unwrap().pointer,
            "/kernel"
        );
        o.kernel = None;
        assert!(check_real(&o, usize::MAX).is_ok());
        // Statistics alone need none.
        o.neighbours = 3;
        o.samples.clear();
        assert!(check_real(&o, usize::MAX).is_ok());
    }
}
