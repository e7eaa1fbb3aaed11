//! Named arrays of numbers, the form in which statistics of images are published: NumPy's archives (`.npz`), and checkpoint
//! files that contain tensors or NumPy's arrays.
//!
//! In: a name and the shape that the array must have. Out: f64, in C order. An array of another shape is refused before
//! any of it is read or unpacked.

use std::path::{Path, PathBuf};

use retort_checkpoint::{Checkpoint, Dtype, Tensor};

use crate::error::{Error, Result};
use crate::numpy::{Archive, Form, other_shape};

/// An open file of arrays.
pub struct Arrays {
    path: PathBuf,
    source: ArraySource,
}

enum ArraySource {
    Numpy(Archive),
    /// The tensors of a dictionary, by name.
    Checkpoint(Checkpoint, Vec<(String, Tensor)>),
}

impl Arrays {
    /// Opens a file.
    ///
    /// # Errors
    /// It cannot be read, or is neither kind of file. Its name does not matter.
    pub fn open(path: &Path) -> Result<Self> {
        let source = match Form::of(path)? {
            Form::Archive => ArraySource::Numpy(Archive::open(path)?),
            Form::Array => {
                let message = "one NumPy array without a name; expected arrays with names: a `.npz` archive, as \
                               `numpy.savez(file, mu=mu, sigma=sigma)` writes it, or a torch or safetensors file";
                return Err(Error::data(path, message));
            }
            Form::Other => {
                let checkpoint = Checkpoint::open(path).map_err(Error::checkpoint(path))?;
                let all = checkpoint.select(None).map_err(Error::checkpoint(path))?;
                let tensors = all.tensors().map(|(name, t)| (name.to_owned(), t.clone()));
                let tensors = tensors.collect();
                ArraySource::Checkpoint(checkpoint, tensors)
            }
        };
        Ok(Self {
            path: path.to_owned(),
            source,
        })
    }

    /// Whether it is an archive of NumPy's.
    pub fn is_archive(&self) -> bool {
        matches!(self.source, ArraySource::Numpy(_))
    }

    /// The shape of an array, if there is one of that name. No elements are read.
    ///
    /// # Errors
    /// It is damaged, or holds no numbers.
    pub fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        match &self.source {
            ArraySource::Numpy(archive) => archive.shape(name),
            ArraySource::Checkpoint(_, tensors) => {
                let found = tensors.iter().find(|(own, _)| own == name);
                Ok(found.map(|(_, tensor)| tensor.shape.clone()))
            }
        }
    }

    /// The elements of an array, if there is one of that name.
    ///
    /// # Errors
    /// It has another shape, is damaged, or holds no numbers.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Option<Vec<f64>>> {
        match &self.source {
            ArraySource::Numpy(archive) => archive.array(name, shape),
            ArraySource::Checkpoint(checkpoint, tensors) => {
                let Some((_, tensor)) = tensors.iter().find(|(own, _)| own == name) else {
                    return Ok(None);
                };
                if tensor.shape != shape {
                    let message = other_shape(name, &tensor.shape, shape);
                    return Err(Error::data(&self.path, message));
                }
                let wide = |bytes: Vec<u8>| {
                    let (elements, _) = bytes.as_chunks();
                    elements.iter().map(|x| f64::from_le_bytes(*x)).collect()
                };
                let data = match tensor.dtype {
                    // Fewer digits would lose small eigenvalues.
                    Dtype::F64 => checkpoint.raw(tensor).map(wide),
                    _ => checkpoint
                        .floats(tensor)
                        .map(|x| x.into_iter().map(f64::from).collect()),
                };
                data.map(Some)
                    .map_err(|e| Error::data(&self.path, format!("array {name}: {e}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    #[test]
    fn an_archive_may_have_any_name_and_one_array_is_none() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["statistics.npz", "statistics.pth", "statistics"] {
            let path = dir.path().join(name);
            crate::numpy::write_archive(&path, &[("mu", &[2], &[1.0, 2.0])]).unwrap();
            let arrays = Arrays::open(&path).unwrap();
            assert_eq!(arrays.read("mu", &[2]).unwrap().unwrap(), [1.0, 2.0]);
            assert!(arrays.is_archive());
            std::fs::write(&path, crate::numpy::header("<f8", &[0])).unwrap();
            let said = Arrays::open(&path).err().unwrap().to_string();
            for part in [name, "one NumPy array", "expected", "numpy.savez"] {
                assert!(said.contains(part), "{said}");
            }
        }
    }

    #[test]
    fn arrays_in_a_checkpoint_keep_their_digits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("statistics.safetensors");
        let (mu, sigma) = ([0.1, 1e-9], [1.0 + 1e-12, 0.5, 0.5, 2.0]);
        let bytes = |x: &[f64]| -> Vec<u8> { x.iter().flat_map(|x| x.to_le_bytes()).collect() };
        let (mean, covariance) = (bytes(&mu), bytes(&sigma));
        let views = [
            ("mu", TensorView::new(Dtype::F64, vec![2], &mean).unwrap()),
            (
                "sigma",
                TensorView::new(Dtype::F64, vec![2, 2], &covariance).unwrap(),
            ),
        ];
        safetensors::serialize_to_file(views, None, &path).unwrap();
        let arrays = Arrays::open(&path).unwrap();
        let found = arrays.read("sigma", &[2, 2]).unwrap().unwrap();
        assert_eq!(found, sigma);
        assert_eq!(arrays.read("mu", &[2]).unwrap().unwrap(), mu);
        assert_eq!(arrays.shape("sigma").unwrap(), Some(vec![2, 2]));
        assert_eq!(arrays.shape("mu_s").unwrap(), None);
        assert_eq!(arrays.read("mu_s", &[2]).unwrap(), None);
        let said = arrays.read("mu", &[3]).unwrap_err().to_string();
        assert!(
            said.contains("array mu of shape [2], expected [3]"),
            "{said}"
        );
    }
}
