//! Pictures in the terminal, images without a recipe, and the history read from Python.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::lab::{Lab, binary};
use crate::terminal::terminal;
use crate::training;

const PAINTS: [&str; 3] = [
    "base: {kind: do, text: base}",
    "one-step: {kind: do, act: paint, text: four columns, input: base}",
    "two-step: {kind: do, act: paint, text: the same, input: one-step}",
];

/// A terminal's content after a command.
fn on_screen(lab: &Lab, arguments: &[&str]) -> String {
    on_answering_screen(lab, arguments, "").0
}

/// The longest wait for an answer of the terminal.
const ANSWER: Duration = Duration::from_secs(1);

/// The same with a terminal that answers queries about its capabilities; and the longest time that this may have taken.
fn on_answering_screen(lab: &Lab, arguments: &[&str], answer: &str) -> (String, Duration) {
    let (screen, inside) = terminal();
    let size = libc::winsize {
        ws_row: 24,
        ws_col: 80,
        ws_xpixel: 800,
        ws_ypixel: 480,
    };
    // SAFETY: a terminal of our own, and a structure that the call only reads.
    unsafe { libc::ioctl(screen.as_raw_fd(), libc::TIOCSWINSZ, &size) };
    let mut command = lab.command(arguments);
    if !answer.is_empty() {
        command.stdin(Stdio::from(inside.try_clone().unwrap()));
        // SAFETY: between fork and exec only async-signal-safe functions are called.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
    }
    command
        .stdout(Stdio::from(inside))
        .stderr(Stdio::null())
        .env("TERM", "xterm-256color")
        .env("COLORTERM", "truecolor");
    for other in [
        "KITTY_WINDOW_ID",
        "LC_TERMINAL",
        "STY",
        "TERM_PROGRAM",
        "TMUX",
    ] {
        command.env_remove(other);
    }
    let mut unasked = Instant::now();
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut screen = std::fs::File::from(screen);
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    let mut answer = answer.as_bytes();
    let mut took = Duration::ZERO;
    loop {
        let looked = Instant::now();
        // The terminal ends with an error once its other side is closed.
        let Ok(count @ 1..) = screen.read(&mut buffer) else {
            break;
        };
        bytes.extend_from_slice(&buffer[..count]);
        if bytes.ends_with(b"\x1b[c") {
            screen.write_all(std::mem::take(&mut answer)).unwrap();
            took = unasked.elapsed();
        }
        unasked = looked;
    }
    assert!(child.wait().unwrap().success());
    (String::from_utf8_lossy(&bytes).into_owned(), took)
}

#[test]
fn a_terminal_is_asked_what_it_draws() {
    let lab = Lab::new(&PAINTS);
    lab.run(&[]).expect(0);
    let what = ["show", "latest/one-step"];
    for (answer, drawn) in [
        ("\x1b_Gi=1;OK\x1b\\\x1b[?62;4;22c", "\x1b_Ga=T,f=100,q=2,m="),
        ("\x1b[?62;4;22c", "\x1bP9;1;0q\"1;1;"),
        ("\x1b[?62;22c", "▀"),
        // Without an answer, half blocks are drawn after a second.
        ("\0", "▀"),
    ] {
        // An answer that may have come too late, on a busy machine, proves nothing.
        let mut answered = (0..20).map(|_| on_answering_screen(&lab, &what, answer));
        let in_time = answered.find(|(_, took)| *took < ANSWER);
        let (said, _) = in_time.expect("an answer in time");
        assert!(said.contains(drawn), "{answer:?}: {said:?}");
        assert!(!said.contains("62;"), "the answer is not shown: {said:?}");
    }
    // No query if stdin is not a terminal, or if the format is given.
    for how in [
        &[] as &[_],
        &["--as", "kitty"],
        &["--as", "iterm"],
        &["--as", "sixel"],
    ] {
        let said = on_screen(&lab, &[&what, how].concat());
        assert!(!said.contains("\x1b[c"), "{said:?}");
    }
}

#[test]
fn a_picture_is_drawn_in_the_terminal() {
    let lab = Lab::new(&PAINTS);
    lab.run(&[]).expect(0);
    let drawn = on_screen(&lab, &["show", "latest/one-step", "--as", "blocks"]);
    assert!(
        drawn.contains("one-step of run") && drawn.contains("(four columns)"),
        "{drawn}"
    );
    assert!(drawn.contains('▄') || drawn.contains('▀'), "{drawn:?}");
    // Red and blue.
    assert!(
        drawn.contains("255;0;0") && drawn.contains("0;0;255"),
        "{drawn:?}"
    );
    let all = on_screen(&lab, &["show", "--as", "blocks"]);
    assert!(all.contains("one-step of run") && all.contains("two-step of run"));
}

#[test]
fn without_a_terminal_its_path_is_printed_or_it_is_saved() {
    let lab = Lab::new(&PAINTS);
    lab.run(&[]).expect(0);
    let said = lab.retort(&["show", "latest/one-step"]).expect(0);
    let path = said.stdout.trim().to_owned();
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes.starts_with(b"\x89PNG"));
    let hash = path.rsplit('/').nth(1).unwrap();
    let said = said.saying(&["not a terminal"]);
    // A given format is obeyed: for a pager, or a file that is shown later.
    for (how, sign) in [
        ("blocks", "\u{2580}"),
        ("kitty", "\x1b_G"),
        ("sixel", "\x1bP"),
    ] {
        let drawn = lab
            .retort(&["show", "latest/one-step", "--as", how])
            .expect(0);
        assert!(
            drawn.stdout.contains(sign) && drawn.stderr.is_empty(),
            "{how}: {}",
            drawn.stdout
        );
    }
    let paths = lab.retort(&["show", "latest/one-step", "--as", "paths"]);
    assert_eq!(paths.expect(0).stdout, said.stdout);
    assert_eq!(
        lab.retort(&["show", &hash[..12]]).expect(0).stdout,
        said.stdout
    );
    lab.retort(&["show", &hash[..12], "--save", "copy.png"])
        .expect(0);
    assert_eq!(
        std::fs::read(lab.dir.path().join("copy.png")).unwrap(),
        bytes
    );
    lab.retort(&["show", "latest", "--save", "copy.png"])
        .expect(2)
        .saying(&["has 2 pictures", "one-step, two-step"]);
    lab.retort(&["show", "latest/base"])
        .expect(4)
        .saying(&["has no picture"]);
    lab.retort(&["show", "latest/nothing"]).expect(4);
    lab.retort(&["show", "0000"]).expect(4);
    // A link out of the artifact is not followed.
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
    lab.retort(&["show", "latest/one-step", "--save", "x.png"])
        .expect(1)
        .saying(&["symbolic link", "artifacts verify"]);
}

#[test]
fn a_student_is_sampled_without_a_recipe() {
    let lab = training::lab(training::STUDENT);
    let short = [
        "--set",
        "pairs.count=500",
        "--set",
        "student.train.steps=20",
    ];
    lab.run(&short).expect(0);
    let hash = training::output(&lab, "student").0;
    // Without the recipe.
    std::fs::remove_file(lab.dir.path().join("r.yaml")).unwrap();
    lab.retort(&[
        "sample",
        "latest/student",
        "-n",
        "5",
        "--labels",
        "3,1",
        "-o",
        "out",
    ])
    .expect(0)
    .saying(&["6 pictures in out"]);
    let out = |name: &str| lab.dir.path().join("out").join(name);
    assert!(out("grid.png").is_file() && out("000000-3.png").is_file());
    assert!(out("000001-1.png").is_file() && out("000004-3.png").is_file());
    let detail = lab.latest().unwrap();
    assert_eq!(detail.summary.recipe, "sample");
    // Made from the student, according to the lineage.
    assert_eq!(detail.artifacts[0].made_from, std::slice::from_ref(&hash));
    // The same set is reused; another seed makes another set; two passes are those that it was trained for.
    let again = [
        "sample",
        &hash[..12],
        "-n",
        "5",
        "--labels",
        "3,1",
        "--json",
    ];
    assert_eq!(
        lab.retort(&again).expect(0).json()["stages"][0]["outcome"],
        "reused"
    );
    let other = ["--seed", "4", "--steps", "2"];
    let run = lab
        .retort(&[again.as_slice(), &other].concat())
        .expect(0)
        .json();
    assert_eq!(run["stages"][0]["outcome"], "ran");
    let detail = lab.latest().unwrap();
    assert_eq!(
        detail.stages[0].options["sampler"]["timesteps"],
        serde_json::json!([0, 6])
    );
    lab.retort(&["sample", &hash, "-n", "2", "--set", "images.latents=true"])
        .expect(0);
    // A teacher too, with its guidance.
    let run = detail.summary.id;
    lab.retort(&["runs", "show", &run.0]).expect(0);
    let teacher = lab
        .retort(&["artifacts", "list", "--kind", "teacher", "--json"])
        .json()[0]["hash"]
        .as_str()
        .unwrap()
        .to_owned();
    lab.retort(&["sample", &teacher, "-n", "2", "--guidance", "1.5"])
        .expect(0);
    check_refused_samples(&lab, &hash);
}

/// `hash` is that of a student.
fn check_refused_samples(lab: &Lab, hash: &str) {
    for (arguments, code, said) in [
        (vec!["sample", "nobody"], 4, "no artifact matches"),
        (vec!["sample", "latest/images"], 4, "student or teacher"),
        (
            vec!["sample", hash, "--steps", "3"],
            2,
            "trained from the AR steps [0,6]",
        ),
        (vec!["sample", hash, "--guidance", "2"], 2, "for teachers"),
        (
            vec!["sample", hash, "--labels", "3,x"],
            100,
            "x: the classes of this model have no names",
        ),
        (
            vec!["sample", hash, "--labels", "-1"],
            2,
            "-1 is not a class number",
        ),
        (
            vec!["sample", hash, "--labels", "3,,1"],
            2,
            "a class is empty",
        ),
        (
            vec!["sample", "./student.pth"],
            4,
            "there is no file or folder ./student.pth",
        ),
        (vec!["sample", hash, "-n", "0"], 2, "0"),
        (
            vec!["sample", hash, "--set", "images.cuont=3"],
            3,
            "did you mean `count`?",
        ),
        (
            vec!["sample", hash, "-o", "out"],
            2,
            "is not an empty directory",
        ),
        (vec!["sample", "out/grid.png"], 2, "--family"),
    ] {
        lab.retort(&arguments).expect(code).saying(&[said]);
    }
    // A stage loads a published file, and reports its problems.
    let file = "out/grid.png";
    let wrong = [
        "sample",
        file,
        "--family",
        "var",
        "--tokenizer",
        file,
        "--backend",
        "candle",
    ];
    let wrong = lab.retort(&wrong);
    assert!(matches!(wrong.code, Some(3 | 100)), "{:?}", wrong.code);
    wrong.saying(&["grid.png"]);
}

#[test]
fn a_recipe_takes_an_artifact_by_its_hash() {
    let lab = Lab::new(&["a: {kind: do, text: hello}"]);
    lab.run(&[]).expect(0);
    let hash = training::output(&lab, "a").0;
    let recipe = |hash: &str, kind: &str, name: &str| {
        let text = format!(
            "version: 1\nbackend: faulty\nartifacts:\n  {name}: {{hash: {hash}, kind: {kind}}}\nstages:\n  \
             b: {{kind: do, act: copy, input: given}}\n"
        );
        std::fs::write(lab.dir.path().join("r.yaml"), text).unwrap();
    };
    recipe(&hash, "thing", "given");
    lab.retort(&["plan", "r.yaml"]).expect(0);
    lab.run(&[]).expect(0);
    assert_eq!(training::output(&lab, "b").0, hash);
    lab.retort(&["resume"]).expect(0);
    assert_eq!(lab.outcomes(&[]), ["b reused"]);
    recipe(&hash, "student", "given");
    lab.run(&[])
        .expect(3)
        .saying(&["wants `thing`, but the artifact `given` is a `student`"]);
    recipe(&hash, "thing", "b");
    lab.run(&[]).expect(3).saying(&["`b` is a stage too"]);
    recipe(&"0".repeat(64), "thing", "given");
    lab.run(&[]).expect(4).saying(&["is not in the store"]);
    recipe("zzz", "thing", "given");
    lab.run(&[]).expect(3);

    // A known artifact with missing files.
    recipe(&hash, "thing", "given");
    let dir = lab.store_dir().join("artifacts").join(&hash);
    let mut files = std::fs::read_dir(&dir).unwrap();
    std::fs::remove_file(files.next().unwrap().unwrap().path()).unwrap();
    let said = lab.run(&[]).expect(1);
    said.saying(&["is damaged", "`retort artifacts verify` names the files"]);
    std::fs::remove_dir_all(dir).unwrap();
    lab.run(&[]).expect(4).saying(&["is not in the store"]);
}

#[test]
fn python_reads_the_history_as_the_page_says() {
    if Command::new("python3").arg("--version").output().is_err() {
        eprintln!("SKIPPED: there is no python3");
        return;
    }
    let lab = Lab::new(&[
        "a: {kind: do, text: hello}",
        "b: {kind: do, act: flood, amount: 800, input: a}",
    ]);
    lab.run(&[]).expect(0);
    std::os::unix::fs::symlink(lab.store_dir(), lab.dir.path().join(".retort")).unwrap();
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/python.md");
    let page = std::fs::read_to_string(page).unwrap();
    let mut program: String = page
        .split("```python\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect();
    program.push_str("\nprint(params['stages.b.amount'], len(curve('latest', 'b/loss')))\n");
    let bin = binary();
    let path = format!(
        "{}:{}",
        bin.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let output = Command::new("python3")
        .arg("-c")
        .arg(program)
        .current_dir(lab.dir.path())
        .env("PATH", path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(said.contains("'state': 'succeeded'"), "{said}");
    assert!(said.contains("a thing .retort/artifacts/"), "{said}");
    assert!(said.trim_end().ends_with("800.0 100"), "{said}");
}

#[test]
fn a_picture_whose_palette_has_no_whole_colours_is_refused() {
    let lab = Lab::new(&PAINTS);
    lab.run(&[]).expect(0);
    let dir = lab.store_dir().join("artifacts");
    let dir = dir.join(training::output(&lab, "one-step").0);
    let files = std::fs::read_dir(&dir).unwrap().flatten();
    let mut pictures = files.map(|file| file.path());
    let picture = pictures.find(|path| path.extension().is_some_and(|end| end == "png"));
    let damaged = include_bytes!("../../soak/corpus/image/palette_of_13_bytes.png");
    std::fs::remove_file(picture.as_ref().unwrap()).unwrap();
    std::fs::write(picture.unwrap(), damaged).unwrap();
    lab.retort(&["show", "latest/one-step", "--as", "blocks"])
        .expect(4)
        .saying(&["is not a readable PNG", "a palette of 13 bytes"]);
}
