//! Files written by torch, ordinary and hostile: each gives its tensors, bit for bit, or its refusal.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use retort_checkpoint::{Checkpoint, Container};
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/checkpoints")
}

fn cases() -> BTreeMap<String, Value> {
    let text = std::fs::read_to_string(folder().join("cases.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn ordinary_files_give_their_tensors() {
    let expected = Checkpoint::open(&folder().join("expected.safetensors")).unwrap();
    let all = expected.select(None).unwrap();
    let mut compared = 0;
    for (file, case) in cases() {
        let Some(path) = case["select"].as_str() else {
            continue;
        };
        let checkpoint = Checkpoint::open(&folder().join(&file)).unwrap();
        let dictionary = checkpoint.select(Some(path)).unwrap();
        let mut found: Vec<&str> = dictionary.tensors().map(|(name, _)| name).collect();
        found.sort_unstable();
        assert_eq!(Value::from(found.clone()), case["tensors"], "{file}");
        for name in found {
            let tensor = dictionary.get(name).unwrap();
            let wanted = all.get(&format!("{file}:{name}")).unwrap();
            assert_eq!(
                (&tensor.shape, tensor.dtype),
                (&wanted.shape, wanted.dtype),
                "{file}: {name}"
            );
            let bytes = checkpoint.raw(tensor).unwrap();
            assert_eq!(bytes, expected.raw(wanted).unwrap(), "{file}: {name}");
            compared += 1;
        }
    }
    assert_eq!(compared, all.tensors().len());
}

#[test]
fn hostile_files_are_refused() {
    let refused = cases()
        .into_iter()
        .filter(|(_, case)| case["refuse"] == true);
    let mut messages = Vec::new();
    for (file, _) in refused {
        let error = Checkpoint::open(&folder().join(&file))
            .map(drop)
            .unwrap_err();
        messages.push(format!("{file}: {error}"));
    }
    assert_eq!(messages.len(), 7, "{messages:#?}");
    let text = messages.join("\n");
    for expected in [
        "hostile_empty.pth: the file is empty",
        "hostile_huge_length.pth: the pickle is cut off: 2147483647 bytes expected",
        "hostile_memo_bomb.pth: no tensors",
        "hostile_reduce.pth: no tensors in this file; loading it in Python would call posix.system",
        "hostile_reduce_raw.pth: a pickle, but not written by torch.save",
        "hostile_truncated_pickle.pth: the pickle is cut off",
        "hostile_truncated_zip.pth: the zip archive",
    ] {
        assert!(text.contains(expected), "{expected} is missing in\n{text}");
    }
}

#[test]
fn the_only_dictionary_is_selected_and_several_are_listed() {
    let open = |file: &str| Checkpoint::open(&folder().join(file)).unwrap();
    assert_eq!(open("model_key.pt").select(None).unwrap().path, "model");
    assert_eq!(open("flat.pth").select(None).unwrap().path, "");
    let nested = open("nested_ema.pth");
    let check = |path: Option<&str>, expected: &str| {
        assert_eq!(nested.select(path).unwrap_err().to_string(), expected);
    };
    check(
        None,
        "several dictionaries of tensors, select one: `trainer.ema_parameters` (5 tensors), \
         `trainer.var_wo_ddp` (5 tensors)",
    );
    check(
        Some("ema"),
        "no tensors under `ema`; there are `trainer.ema_parameters` (5 tensors), `trainer.var_wo_ddp` (5 tensors)",
    );
}

#[test]
fn floats_and_indices_are_converted() {
    let flat = Checkpoint::open(&folder().join("flat.pth")).unwrap();
    let dictionary = flat.select(None).unwrap();
    let get = |name: &str| dictionary.get(name).unwrap();
    for name in ["a", "b", "c", "e"] {
        let floats = flat.floats(get(name)).unwrap();
        assert_eq!(floats.len() as u64, get(name).elements());
        assert!(
            floats.iter().all(|x| x.is_finite() && x.abs() < 10.0),
            "{floats:?}"
        );
        assert!(flat.indices(get(name)).is_err());
    }
    assert_eq!(flat.indices(get("d")).unwrap(), [0, 1, 2, 3, 4, 5, 6]);
    assert!(flat.floats(get("d")).is_err());
    assert_eq!(flat.container(), Container::TorchZip);
}

/// The bytes of a small archive with every `from` replaced, without checksums, as torch can write it.
fn altered(file: &str, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = std::fs::read(folder().join(file)).unwrap();
    let mut found = false;
    for i in 0..bytes.len() - from.len() {
        if bytes[i..].starts_with(from) {
            bytes[i..i + to.len()].copy_from_slice(to);
            found = true;
        }
    }
    assert!(found);
    for i in 0..bytes.len() - 20 {
        if bytes[i..].starts_with(b"PK\x01\x02") {
            bytes[i + 16..i + 20].fill(0);
        }
    }
    bytes
}

#[test]
fn what_is_unusual_is_refused_or_passed_over() {
    let open = |bytes| Checkpoint::from_bytes(bytes);
    let error = |bytes| open(bytes).map(drop).unwrap_err().to_string();
    // "little" is the content of the entry `byteorder`.
    let big = error(altered("flat.pth", b"little", b"bigbig"));
    assert!(big.contains("only little-endian"), "{big}");
    let legacy = error(altered(
        "legacy_format.pth",
        b"endianq\x02\x88",
        b"endianq\x02\x89",
    ));
    assert!(legacy.contains("only little-endian"), "{legacy}");
    let missing = error(altered("flat.pth", b"flat/data/3", b"flat/date/3"));
    assert!(missing.contains("storage 3 is missing"), "{missing}");
    // An unknown storage type hides its own tensors and no others.
    let strange = open(altered("flat.pth", b"LongStorage", b"LungStorage")).unwrap();
    assert_eq!(strange.select(None).unwrap().tensors().len(), 4);
    let weights = open(altered("nested_ema.pth", b"var_wo_ddp", b"optimizers")).unwrap();
    assert_eq!(weights.select(None).unwrap().path, "trainer.ema_parameters");
}
