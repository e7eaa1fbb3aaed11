//! Image sets too large for memory: where they are stored, and what remains after an error.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use retort_abi::{ArtifactMeta, Cancel, Failure, FailureCode, Host, LogLevel};

use super::*;
use crate::error::Error;
use crate::files::MakeLock;
use crate::files::tests::names;
use crate::numpy;

/// A host that remembers messages, and may ask the stage to stop.
#[derive(Default)]
struct Listener {
    said: Mutex<Vec<String>>,
    stops: AtomicBool,
}

impl Host for Listener {
    fn log(&self, _: LogLevel, message: &str) {
        self.said.lock().unwrap().push(message.into());
    }
    fn metric(&self, _: &str, _: u64, _: f64) {}
    fn progress(&self, _: u64, _: u64, _: &str) {}
    fn cancelled(&self) -> Cancel {
        match self.stops.load(Ordering::Relaxed) {
            true => Cancel::Now,
            false => Cancel::Run,
        }
    }
    fn artifact_begin(&self, _: &str, _: &str) -> Result<(u64, PathBuf), Failure> {
        Err(Failure::new(FailureCode::Internal, "no artifacts here"))
    }
    fn artifact_commit(&self, _: u64, _: &ArtifactMeta) -> Result<(), Failure> {
        Ok(())
    }
    fn artifact_abort(&self, _: u64) {}
}

/// A file of RGB images of 256 x 256, 196,608 bytes each, whose colour follows from their number and `shift`.
fn arrays(dir: &Path, count: usize, shift: u8) -> Data {
    let mut file = numpy::header("|u1", &[count, 256, 256, 3]);
    for image in 0..count as u8 {
        file.extend(vec![image + shift; 3 << 16]);
    }
    std::fs::write(dir.join("a.npy"), file).unwrap();
    Data::Source(Box::new(DataOptions {
        arrays: Some("a.npy".into()),
        ..DataOptions::default()
    }))
}

fn load_in(dir: &Path, data: &Data, host: &Listener) -> crate::Result<Images> {
    load_after(dir, data, host, &|| Ok(MakeLock::undisputed()))
}

fn load_after(
    dir: &Path,
    data: &Data,
    host: &Listener,
    lock: &dyn Fn() -> crate::Result<MakeLock>,
) -> crate::Result<Images> {
    let cache = ImageCache {
        host,
        base_dir: dir,
        folder: Some(dir.join(cache::FOLDER)),
        lock,
    };
    load(data, None, &cache, |count| match count {
        99 => Err(Error::option("/data", "99 are not wanted")),
        _ => Ok(()),
    })
}

/// Names of the files beside the file of images.
fn entries(dir: &Path) -> Vec<String> {
    let names = names(dir).into_iter();
    names.filter(|name| name != "a.npy").collect()
}

/// The colour of an image.
fn colour(images: &Images, index: usize) -> f32 {
    let (pixels, _) = images.gather(&[index]).unwrap();
    assert_eq!(pixels.len(), 3 << 16);
    assert!(pixels.iter().all(|x| *x == pixels[0]));
    ((pixels[0] + 1.0) * 127.5).round()
}

#[test]
fn few_images_are_held_and_many_are_written_once() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, host) = (dir.path(), Listener::default());
    let images = load_in(dir, &arrays(dir, 80, 0), &host).unwrap();
    assert!(matches!(images.bytes, Bytes::Memory(_)));
    assert_eq!((colour(&images, 79), entries(dir)), (79.0, vec![]));

    // 17.7 MB.
    let data = arrays(dir, 90, 0);
    let images = load_in(dir, &data, &host).unwrap();
    assert!(matches!(images.bytes, Bytes::Files(_)));
    assert_eq!((images.len(), colour(&images, 89)), (90, 89.0));
    assert_eq!(entries(dir), ["images"]);
    let said = host.said.lock().unwrap().join("\n");
    assert!(
        said.contains("90 images take 17.7 MB of the work directory"),
        "{said}"
    );

    // The next attempt does not read their source.
    std::fs::remove_file(dir.join("a.npy")).unwrap();
    let again = load_in(dir, &data, &host).unwrap();
    assert_eq!((again.len(), colour(&again, 89)), (90, 89.0));
    // Incomplete files of an attempt are rewritten.
    let data = arrays(dir, 90, 7);
    std::fs::remove_file(dir.join("images/labels.npy")).unwrap();
    let anew = load_in(dir, &data, &host).unwrap();
    assert_eq!(
        (colour(&anew, 89), entries(dir)),
        (96.0, vec!["images".into()])
    );
}

#[test]
fn unfinished_images_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, host) = (dir.path(), Listener::default());
    let said = load_in(dir, &arrays(dir, 99, 0), &host).unwrap_err();
    assert_eq!(said.to_string(), "99 are not wanted");
    host.stops.store(true, Ordering::Relaxed);
    let data = arrays(dir, 90, 0);
    let stopped = load_in(dir, &data, &host).unwrap_err();
    assert!(matches!(stopped, Error::Cancelled), "{stopped}");
    host.stops.store(false, Ordering::Relaxed);
    let file = std::fs::File::options()
        .write(true)
        .open(dir.join("a.npy"))
        .unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    let cut = load_in(dir, &data, &host).unwrap_err().to_string();
    assert!(cut.contains("a.npy"), "{cut}");
    assert_eq!(entries(dir), [""; 0]);
}

#[test]
fn of_several_parts_one_writes_and_the_others_read() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (dir, other) = (dir.path(), other.path());
    let host = Listener::default();
    // The other part's images differ, so that they can be told apart.
    load_in(other, &arrays(other, 90, 5), &host).unwrap();
    let images = load_after(dir, &arrays(dir, 90, 0), &host, &|| {
        // Its turn comes when the other part has written them.
        std::fs::rename(other.join("images"), dir.join("images")).unwrap();
        Ok(MakeLock::undisputed())
    });
    assert_eq!(colour(&images.unwrap(), 89), 94.0);
}
