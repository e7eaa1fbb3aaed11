//! Writes checkpoint files like `torch.save`, so that tests need no Python.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use retort_engine::weights::Weights;
use zip::CompressionMethod;
use zip::write::{SimpleFileOptions, ZipWriter};

/// A torch archive being written: storages at once, the pickle at the end.
pub struct Archive {
    zip: ZipWriter<BufWriter<File>>,
    /// The pickle so far.
    pickle: Vec<u8>,
    storages: usize,
}

impl Archive {
    /// Begins a file whose value is a dictionary.
    pub fn create(path: &Path) -> Self {
        let file = BufWriter::new(File::create(path).expect("a new file"));
        Self {
            zip: ZipWriter::new(file),
            pickle: b"\x80\x02}(".to_vec(),
            storages: 0,
        }
    }

    /// Begins a dictionary under a name.
    pub fn open(&mut self, name: &str) {
        self.text(name);
        self.pickle.extend(b"}(");
    }

    /// Ends the last open dictionary.
    pub fn close(&mut self) {
        self.pickle.push(b'u');
    }

    /// Adds a float32 tensor, row-major and alone in its storage.
    pub fn tensor(&mut self, name: &str, shape: &[usize], data: &[f32]) {
        self.text(name);
        self.pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage");
        self.pickle.extend(b"ctorch\nFloatStorage\n");
        let key = self.storages.to_string();
        self.storages += 1;
        self.text(&key);
        self.text("cpu");
        self.number(data.len());
        self.pickle.extend(b"tQ");
        self.number(0);
        let strides = (0..shape.len()).map(|i| shape[i + 1..].iter().product());
        for sizes in [shape.to_vec(), strides.collect()] {
            self.pickle.push(b'(');
            sizes.iter().for_each(|&n| self.number(n));
            self.pickle.push(b't');
        }
        self.pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        self.entry(&format!("data/{key}"));
        for piece in data.chunks(1 << 16) {
            let bytes: Vec<u8> = piece.iter().flat_map(|x| x.to_le_bytes()).collect();
            self.zip.write_all(&bytes).expect("a storage");
        }
    }

    /// Adds all weights.
    pub fn weights(&mut self, weights: &Weights) {
        for (name, w) in weights {
            self.tensor(name, &w.shape, &w.data);
        }
    }

    /// Adds the other contents of training checkpoints: arguments, counters, the state of an optimiser.
    pub fn surroundings(&mut self) {
        self.text("args");
        self.pickle.extend(b"cargparse\nNamespace\n)\x81}");
        self.text("lr");
        self.pickle.extend(b"G\x3f\x1a\x36\xe2\xeb\x1c\x43\x2dsb");
        self.text("epoch");
        self.number(300);
        self.open("optimizer");
        self.open("state");
        self.number(0);
        self.pickle.extend(b"}(");
        self.tensor("exp_avg", &[2], &[f32::NAN, 1.0]);
        self.close();
        self.close();
        self.close();
    }

    /// Ends the file.
    pub fn finish(mut self) {
        self.pickle.extend(b"u.");
        let pickle = std::mem::take(&mut self.pickle);
        for (name, bytes) in [
            ("data.pkl", pickle.as_slice()),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ] {
            self.entry(name);
            self.zip.write_all(bytes).expect("an entry");
        }
        let mut file = self.zip.finish().expect("an archive");
        file.flush().expect("an archive");
    }

    fn entry(&mut self, name: &str) {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .large_file(true);
        self.zip
            .start_file(format!("archive/{name}"), options)
            .expect("an entry");
    }

    fn text(&mut self, text: &str) {
        self.pickle.push(b'X');
        self.pickle.extend((text.len() as u32).to_le_bytes());
        self.pickle.extend(text.as_bytes());
    }

    fn number(&mut self, n: usize) {
        self.pickle.push(b'J');
        self.pickle
            .extend(i32::try_from(n).expect("a small number").to_le_bytes());
    }
}
