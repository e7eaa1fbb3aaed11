//! What `inspect` says of checkpoint files.

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
