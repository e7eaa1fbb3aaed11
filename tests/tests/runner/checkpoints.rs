//! `inspect` on checkpoint files.

use std::path::PathBuf;

use crate::lab::Lab;

fn golden(file: &str) -> String {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/checkpoints");
    folder.join(file).display().to_string()
}

#[test]
fn tensors_are_listed_for_people_and_for_programs() {
    let lab = Lab::new(&[]);
    let said = lab.retort(&["inspect", &golden("model_key.pt")]).expect(0);
    said.saying(&["model_key.pt: torch zip, "]);
    let said = lab
        .retort(&["inspect", &golden("model_key.pt"), "--json"])
        .expect(0);
    let document = said.json();
    assert_eq!(document["container"], "torch zip");
    assert_eq!(document["dictionaries"][0]["dictionary"], "model");
    let row = &document["tensors"][1];
    assert_eq!(
        (&row["name"], &row["shape"][0], &row["dtype"], &row["bytes"]),
        (&"b".into(), &5.into(), &"bf16".into(), &10.into())
    );
    let said = lab.retort(&[
        "inspect",
        &golden("expected.safetensors"),
        "--format",
        "csv",
    ]);
    assert!(said.expect(0).stdout.contains("flat.pth:a,"));
}

#[test]
fn one_of_several_dictionaries_is_selected() {
    let lab = Lab::new(&[]);
    let file = golden("nested_ema.pth");
    let said = lab
        .retort(&["inspect", &file])
        .expect(0)
        .saying(&["--select PATH"]);
    for path in ["`trainer.ema_parameters`", "`trainer.var_wo_ddp`"] {
        assert!(said.stdout.contains(path), "{}", said.stdout);
    }
    assert!(!said.stdout.contains("Tensors of"), "{}", said.stdout);
    let said = lab
        .retort(&["inspect", &file, "--select", "trainer.ema_parameters"])
        .expect(0);
    assert!(said.stdout.contains("Tensors of `trainer.ema_parameters`"));
    assert!(said.stdout.contains("(3, 4)"), "{}", said.stdout);
    lab.retort(&["inspect", &file, "--select", "ema"])
        .expect(4)
        .saying(&["no tensors under `ema`; there are `trainer.ema_parameters`"]);
}

#[test]
fn hostile_files_are_refused_and_nothing_in_them_runs() {
    let lab = Lab::new(&[]);
    for file in [
        "hostile_reduce.pth",
        "hostile_reduce_raw.pth",
        "hostile_memo_bomb.pth",
        "absent.pth",
    ] {
        lab.retort(&["inspect", &golden(file)])
            .expect(4)
            .saying(&[file]);
    }
    assert!(!lab.dir.path().join("EXECUTED").exists());
}

/// `inspect` with little memory, expected to end with a code.
#[track_caller]
fn inspect(lab: &Lab, file: &str, code: i32, expected: &str) {
    use std::os::unix::process::CommandExt;
    const MEMORY: u64 = 1 << 30;
    let mut command = lab.command(&["inspect", file]);
    // SAFETY: between fork and exec only an async-signal-safe function is called.
    unsafe {
        command.pre_exec(|| {
            let limit = libc::rlimit {
                rlim_cur: MEMORY,
                rlim_max: MEMORY,
            };
            libc::setrlimit(libc::RLIMIT_AS, &limit);
            Ok(())
        });
    }
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{file}: {said}");
    assert!(said.contains(expected), "{file}: {said}");
}

#[test]
fn what_a_file_claims_costs_nothing() {
    let lab = Lab::new(&[]);
    let write = |file: &str, parts: &[&[u8]]| {
        std::fs::write(lab.dir.path().join(file), parts.concat()).unwrap();
    };
    let header = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let empty = r#":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#;
    let many = |n: usize| {
        let entries: Vec<String> = (0..n).map(|i| format!("\"{i}\"{empty}")).collect();
        header(&format!("{{{}}}", entries.join(",")))
    };
    write("million.safetensors", &[&many(1_000_000)]);
    inspect(&lab, "million.safetensors", 4, "bytes of header: more than");
    write("many.safetensors", &[&many(200_000)]);
    inspect(&lab, "many.safetensors", 4, "more than 100000 tensors");
    let ones = format!(
        r#"{{"a":{{"dtype":"F32","shape":[{}0],"data_offsets":[0,0]}}}}"#,
        "1,".repeat(7 << 20)
    );
    write("ones.safetensors", &[&header(&ones)]);
    inspect(&lab, "ones.safetensors", 4, "more than 16 dimensions");
    // An archive with a correct end record, and one with a wrong one.
    let mut entry = b"PK\x01\x02".to_vec();
    entry.resize(46, 0);
    for (count, told) in [(3_000_000usize, 0xfffeu16), (200_000, 2)] {
        let directory = entry.repeat(count);
        let mut end = b"PK\x05\x06\0\0\0\0".to_vec();
        end.extend(told.to_le_bytes());
        end.extend(told.to_le_bytes());
        end.extend((directory.len() as u32).to_le_bytes());
        end.extend([0; 6]);
        write("many.pt", &[&directory, &end]);
        inspect(&lab, "many.pt", 4, "archive");
    }
    inspect(&lab, "/dev/zero", 4, "a device, not a regular file");
    std::fs::create_dir(lab.dir.path().join("empty")).unwrap();
    inspect(&lab, "empty", 4, "a folder without weights");
    inspect(&lab, ".", 4, "name one of them");
}
