//! What sets of samples are measured against: statistics in files, and the images of ADM's reference files.

use std::path::Path;

use super::measure::{Measured, Network, Source};
use crate::arrays::Arrays;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::inception;
use crate::numpy;
use crate::statistics::Moments;

/// Reads moments of the network's features, and of its spatial features where they are given.
pub fn statistics<B: Backend>(path: &Path, network: &Network<B>) -> Result<ReferenceStatistics> {
    let arrays = Arrays::open(path)?;
    let moments = |mean: &str, covariance: &str, dim: usize| {
        let found = arrays.read(mean, &[dim])?;
        let found = found.zip(arrays.read(covariance, &[dim, dim])?);
        let moments = found.map(|(mean, covariance)| Moments::new(mean, covariance));
        moments.transpose().map_err(|e| Error::data(path, e))
    };
    // `m` and `s` is what other tools call them.
    let own = match moments("mu", "sigma", network.dim())? {
        Some(own) => Some(own),
        None => moments("m", "s", network.dim())?,
    };
    let spatial = match network {
        Network::Inception { .. } => moments("mu_s", "sigma_s", inception::SPATIAL_FEATURES)?,
        Network::Classifier(_) => None,
    };
    Ok(ReferenceStatistics {
        moments: own,
        spatial,
        images: images(path)?,
    })
}

/// What a file says of the real images.
pub struct ReferenceStatistics {
    /// Moments of the features.
    pub moments: Option<Moments>,
    /// Moments of the spatial features.
    pub spatial: Option<Moments>,
    /// The images: their number, and channels, height, width.
    pub images: Option<(usize, [usize; 3])>,
}

/// How many images a file holds, and of what size: ADM's reference files have them as `arr_0`, uint8 (n, h, w, 3).
fn images(path: &Path) -> Result<Option<(usize, [usize; 3])>> {
    if !is_archive(path) {
        return Ok(None);
    }
    let archive = numpy::Archive::open(path)?;
    if !archive.names().contains(&IMAGES) {
        return Ok(None);
    }
    let rows = archive.stream(IMAGES)?;
    match (rows.kind(), rows.shape()) {
        ("u1", &[n, h, w, 3]) if n * h * w > 0 => Ok(Some((n, [3, h, w]))),
        (kind, shape) => {
            let message = format!("{IMAGES} is {kind} {shape:?}, expected images: u1 (n, h, w, 3)");
            Err(Error::data(path, message))
        }
    }
}

/// The images of such a file, to be measured.
pub fn of_archive(path: &Path, (count, image): (usize, [usize; 3])) -> Result<Source<'static>> {
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
    Ok(Source {
        name: "real images".into(),
        count,
        image,
        labels: None,
        read: Box::new(read),
    })
}

/// Name of the images in a NumPy archive.
const IMAGES: &str = "arr_0";

fn is_archive(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "npz")
}

/// Writes moments as [`statistics`] reads them.
pub fn save(path: &Path, real: &Measured) -> Result<()> {
    let few = |message: &String| Error::Numerical(format!("the real images: {message}"));
    let moments = real.moments.as_ref().map_err(few)?;
    let dim = moments.dim();
    let shapes = [[dim], [inception::SPATIAL_FEATURES]];
    let squares = shapes.map(|[d]| [d, d]);
    let mut arrays = vec![
        ("mu", &shapes[0][..], &moments.mean[..]),
        ("sigma", &squares[0][..], &moments.covariance[..]),
    ];
    if let Some(Ok(spatial)) = &real.spatial {
        arrays.push(("mu_s", &shapes[1][..], &spatial.mean[..]));
        arrays.push(("sigma_s", &squares[1][..], &spatial.covariance[..]));
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
        let found = images(&path).unwrap().unwrap();
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
        archive(&path, &[3, 2, 2], &bytes);
        let said = images(&path).unwrap_err().to_string();
        assert!(said.contains("expected images: u1 (n, h, w, 3)"), "{said}");
    }
}
