//! Files from elsewhere: checkpoints, arrays, images, datasets.

use std::fs;
use std::path::Path;

use retort_checkpoint::Checkpoint;
use retort_checkpoint::parquet::Parquet;
use retort_checkpoint::sharded_weights::ShardPlace;
use retort_checkpoint::trajectories::Manifest;
use retort_engine::data::source::Source;
use retort_engine::data::{DataOptions, Images};
use retort_engine::numpy::{Archive, Stream};
use tempfile::TempDir;

use super::Target;

pub const CHECKPOINT: Target = Target {
    name: "checkpoint",
    exercise: exercise_checkpoint,
    tokens: &[
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch\nBFloat16Storage\n",
        b"X\x07\x00\x00\x00storage",
        b"X\x01\x00\x00\x000",
        b"}q\x00(",
        b"]q\x01(",
        b"h\x00",
        b"h\x01h\x01e",
        b"((",
        b"tR",
        b"\x86\x86",
        b")\x81",
        b"Q",
        b"u.",
        b"\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"K\x00",
        b"PK\x03\x04",
        b"PK\x01\x02",
        b"PK\x05\x06",
        b"PK\x06\x06",
        b"\"dtype\":\"F32\",\"shape\":[",
        b"\"data_offsets\":[0,",
        b"\"__metadata__\":{",
        b"\"a\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[0,8]},",
        b"1,1,1,1,1,1,1,1,1,",
    ],
    mend: Some(|bytes| mend_zip(bytes)),
    examples: Some("tests/golden/checkpoints"),
};

pub const NPY: Target = Target {
    name: "npy",
    exercise: exercise_npy,
    tokens: ARRAY_TOKENS,
    mend: None,
    examples: None,
};

pub const NPZ: Target = Target {
    name: "npz",
    exercise: exercise_npz,
    mend: Some(|bytes| mend_zip(bytes)),
    ..NPY
};

const ARRAY_TOKENS: &[&[u8]] = &[
    b"\x93NUMPY\x01\x00",
    b"\x93NUMPY\x02\x00",
    b"\x93NUMPY\x03\x00",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (",
    b"'<f8'",
    b"'>i2'",
    b"'|b1'",
    b"'|O'",
    b"True",
    b"(0,)",
    b"(18446744073709551615, 2)",
    b"(4294967296, 4294967296)",
    b"()",
    b"PK\x03\x04",
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"mu.npy",
    b"sigma.npy",
];

pub const CSV: Target = Target {
    name: "csv",
    exercise: exercise_csv,
    tokens: &[
        b",",
        b"\n",
        b"\r\n",
        b"\"",
        b"16",
        b"0",
        b";",
        b"#",
        b"\xef\xbb\xbf",
        b"nan",
        b"inf",
        b"1e39",
        b"-1",
        b"65537",
        b",,",
        b"\n\n",
        b"\0",
    ],
    mend: None,
    examples: None,
};

pub const TAR: Target = Target {
    name: "tar",
    exercise: exercise_tar,
    tokens: &[
        b"ustar\x00",
        b"ustar  \0",
        b"0000000",
        b"77777777777",
        b"\x80\0\0\0\0\0\0\0\x7f\xff\xff\xff",
        b"././@LongLink",
        b"30 path=../../x\n",
        b"a.cls",
        b"a.json",
        b"{\"label\": 1}",
        b"../",
        b"/etc/passwd",
    ],
    mend: Some(|bytes| mend_tar(bytes)),
    examples: None,
};

pub const PARQUET: Target = Target {
    name: "parquet",
    exercise: exercise_parquet,
    tokens: &[
        b"PAR1",
        b"PARE",
        b"\x15\x00\x15",
        b"\x15\x04\x15",
        b"\x15\x06\x15",
        b"\x2c\x15",
        b"\x4c\x15",
        b"\x5c\x15",
        b"\x19\x4c",
        b"\x19\xfc\xff\xff\xff\xff\x0f",
        b"\x16\xfe\xff\xff\xff\x0f",
        b"\x15\xfe\xff\xff\xff\x0f",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x18\x05image",
        b"\x18\x05bytes",
        b"\x18\x05label",
        b"huggingface",
        b"{\"info\": {\"features\": {\"label\": {\"names\": [\"a\"]}}}}",
        b"\x28\xb5\x2f\xfd",
        b"\x1f\x8b\x08",
        b"\x02\x00\x00\x00\x03\x01",
    ],
    mend: None,
    examples: Some("tests/golden/parquet"),
};

pub const IMAGE: Target = Target {
    name: "image",
    exercise: exercise_image,
    tokens: &[
        b"IHDR",
        b"IDAT",
        b"IEND",
        b"PLTE",
        b"tRNS",
        b"iCCP",
        b"zTXt",
        b"acTL",
        b"fcTL",
        b"fdAT",
        b"eXIf",
        b"\x00\x00\x4e\x20\x00\x00\x4e\x20",
        b"\x00\x00\x00\x00",
        b"\x7f\xff\xff\xff",
        b"\xff\xd8\xff\xe0",
        b"\xff\xc0\x00\x11\x08",
        b"\xff\xc2",
        b"\xff\xc4",
        b"\xff\xda",
        b"\xff\xdb",
        b"\xff\xd9",
        b"JFIF\0",
        b"RIFF",
        b"WEBPVP8L",
        b"WEBPVP8X",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"MM\0*",
    ],
    mend: Some(|bytes| mend_png(bytes)),
    examples: Some("plugins/engine/fixtures/images/formats"),
};

/// A TIFF's directories, which may be anywhere and in any number, are read first.
pub const TIFF: Target = Target {
    name: "tiff",
    exercise: exercise_image,
    tokens: &[
        b"II*\0\x08\0\0\0",
        b"MM\0*\0\0\0\x08",
        b"II+\0\x08\0\0\0",
        // Entries: width, height, bits, compression, meaning, strips, rows of each, tiles.
        b"\x00\x01\x03\0\x01\0\0\0",
        b"\x01\x01\x03\0\x01\0\0\0",
        b"\x02\x01\x03\0\x03\0\0\0",
        b"\x03\x01\x03\0\x01\0\0\0\x05\0\0\0",
        b"\x03\x01\x03\0\x01\0\0\0\x08\0\0\0",
        b"\x06\x01\x03\0\x01\0\0\0\x02\0\0\0",
        b"\x11\x01\x04\0\xff\xff\xff\x7f",
        b"\x15\x01\x03\0\x01\0\0\0",
        b"\x16\x01\x03\0\x01\0\0\0\x01\0\0\0",
        b"\x17\x01\x04\0\x01\0\0\0",
        b"\x3d\x01\x03\0\x01\0\0\0\x02\0\0\0",
        b"\x42\x01\x04\0\x01\0\0\0\x10\0\0\0",
        b"\x53\x01\x03\0\x01\0\0\0\x03\0\0\0",
        b"\xff\xff\xff\xff",
        b"\x08\0\0\0",
        b"\0\0\0\0",
    ],
    mend: None,
    examples: None,
};

pub const TRAJECTORIES: Target = Target {
    name: "trajectories",
    exercise: exercise_trajectories,
    tokens: &[
        b"\"format\":",
        b"\"seed\":",
        b"\"count\":",
        b"\"steps\":[",
        b"\"vocabulary\":",
        b"\"dim\":",
        b"\"classes\":",
        b"\"captions\":{",
        b"\"distribution\":{",
        b"\"solver_steps\":",
        b"\"teacher\":\"",
        b"\"shards\":[",
        b"\"file\":\"../x\"",
        b"\"start\":",
        b"\"end\":",
        b"\"hash\":null",
        b"null",
        b"[",
        b"{",
        b"}",
        b"]",
        b"\\u0000",
    ],
    mend: None,
    examples: None,
};

pub const TABLE: Target = Target {
    name: "table",
    exercise: exercise_table,
    tokens: &[
        b"file_name",
        b"label",
        b"caption",
        b"text",
        b"0/a.png",
        b"1/a.png",
        b"../a.png",
        b"/dev/zero",
        b"{\"file_name\": \"0/a.png\", \"label\": 1}\n",
        b"\"label\": -1",
        b"\"label\": 1e300",
        b"\\u0000",
        b"\xef\xbb\xbf",
        b",",
        b"\"",
        b"\r\n",
        b"\n",
        b"[[[[",
        b"{",
        b"}",
    ],
    mend: None,
    examples: None,
};

pub const INDEX: Target = Target {
    name: "index",
    exercise: exercise_index,
    tokens: &[
        b"{\"weight_map\": {",
        b"\"metadata\": {\"total_size\": 8},",
        b"\"a\": \"part-00001-of-00002.safetensors\",",
        b"\"a\": \"../part.safetensors\"",
        b"\"a\": \"/dev/zero\"",
        b"\"a\": 1",
        b"\\u0000",
        b"null",
        b"[",
        b"{",
        b"}",
    ],
    mend: None,
    examples: None,
};

/// Opens the bytes and reads every tensor.
fn exercise_checkpoint(bytes: &[u8]) -> String {
    let checkpoint = match Checkpoint::from_bytes(bytes.to_vec()) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return error.to_string(),
    };
    let mut outcome = format!(
        "{:?} {}",
        checkpoint.container(),
        checkpoint.strangers().len()
    );
    let selected = checkpoint.select(None).map(|d| d.path.clone());
    outcome.push_str(&selected.unwrap_or_else(|error| error.to_string()));
    let mut left: u64 = 64 << 20;
    for dictionary in checkpoint.dictionaries() {
        for (name, tensor) in dictionary.tensors() {
            assert_eq!(dictionary.get(name).map(|t| &t.shape), Some(&tensor.shape));
            // A file may name one storage thousands of times, so the number is limited.
            if tensor.bytes() > left {
                continue;
            }
            left -= tensor.bytes();
            match checkpoint.raw(tensor) {
                Ok(raw) => assert_eq!(raw.len() as u64, tensor.bytes()),
                Err(error) => outcome.push_str(&error.to_string()),
            }
            if let Ok(floats) = checkpoint.floats(tensor) {
                assert_eq!(floats.len() as u64, tensor.elements());
            }
            if let Ok(indices) = checkpoint.indices(tensor) {
                assert_eq!(indices.len() as u64, tensor.elements());
            }
        }
    }
    outcome
}

/// As images, and as an array to read.
fn exercise_npy(bytes: &[u8]) -> String {
    with_file("a.npy", bytes, |path| {
        let images = DataOptions {
            arrays: Some("a.npy".into()),
            ..DataOptions::default()
        };
        let outcome = load(&images, path);
        match Stream::open(path) {
            Ok(mut stream) => {
                let count = stream.shape().iter().product::<usize>().min(1 << 16);
                match stream.read(count) {
                    Ok(read) => assert_eq!(read.len(), count),
                    Err(error) => return outcome + &error,
                }
                outcome
            }
            Err(error) => outcome + &error.to_string(),
        }
    })
}

/// As images, and as the statistics of images.
fn exercise_npz(bytes: &[u8]) -> String {
    with_file("a.npz", bytes, |path| {
        let images = DataOptions {
            arrays: Some("a.npz".into()),
            ..DataOptions::default()
        };
        let mut outcome = load(&images, path);
        let archive = match Archive::open(path) {
            Ok(archive) => archive,
            Err(error) => return outcome + &error.to_string(),
        };
        for (name, shape) in [("mu", &[3][..]), ("sigma", &[3, 3])] {
            match archive.array(name, shape) {
                Ok(Some(array)) => assert_eq!(array.len(), shape.iter().product::<usize>()),
                Ok(None) => outcome.push('-'),
                Err(error) => outcome.push_str(&error.to_string()),
            }
        }
        outcome
    })
}

fn exercise_csv(bytes: &[u8]) -> String {
    load_from("a.csv", bytes, |file| DataOptions {
        csv: Some(file),
        header: bytes.first() == Some(&b'#'),
        ..DataOptions::default()
    })
}

fn exercise_tar(bytes: &[u8]) -> String {
    load_from("a.tar", bytes, |file| DataOptions {
        tar: Some(file),
        ..DataOptions::default()
    })
}

/// As images, and every column of it.
fn exercise_parquet(bytes: &[u8]) -> String {
    let outcome = load_from("a.parquet", bytes, |file| DataOptions {
        parquet: Some(file),
        skip_damaged: true,
        ..DataOptions::default()
    });
    let file = match Parquet::in_memory(bytes) {
        Ok(file) => file,
        Err(error) => return outcome + &error.to_string(),
    };
    let mut told = outcome;
    for column in 0..file.columns.len().min(16) {
        match cells(&file, column) {
            Ok(count) => assert_eq!(count, file.rows),
            Err(error) => told.push_str(&error.to_string()),
        }
    }
    told
}

/// The most cells of a column in a small file.
fn cells(file: &Parquet, column: usize) -> retort_checkpoint::Result<u64> {
    let (mut pages, mut count) = (file.pages(column), 0);
    while let Some(page) = pages.next()? {
        for cell in page.cells()?.take(1 << 20) {
            cell?;
            count += 1;
        }
        if count >= 1 << 20 {
            return Ok(file.rows);
        }
    }
    Ok(count)
}

fn load_from(name: &str, bytes: &[u8], options: impl FnOnce(String) -> DataOptions) -> String {
    with_file(name, bytes, |path| load(&options(name.into()), path))
}

/// Another image in a folder with two valid ones; the content determines the format.
fn exercise_image(bytes: &[u8]) -> String {
    with_file("images/0/b.png", bytes, |path| {
        let base = path.ancestors().nth(3).expect("the folder");
        let options = DataOptions {
            folder: Some("images".into()),
            ..DataOptions::default()
        };
        let outcome = load(&options, &base.join("images"));
        fs::remove_file(path).expect("a file");
        outcome
    })
}

/// A table of the two good images, in the format that its first byte says.
fn exercise_table(bytes: &[u8]) -> String {
    let name = match bytes.first() {
        Some(b'{') => "a.jsonl",
        _ => "a.csv",
    };
    load_from(name, bytes, |file| DataOptions {
        folder: Some("images".into()),
        table: Some(file),
        skip_damaged: true,
        ..DataOptions::default()
    })
}

/// An index of weights in several files, which are not there.
fn exercise_index(bytes: &[u8]) -> String {
    with_file(
        "a.safetensors.index.json",
        bytes,
        |path| match ShardPlace::find(path) {
            Ok(place) => place.files().len().to_string(),
            Err(error) => error.to_string(),
        },
    )
}

fn load(options: &DataOptions, beside: &Path) -> String {
    let source = match Source::open(
        options,
        beside.parent().expect("the folder"),
        &mut |_, _| true,
    ) {
        Ok(source) => source,
        Err(error) => return error.to_string(),
    };
    let told: Vec<&String> = source.notices.iter().map(|(_, notice)| notice).collect();
    let told = format!("{} {told:?}", source.summary());
    match Images::read(source, &mut |_| true) {
        Ok((images, damaged)) => {
            assert!(
                images
                    .labels
                    .iter()
                    .all(|&label| (label as usize) < images.classes)
            );
            let (channels, height, width) = (images.channels, images.height, images.width);
            format!("{told} {channels}x{height}x{width} {}", damaged.len())
        }
        Err(error) => error.to_string(),
    }
}

fn exercise_trajectories(bytes: &[u8]) -> String {
    with_file("manifest.json", bytes, |path| {
        let dir = path.parent().expect("the folder");
        let manifest = match Manifest::read(dir) {
            Ok(manifest) => manifest,
            Err(fault) => return fault.to_string(),
        };
        let mut outcome = format!(
            "{} {} {:?}",
            manifest.ranges().len(),
            manifest.gaps().len(),
            manifest.tokens().checked_ilog2()
        );
        for shard in manifest.shards.iter().take(4) {
            match manifest.open_shard(&dir.join(&shard.file), shard) {
                Ok(opened) => outcome.push_str(&opened.noise.to_string()),
                Err(fault) => outcome.push_str(&fault.to_string()),
            }
        }
        outcome
    })
}

/// Writes the bytes to a file in this thread's folder, in memory if the system has such a file system.
fn with_file(name: &str, bytes: &[u8], read: impl FnOnce(&Path) -> String) -> String {
    thread_local! {
        static FOLDER: TempDir = {
            let folder = super::folder();
            for class in ["0", "1"] {
                let class = folder.path().join("images").join(class);
                fs::create_dir_all(&class).expect("a folder");
                fs::write(class.join("a.png"), GREY).expect("a file");
            }
            folder
        };
    }
    FOLDER.with(|folder| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).expect("a file");
        read(&path)
    })
}

/// A grey image of 2 x 2 pixels.
const GREY: &[u8] = include_bytes!("../../corpus/image/grey.png");

/// Sets the checksums of the headers, mostly those at multiples of a block.
fn mend_tar(bytes: &mut [u8]) {
    for block in bytes.chunks_exact_mut(512) {
        if &block[257..262] == b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

/// Sets the checksums of all chunks.
fn mend_png(bytes: &mut [u8]) {
    let mut at = 8;
    while let Some(length) = bytes.get(at..at + 4) {
        let length = u32::from_be_bytes(length.try_into().expect("four bytes")) as usize;
        let end = (at + 8).saturating_add(length);
        let Some(chunk) = bytes.get(at + 4..end) else {
            return;
        };
        let sum = crc32(chunk).to_be_bytes();
        let Some(place) = bytes.get_mut(end..end + 4) else {
            return;
        };
        place.copy_from_slice(&sum);
        at = end + 4;
    }
}

/// Sets the checksums of an archive's unpacked entries, up to a limit.
fn mend_zip(bytes: &mut [u8]) {
    const MOST: usize = 16;
    let number = |bytes: &[u8]| {
        let digits = bytes.iter().rev();
        digits.fold(0, |sum: usize, &byte| sum << 8 | usize::from(byte))
    };
    let starts = bytes.windows(4).enumerate();
    let entries = starts.filter(|(_, start)| start == b"PK\x01\x02");
    let places: Vec<usize> = entries.map(|(at, _)| at).take(MOST).collect();
    for at in places {
        let sum = || {
            let entry = bytes.get(at..at + 46)?;
            let (size, header) = (number(&entry[24..28]), number(&entry[42..46]));
            let local = bytes.get(header..header + 30)?;
            let start = header + 30 + number(&local[26..28]) + number(&local[28..30]);
            let is_packed = number(&entry[10..12]) != 0;
            let content = bytes.get(start..start + size)?;
            (!is_packed).then(|| crc32(content))
        };
        if let Some(sum) = sum() {
            bytes[at + 16..at + 20].copy_from_slice(&sum.to_le_bytes());
        }
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut sum = u32::MAX;
    for &byte in bytes {
        sum ^= u32::from(byte);
        for _ in 0..8 {
            sum = (sum >> 1) ^ (0xedb8_8320 & (sum & 1).wrapping_neg());
        }
    }
    !sum
}
