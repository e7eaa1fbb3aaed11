//! References for sets of samples: statistics in files, and the images of ADM's reference files.
//!
//! Statistics written here record their network and preparation. Other tools look arrays up by name and ignore these two.

use std::path::{Path, PathBuf};

use super::Options;
use super::measure::{ImageReader, Network, SetMeasurements};
use crate::arrays::Arrays;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::inception::{self, Preparation};
use crate::numpy::{self, other_shape};
use crate::statistics::Moments;

/// An open file of statistics: the names and shapes of its arrays. No mean or covariance has been read.
pub struct StatisticsFile {
    path: PathBuf,
    arrays: Arrays,
    /// Names of mean and covariance of the features, and of the spatial features.
    moments: Option<Names>,
    spatial: Option<Names>,
    images: Option<ImageShape>,
    /// The preparation of the images, if recorded.
    preparation: Option<Preparation>,
    /// Whether it has the additional arrays of ADM's files.
    is_like_adm: bool,
}

/// Names of a mean and a covariance.
type Names = [&'static str; 2];

/// A number of images, and channels, height, width.
pub type ImageShape = (usize, [usize; 3]);

/// Names of the moments of features; some tools use `m` and `s`.
const MOMENTS: [Names; 2] = [["mu", "sigma"], ["m", "s"]];
/// The same of spatial features.
const SPATIAL: Names = ["mu_s", "sigma_s"];
/// Name of the images in a NumPy archive, as in ADM's reference files.
const IMAGES: &str = "arr_0";
/// The longest side of an image there.
const SIDE_MOST: usize = 8192;
/// Name of the hash of the network's weights, 32 bytes.
const NETWORK: &str = "retort_network";
/// Name of the preparation, an index into [`PREPARATIONS`].
const PREPARATION: &str = "retort_preparation";
const PREPARATIONS: [Preparation; 2] = [Preparation::Pytorch, Preparation::Tensorflow];

/// A file's information about the real images.
pub struct ReferenceStatistics {
    /// Moments of the features.
    pub moments: Option<Moments>,
    /// Moments of the spatial features.
    pub spatial: Option<Moments>,
    /// The images.
    pub images: Option<ImageShape>,
}

impl StatisticsFile {
    /// Opens a file for a network with this many features, if known, which may be Inception.
    ///
    /// # Errors
    /// It contains no reference, an incomplete one, or arrays of other shapes.
    pub fn open(path: &Path, dim: Option<usize>, is_inception: bool) -> Result<Self> {
        let arrays = Arrays::open(path)?;
        let pair = |names, dim| has_pair(path, &arrays, names, dim);
        let mut moments = None;
        for names in MOMENTS {
            if moments.is_none() && pair(names, dim)? {
                moments = Some(names);
            }
        }
        let spatial = match is_inception && pair(SPATIAL, Some(inception::SPATIAL_FEATURES))? {
            true => Some(SPATIAL),
            false => None,
        };
        let images = images(path, &arrays)?;
        if moments.is_none() && images.is_none() {
            let message = "no arrays `mu` and `sigma`, nor `m` and `s`, and no images `arr_0`";
            return Err(Error::data(path, message));
        }
        let preparation = match arrays.read(PREPARATION, &[1])? {
            None => None,
            Some(number) => {
                let known = (0..)
                    .zip(PREPARATIONS)
                    .find(|(i, _)| number == [f64::from(*i)]);
                let unknown = || Error::data(path, format!("{PREPARATION} is {number:?}"));
                Some(known.ok_or_else(unknown)?.1)
            }
        };
        Ok(Self {
            path: path.to_owned(),
            is_like_adm: arrays.shape(SPATIAL[0])?.is_some() || images.is_some(),
            arrays,
            moments,
            spatial,
            images,
            preparation,
        })
    }

    /// Refuses a file that is incompatible with the other options.
    pub fn check(&self, o: &Options) -> Result<()> {
        let path = self.path.display();
        let other = match (&o.data, &o.real) {
            (Some(_), _) => Some("data"),
            (None, Some(_)) => Some("real"),
            (None, None) => None,
        };
        if let (None, Some(other)) = (&self.moments, other) {
            let message = format!(
                "{path} holds images alone, and `{other}` gives the real images already: leave one of the two out"
            );
            return Err(Error::option("/statistics", message));
        }
        if self.moments.is_none() || o.inception.is_none() {
            return Ok(());
        }
        let [own] = o.preparation.all() else {
            let message = format!(
                "the statistics in {path} belong to one preparation: name only that, and use another stage for others"
            );
            return Err(Error::option("/preparation", message));
        };
        match self.preparation {
            Some(other) if other != *own => {
                let (other, own) = (other.name(), own.name());
                let message = format!(
                    "the statistics in {path} were made with `preparation: {other}`: give that here too, or statistics \
                     made with {own}"
                );
                Err(Error::option("/preparation", message))
            }
            _ => Ok(()),
        }
    }

    /// A warning, if the file seems to be made with another preparation than the one used here.
    pub fn warning(&self, o: &Options) -> Option<String> {
        let told = self.preparation.is_some() || self.moments.is_none() || o.inception.is_none();
        if told || !self.is_like_adm || !o.preparation.all().contains(&Preparation::Pytorch) {
            return None;
        }
        let path = self.path.display();
        Some(format!(
            "{path} holds `mu_s` or `arr_0`, as ADM's reference files do, whose statistics are made with `preparation: \
             tensorflow`; beside those, figures of `preparation: pytorch` are off by some percent"
        ))
    }

    /// Reads the moments, which must be those of this network.
    pub fn read<B: Backend>(&self, network: &Network<B>) -> Result<ReferenceStatistics> {
        let dim = network.dim();
        if self.moments.is_some() {
            self.check_network(&network.hash)?;
        }
        let own = |names: Option<Names>, dim| match names {
            Some(names) => self.moments(names, dim).map(Some),
            None => Ok(None),
        };
        Ok(ReferenceStatistics {
            moments: own(self.moments, dim)?,
            spatial: own(self.spatial, inception::SPATIAL_FEATURES)?,
            images: self.images,
        })
    }

    fn moments(&self, names: Names, dim: usize) -> Result<Moments> {
        let read = |name, shape: &[usize]| {
            let missing = || Error::data(&self.path, format!("no array {name}"));
            self.arrays.read(name, shape)?.ok_or_else(missing)
        };
        let [mean, covariance] = names;
        let moments = Moments::new(read(mean, &[dim])?, read(covariance, &[dim, dim])?);
        moments.map_err(|e| Error::data(&self.path, format!("arrays {mean} and {covariance}: {e}")))
    }

    /// Refuses statistics recorded for another network.
    fn check_network(&self, own: &blake3::Hash) -> Result<()> {
        let Some(found) = self.arrays.read(NETWORK, &[blake3::OUT_LEN])? else {
            return Ok(());
        };
        if found == own.as_bytes().map(f64::from) {
            return Ok(());
        }
        let found: Vec<u8> = found.iter().map(|&x| x as u8).collect();
        let short = |bytes: &[u8]| -> String {
            let first = bytes.iter().take(4);
            first.map(|byte| format!("{byte:02x}")).collect()
        };
        let message = format!(
            "these statistics are of the features of another network (its weights have the hash {}..., here {}...): measure \
             with that one, or write them anew with `save_statistics`",
            short(&found),
            short(own.as_bytes())
        );
        Err(Error::data(&self.path, message))
    }
}

/// Whether both arrays exist, with the right shapes.
fn has_pair(path: &Path, arrays: &Arrays, names: Names, dim: Option<usize>) -> Result<bool> {
    let [mean, covariance] = names;
    let refuse = |message: String| Err(Error::data(path, message));
    let (first, second) = match (arrays.shape(mean)?, arrays.shape(covariance)?) {
        (Some(first), Some(second)) => (first, second),
        (None, None) => return Ok(false),
        (Some(_), None) => return refuse(format!("array {mean} without an array {covariance}")),
        (None, Some(_)) => return refuse(format!("array {covariance} without an array {mean}")),
    };
    // A mean must have one dimension.
    let dim = dim.unwrap_or(first.iter().product());
    for (name, found, expected) in [
        (mean, &first, &[dim][..]),
        (covariance, &second, &[dim, dim]),
    ] {
        if found != expected {
            return refuse(other_shape(name, found, expected));
        }
    }
    Ok(true)
}

/// The number and size of a file's images: in ADM's reference files `arr_0`, uint8 (n, h, w, 3).
fn images(path: &Path, arrays: &Arrays) -> Result<Option<ImageShape>> {
    if !arrays.is_archive() {
        return Ok(None);
    }
    let archive = numpy::Archive::open(path)?;
    if !archive.names().contains(&IMAGES) {
        return Ok(None);
    }
    let rows = archive.stream(IMAGES)?;
    match (rows.kind(), rows.shape()) {
        ("u1", &[_, h, w, 3]) if h.max(w) > SIDE_MOST => {
            let message =
                format!("{IMAGES} has images of {h} x {w}, expected sides of at most {SIDE_MOST}");
            Err(Error::data(path, message))
        }
        ("u1", &[n, h, w, 3]) if n.checked_mul(h * w).is_some_and(|all| all > 0) => {
            Ok(Some((n, [3, h, w])))
        }
        (kind, shape) => {
            let message = format!("{IMAGES} is {kind} {shape:?}, expected images: u1 (n, h, w, 3)");
            Err(Error::data(path, message))
        }
    }
}

/// The images of such a file, to be measured.
pub fn of_archive(path: &Path, (count, image): ImageShape) -> Result<ImageReader<'static>> {
    let (mut rows, path) = (numpy::Archive::open(path)?.stream(IMAGES)?, path.to_owned());
    let [c, h, w] = image;
    let read = move |_: usize, n: usize| {
        let bytes = rows.read_bytes(n * h * w * c); // (n, h, w, c)
        let pixels = bytes.map_err(|e| Error::data(&path, format!("array {IMAGES}: {e}")))?;
        let mut out = vec![0.0; pixels.len()]; // (n, c, h, w)
        for (own, turned) in pixels
            .chunks_exact(h * w * c)
            .zip(out.chunks_exact_mut(h * w * c))
        {
            for (place, colours) in own.chunks_exact(c).enumerate() {
                for (channel, &x) in colours.iter().enumerate() {
                    turned[channel * h * w + place] = f32::from(x) / 127.5 - 1.0;
                }
            }
        }
        Ok(out)
    };
    Ok(ImageReader {
        name: "real images".into(),
        count,
        image,
        labels: None,
        by_class: false,
        read: Box::new(read),
    })
}

/// Writes moments in the format of [`StatisticsFile`], with their network and for Inception the preparation.
pub fn save(
    path: &Path,
    real: &SetMeasurements,
    (network, preparation): (&blake3::Hash, Option<Preparation>),
) -> Result<()> {
    let few = |message: &String| Error::Numerical(format!("the real images: {message}"));
    let moments = real.moments.as_ref().map_err(few)?;
    let dim = moments.dim();
    let shapes = [[dim], [inception::SPATIAL_FEATURES]];
    let squares = shapes.map(|[d]| [d, d]);
    let hash = network.as_bytes().map(f64::from);
    let mut arrays = vec![
        ("mu", &shapes[0][..], &moments.mean[..]),
        ("sigma", &squares[0][..], &moments.covariance[..]),
        (NETWORK, &[blake3::OUT_LEN][..], &hash[..]),
    ];
    if let Some(Ok(spatial)) = &real.spatial {
        arrays.push(("mu_s", &shapes[1][..], &spatial.mean[..]));
        arrays.push(("sigma_s", &squares[1][..], &spatial.covariance[..]));
    }
    let place = PREPARATIONS
        .iter()
        .position(|own| Some(*own) == preparation);
    let number = [place.unwrap_or_default() as f64];
    if place.is_some() {
        arrays.push((PREPARATION, &[1], &number));
    }
    numpy::write_archive(path, &arrays)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive as `numpy.savez` writes it.
    fn archive(path: &Path, shape: &[usize], bytes: &[u8]) {
        use std::io::Write;
        let mut archive = zip::ZipWriter::new(std::fs::File::create(path).unwrap());
        archive.start_file("arr_0.npy", numpy::stored(0)).unwrap();
        archive.write_all(&numpy::header("|u1", shape)).unwrap();
        archive.write_all(bytes).unwrap();
        archive.finish().unwrap();
    }

    #[test]
    fn images_of_an_archive_are_streamed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reference.npz");
        let bytes: Vec<u8> = (0..3 * 2 * 2 * 3).map(|i| i * 7).collect();
        archive(&path, &[3, 2, 2, 3], &bytes);
        let found = images(&path, &Arrays::open(&path).unwrap())
            .unwrap()
            .unwrap();
        assert_eq!(found, (3, [3, 2, 2]));
        let mut source = of_archive(&path, found).unwrap();
        let mut all = (source.read)(0, 2).unwrap();
        all.extend((source.read)(2, 1).unwrap());
        for (i, x) in all.iter().enumerate() {
            let (image, channel, place) = (i / 12, i / 4 % 3, i % 4);
            let byte = bytes[image * 12 + place * 3 + channel];
            assert_eq!(((x + 1.0) * 127.5).round(), f32::from(byte), "{i}");
        }
        assert!((source.read)(3, 1).is_err());
        archive(&path, &[3, 2, 2], &bytes[..12]);
        let said = images(&path, &Arrays::open(&path).unwrap())
            .unwrap_err()
            .to_string();
        assert!(said.contains("expected images: u1 (n, h, w, 3)"), "{said}");
    }

    #[test]
    fn images_of_an_archive_have_sides_as_images_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reference.npz");
        let bytes = vec![0; 8193 * 3];
        archive(&path, &[1, 1, 8192, 3], &bytes[..8192 * 3]);
        assert_eq!(
            images(&path, &Arrays::open(&path).unwrap()).unwrap(),
            Some((1, [3, 1, 8192]))
        );
        archive(&path, &[1, 1, 8193, 3], &bytes);
        let said = images(&path, &Arrays::open(&path).unwrap())
            .unwrap_err()
            .to_string();
        let expected =
            "reference.npz: arr_0 has images of 1 x 8193, expected sides of at most 8192";
        assert!(said.contains(expected), "{said}");
    }

    /// Options that a file must be compatible with.
    fn options(file: &str, more: serde_json::Value) -> Options {
        let mut all = serde_json::json!({
            "samples": {"drawn": "drawn"},
            "statistics": file,
            "inception": "inception.pth",
            "dims": 64,
        });
        for (key, value) in more.as_object().unwrap() {
            all[key] = value.clone();
        }
        serde_json::from_value(all).unwrap()
    }

    /// Moments of 64 features.
    fn moments() -> Moments {
        let mut covariance = vec![0.0; 64 * 64];
        (0..64).for_each(|i| covariance[i * 65] = 1.0 + i as f64);
        Moments::new(vec![0.5; 64], covariance).unwrap()
    }

    fn saved(path: &Path, network: &blake3::Hash, preparation: Option<Preparation>) {
        let real = SetMeasurements {
            moments: Ok(moments()),
            spatial: None,
            score: None,
            agreement: None,
            features: Vec::new(),
        };
        save(path, &real, (network, preparation)).unwrap();
    }

    #[track_caller]
    fn refused(found: Result<()>, texts: &[&str]) {
        let said = found.unwrap_err().to_string();
        for text in texts {
            assert!(said.contains(text), "`{text}` is missing in: {said}");
        }
    }

    #[test]
    fn statistics_of_another_network_or_preparation_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("own.npz");
        let [own, other] = [b"own", b"oth"].map(|name| blake3::hash(name));
        saved(&path, &own, Some(Preparation::Tensorflow));
        let file = StatisticsFile::open(&path, Some(64), true).unwrap();
        file.check_network(&own).unwrap();
        refused(
            file.check_network(&other),
            &[
                "own.npz",
                "another network",
                &own.to_hex()[..8],
                &other.to_hex()[..8],
            ],
        );
        assert_eq!(file.moments(MOMENTS[0], 64).unwrap(), moments());
        let with = |more| options("own.npz", more).check_statistics(dir.path());
        with(serde_json::json!({"preparation": "tensorflow"})).unwrap();
        refused(
            with(serde_json::json!({})),
            &["own.npz", "made with `preparation: tensorflow`", "pytorch"],
        );
        // A classifier has no preparation.
        saved(&path, &own, None);
        with(serde_json::json!({})).unwrap();
        // Other files record nothing.
        let m = moments();
        let arrays = [
            ("m", &[64][..], &m.mean[..]),
            ("s", &[64, 64], &m.covariance),
        ];
        numpy::write_archive(&path, &arrays).unwrap();
        let file = StatisticsFile::open(&path, Some(64), true).unwrap();
        file.check_network(&other).unwrap();
        with(serde_json::json!({"preparation": "tensorflow"})).unwrap();
        let number = [2.0];
        let arrays = [arrays[0], arrays[1], (PREPARATION, &[1], &number)];
        numpy::write_archive(&path, &arrays).unwrap();
        refused(
            with(serde_json::json!({})),
            &["own.npz", "retort_preparation is [2.0]"],
        );
    }

    #[test]
    fn files_that_cannot_serve_are_refused_beforehand() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("own.npz");
        let zeros = vec![0.0; 64 * 64];
        let with = |more| options("own.npz", more).check_statistics(dir.path());
        let inception = || with(serde_json::json!({}));
        // The runner reports a missing file.
        inception().unwrap();
        let write = |arrays: &[(&str, &[usize])]| {
            let all: Vec<(&str, &[usize], &[f64])> = arrays
                .iter()
                .map(|(name, shape)| (*name, *shape, &zeros[..shape.iter().product()]))
                .collect();
            numpy::write_archive(&path, &all).unwrap();
        };
        write(&[("mu", &[64]), ("sigma", &[64, 64])]);
        inception().unwrap();
        write(&[("mean", &[64]), ("cov", &[64, 64])]);
        refused(inception(), &["own.npz", "no arrays `mu` and `sigma`"]);
        write(&[("mu", &[64])]);
        refused(inception(), &["own.npz", "array mu without an array sigma"]);
        write(&[("mu", &[32]), ("sigma", &[32, 32])]);
        refused(inception(), &["array mu of shape [32], expected [64]"]);
        write(&[("mu", &[64]), ("sigma", &[64, 32])]);
        refused(
            inception(),
            &["array sigma of shape [64, 32], expected [64, 64]"],
        );
        write(&[
            ("mu", &[64]),
            ("sigma", &[64, 64]),
            ("mu_s", &[7]),
            ("sigma_s", &[7, 7]),
        ]);
        refused(inception(), &["array mu_s of shape [7], expected [2023]"]);

        // The feature size of a given classifier is known later; one trained here has 64.
        let by = |stage: &str| with(serde_json::json!({"inception": null, "classifier": stage}));
        write(&[("mu", &[32]), ("sigma", &[32, 32])]);
        by("eye").unwrap();
        write(&[("mu", &[32]), ("sigma", &[32, 31])]);
        refused(
            by("eye"),
            &["array sigma of shape [32, 31], expected [32, 32]"],
        );
        write(&[("mu", &[4, 8]), ("sigma", &[32, 32])]);
        refused(by("eye"), &["array mu of shape [4, 8], expected [32]"]);
        write(&[("mu", &[32]), ("sigma", &[32, 32])]);
        let trained = serde_json::json!({"inception": null, "data": "pictures"});
        refused(with(trained), &["array mu of shape [32], expected [64]"]);
        std::fs::write(&path, b"no archive").unwrap();
        refused(inception(), &["own.npz"]);
    }

    #[test]
    fn an_element_that_no_covariance_has_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("own.npz");
        let m = moments();
        let with = |at: usize, value: f64| {
            let mut sigma = m.covariance.clone();
            sigma[at] = value;
            let arrays = [("mu", &[64][..], &m.mean[..]), ("sigma", &[64, 64], &sigma)];
            numpy::write_archive(&path, &arrays).unwrap();
            let file = StatisticsFile::open(&path, Some(64), true).unwrap();
            file.moments(MOMENTS[0], 64).map(drop)
        };
        with(0, 1.0).unwrap();
        for (at, value, element) in [
            (3, 0.5, "element (3, 0) is 0, and element (0, 3) 0.5"),
            (65, -1.0, "element (1, 1) is -1"),
            (2, f64::NAN, "element (0, 2) is NaN"),
        ] {
            refused(
                with(at, value),
                &["own.npz", "arrays mu and sigma", element],
            );
        }
    }

    #[test]
    fn images_alone_stand_for_the_real_ones() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ADM.NPZ");
        archive(&path, &[3, 2, 2, 3], &[0; 36]);
        let with = |more| options("ADM.NPZ", more).check_statistics(dir.path());
        with(serde_json::json!({})).unwrap();
        // Each preparation is measured.
        let both = || serde_json::json!({"preparation": ["pytorch", "tensorflow"]});
        with(both()).unwrap();
        for name in ["data", "real"] {
            let said = format!("`{name}` gives the real images already");
            refused(
                with(serde_json::json!({name: "other"})),
                &["ADM.NPZ", "images alone", &said],
            );
        }
        let file = StatisticsFile::open(&path, Some(64), true).unwrap();
        assert_eq!(file.images, Some((3, [3, 2, 2])));
        let warned = |file: &StatisticsFile, more| file.warning(&options("ADM.NPZ", more));
        assert_eq!(warned(&file, serde_json::json!({})), None);

        // Statistics belong to one preparation; ADM's to a particular one.
        let (m, own) = (moments(), blake3::hash(b"own"));
        let arrays = [
            ("mu", &[64][..], &m.mean[..]),
            ("sigma", &[64, 64], &m.covariance),
        ];
        let spatial = [inception::SPATIAL_FEATURES; 2];
        let zeros = vec![0.0; spatial[0] * spatial[1]];
        let like_adm = [
            arrays[0],
            arrays[1],
            ("mu_s", &spatial[..1], &zeros[..spatial[0]]),
            ("sigma_s", &spatial[..], &zeros),
        ];
        numpy::write_archive(&path, &like_adm).unwrap();
        refused(with(both()), &["ADM.NPZ", "belong to one preparation"]);
        let file = StatisticsFile::open(&path, Some(64), true).unwrap();
        let said = warned(&file, serde_json::json!({})).unwrap();
        assert!(
            said.contains("ADM.NPZ") && said.contains("preparation: tensorflow"),
            "{said}"
        );
        assert_eq!(
            warned(&file, serde_json::json!({"preparation": "tensorflow"})),
            None
        );
        numpy::write_archive(&path, &arrays).unwrap();
        let file = StatisticsFile::open(&path, Some(64), true).unwrap();
        assert_eq!(warned(&file, serde_json::json!({})), None);
        // Statistics saved here record their network and preparation.
        let real = SetMeasurements {
            moments: Ok(moments()),
            spatial: Some(Ok(Moments::new(
                zeros[..spatial[0]].to_vec(),
                zeros.clone(),
            )
            .unwrap())),
            score: None,
            agreement: None,
            features: Vec::new(),
        };
        save(&path, &real, (&own, Some(Preparation::Pytorch))).unwrap();
        let file = StatisticsFile::open(&path, Some(64), true).unwrap();
        assert_eq!(warned(&file, serde_json::json!({})), None);
        file.check_network(&own).unwrap();
    }
}
