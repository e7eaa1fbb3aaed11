//! Tests of the documentation's pages: recipes are planned, commands are run.
//!
//! A command that cannot be run here has an invisible mark before its block, with the reason: `<!-- not run: retort ui: it
//! serves until it is stopped -->`. A partial recipe is completed with the stages of [`AROUND`]; if it consists only of
//! options, the word after `yaml` names their stage.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::{check_recipe, documentation, examples, read, retort, retort_with_plugin, root, shown};

/// Blocks that other tests run: the page, the first command, and the test.
const FOLLOWED_ELSEWHERE: [(&str, &str, &str); 4] = [
    (
        "docs/cluster.md",
        "retort doctor recipes/digits.yaml",
        "tests/tests/runner/cluster/jobs.rs",
    ),
    (
        "plugins/README.md",
        "retort plugin new hello",
        "tests/tests/runner/authoring.rs",
    ),
    (
        "plugins/README.md",
        "retort plugin new hello --lang c",
        "tests/tests/runner/authoring.rs",
    ),
    (
        "plugins/README.md",
        "retort plugin new mine --kind backend",
        "tests/tests/runner/authoring.rs",
    ),
];

/// What a block needs besides the reader's files: the page, the first command, and a command before it.
const PREPARED: [(&str, &str, &str); 2] = [
    (
        "docs/cluster.md",
        "retort trust",
        "printf '[slurm]\nprologue = \"module load cuda/12.4\"\n' > retort.toml",
    ),
    (
        "plugins/README.md",
        "retort plugin test . --recipe recipe.yaml --junit report.xml",
        "retort plugin new hello --lang c && make -C hello && cp -r hello/. .",
    ),
];

/// The recipe that completes partial recipes.
const AROUND: &str = "
  pictures:
    kind: images
    data: {folder: my-images, size: 16}
  codes:
    kind: tokenizer
    data: pictures
    codebook_size: 16
    codebook_dim: 4
  teacher:
    kind: pretrain
    tokenizer: codes
    data: pictures
    width: 32
    depth: 2
    heads: 2
  trajectories:
    kind: trajectories
    teacher: teacher
    count: 100
  student:
    kind: distill
    teacher: teacher
    trajectories: trajectories
    timesteps: [0]
  features:
    kind: classifier
    data: pictures
  sample-1-step:
    kind: sample
    sampler: {kind: student, student: student, timesteps: [0]}
    count: 100
  sample-2-step:
    kind: sample
    sampler: {kind: student, student: student, timesteps: [0]}
    count: 100
  evaluation:
    kind: evaluate
    data: pictures
    classifier: features
    samples: {1-step: sample-1-step}
";

/// Files in the pages' recipes that do not exist here: planning only needs their paths.
const NAMED: [&str; 5] = [
    "pt_inception-2015-12-05-6726825d.pth",
    "reference.npz",
    "vgg16-397923af.pth",
    "vgg.pth",
    "flan-t5-xl/config.json",
];

/// Runs and artifacts in the pages, and their stand-ins here.
const LATEST: [(&str, &str); 2] = [("2n6s6a5wyy", "latest"), ("2n6r2v2vw6", "latest~1")];
const STUDENT: &str = "c463b43aa843";

#[test]
fn recipes_of_the_documentation_can_be_planned() {
    let Some(retort) = retort_with_plugin() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let own = |name: &str| dir.path().join(name);
    for folder in ["data", "my-images/a", "flan-t5-xl"] {
        fs::create_dir_all(own(folder)).unwrap();
    }
    fs::copy(
        root().join("recipes/data/digits.csv"),
        own("data/digits.csv"),
    )
    .unwrap();
    fs::copy(root().join("docs/digits.png"), own("my-images/a/1.png")).unwrap();
    for name in NAMED {
        fs::write(own(name), "{}").unwrap();
    }
    let (mut whole, mut parts) = (0, 0);
    for (page, text) in pages() {
        let blocks = text.split("```yaml").skip(1);
        for (stage, block) in blocks.filter_map(|rest| rest.split("```").next()?.split_once('\n')) {
            let recipe = match block.starts_with("version:") {
                true => block.to_owned(),
                false => completed(stage.trim(), block),
            };
            match recipe == block {
                true => whole += 1,
                false => parts += 1,
            }
            let place = own("documented.yaml");
            fs::write(&place, &recipe).unwrap();
            println!("{page}:\n{recipe}");
            // An artifact of the reader's store.
            match recipe.contains("\nartifacts:") {
                true => check_recipe(&retort, &["validate"], &place, &own("store")),
                false => check_recipe(&retort, &["plan"], &place, &own("store")),
            }
        }
    }
    assert!(whole >= 3 && parts >= 8, "{whole} recipes, {parts} parts");
}

/// The complete recipe for a part: sections, stages, or options of one stage.
fn completed(stage: &str, part: &str) -> String {
    let indentation = part.len() - part.trim_start().len();
    let (sections, part) = match (indentation, stage) {
        (0, _) => (part, String::new()),
        (2, _) => ("", part.to_owned()),
        (_, "") => panic!("options of which stage? ```yaml STAGE says it:\n{part}"),
        (_, stage) => ("", format!("  {stage}:\n{part}    ...\n")),
    };
    let around = entries(AROUND, 2);
    let mut stages = entries(&part, 2);
    for (_, text) in &mut stages {
        // The part that the page leaves out.
        let Some(own) = text.strip_suffix("    ...\n").map(str::to_owned) else {
            continue;
        };
        *text = own.clone();
        let (name, own) = own.split_once('\n').expect("a stage's options");
        let given = entries(own, 4);
        let known = around
            .iter()
            .find(|(known, _)| name.trim() == format!("{known}:"));
        let (_, known) = known.unwrap_or_else(|| panic!("no stage like {name} around it"));
        let known = known.split_once('\n').map_or("", |(_, options)| options);
        for (option, line) in entries(known, 4) {
            if !given.iter().any(|(given, _)| *given == option) {
                text.push_str(&line);
            }
        }
    }
    let named: BTreeSet<String> = stages
        .iter()
        .chain(&entries(sections, 2))
        .map(|(name, _)| name.clone())
        .collect();
    let others = around.into_iter().filter(|(name, _)| !named.contains(name));
    let stages: String = stages
        .into_iter()
        .chain(others)
        .map(|(_, text)| text)
        .collect();
    format!("version: 1\nbackend: candle\n{sections}stages:\n{stages}")
}

/// The entries of a mapping whose keys have this indentation, each with all its lines.
fn entries(text: &str, indentation: usize) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    for line in text.split_inclusive('\n') {
        let begins = line.len() - line.trim_start().len() == indentation;
        match line.trim().split_once(':') {
            Some((key, _)) if begins => found.push((key.to_owned(), line.to_owned())),
            _ => {
                if let Some((_, lines)) = found.last_mut() {
                    lines.push_str(line);
                }
            }
        }
    }
    found
}

#[test]
fn commands_of_the_documentation_do_what_they_say() {
    let Some(retort) = retort_with_plugin() else {
        return;
    };
    let reader = Reader::new(&retort);
    let (mut ran, mut left_out, mut failed) = (0, 0, Vec::new());
    for (page, text) in pages() {
        for (number, block) in blocks(&page, &text).into_iter().enumerate() {
            let is_this = |other: &str, first: &str| page == other && block.first() == Some(first);
            if FOLLOWED_ELSEWHERE
                .iter()
                .any(|(other, first, _)| is_this(other, first))
            {
                continue;
            }
            let dir = reader.dir_of(&format!("{page}-{number}"));
            for (_, _, command) in PREPARED
                .iter()
                .filter(|(other, first, _)| is_this(other, first))
            {
                let output = reader.type_in(&dir, command);
                assert!(output.status.success(), "{command}: {}", shown(&output));
            }
            for command in &block.commands {
                if block
                    .marks
                    .iter()
                    .any(|mark| command.starts_with(mark.as_str()))
                {
                    left_out += 1;
                    continue;
                }
                let output = reader.type_in(&dir, command);
                ran += 1;
                if !output.status.success() {
                    failed.push(format!("{page}: {command}\n{}", shown(&output)));
                }
            }
        }
    }
    let dir = reader.dir_of("help");
    for command in examples::of_the_history(&retort) {
        let output = reader.type_in(&dir, &command);
        ran += 1;
        if !output.status.success() {
            failed.push(format!("retort help: {command}\n{}", shown(&output)));
        }
    }
    println!("{ran} commands ran, {left_out} are marked");
    assert!(
        failed.is_empty(),
        "{} of {ran} commands failed; what cannot be run here needs a mark, as the top of this file says\n{}",
        failed.len(),
        failed.join("\n")
    );
    assert!(ran >= 70, "{ran} commands ran");
}

/// A reader's environment: small versions of the recipes, and a history of their runs.
struct Reader {
    dir: TempDir,
    /// The directory of the binary.
    binaries: PathBuf,
    /// The hash of a student.
    student: String,
}

impl Reader {
    fn new(retort: &Path) -> Self {
        let mut reader = Self {
            dir: tempfile::tempdir().unwrap(),
            binaries: retort.parent().unwrap().to_owned(),
            student: String::new(),
        };
        let start = reader.start();
        fs::create_dir_all(start.join("recipes/data")).unwrap();
        let data = "recipes/data/digits.csv";
        fs::copy(root().join(data), start.join(data)).unwrap();
        for recipe in ["recipes/digits.yaml", "recipes/digits-sweep.yaml"] {
            fs::write(start.join(recipe), small(&read(recipe))).unwrap();
        }
        for (range, part) in [("[0,100]", "part-1"), ("[100,200]", "part-2")] {
            reader.prepare(&format!(
                "retort run recipes/digits.yaml --until trajectories --set trajectories.range={range}"
            ));
            let hash = reader.hash("trajectories");
            reader.prepare(&format!("cp -r .retort/artifacts/{hash} {part}"));
        }
        reader.prepare("retort run recipes/digits.yaml");
        reader.prepare(
            "retort run recipes/digits.yaml --sweep student.train.learning_rate=1e-3,2e-3 \
             --objective min:evaluation/1-step/frechet_distance",
        );
        for file in ["var_d16.pth", "llamagen-L.pt"] {
            reader.prepare(&format!(
                "retort artifacts export latest/student --as published -o {file}"
            ));
        }
        reader.student = reader.hash("student")[..12].to_owned();
        reader
    }

    /// The hash of a stage's output in the newest run.
    #[track_caller]
    fn hash(&self, stage: &str) -> String {
        let listed = self.prepare("retort artifacts list latest --json");
        let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
        let mut listed = listed.as_array().unwrap().iter();
        let made = listed.find(|row| row["stage"] == stage).unwrap();
        made["hash"].as_str().unwrap().to_owned()
    }

    fn start(&self) -> PathBuf {
        self.dir.path().join("start")
    }

    /// A separate directory for a block's commands, with the initial files.
    fn dir_of(&self, block: &str) -> PathBuf {
        let dir = self.dir.path().join(block.replace('/', "-"));
        let copied = Command::new("cp")
            .arg("-a")
            .args([&self.start(), &dir])
            .status();
        assert!(copied.unwrap().success());
        dir
    }

    #[track_caller]
    fn prepare(&self, command: &str) -> Output {
        let output = self.type_in(&self.start(), command);
        assert!(output.status.success(), "{command}: {}", shown(&output));
        output
    }

    /// Runs a line of a page in a shell. A sweep is only planned: it would take a while, and other tests run sweeps.
    fn type_in(&self, dir: &Path, command: &str) -> Output {
        let mut command = command.replace(STUDENT, &self.student);
        for (name, here) in LATEST {
            command = command.replace(name, here);
        }
        let prepares = self.student.is_empty();
        if !prepares && command.starts_with("retort run ") && command.contains(" --sweep") {
            command = command
                .replace("retort run ", "retort plan ")
                .replace(" --jobs 2", "");
        }
        let path = std::env::var("PATH").unwrap_or_default();
        Command::new("bash")
            .args(["-c", &command])
            .current_dir(dir)
            .env("PATH", format!("{}:{path}", self.binaries.display()))
            .env("HOME", self.dir.path())
            .env_remove("RETORT_PLUGIN_PATH")
            .env_remove("XDG_DATA_HOME")
            .env_remove("XDG_CONFIG_HOME")
            .output()
            .unwrap()
    }
}

/// A recipe of the digits that takes seconds.
fn small(recipe: &str) -> String {
    let mut text = String::new();
    for line in recipe.lines() {
        let mut line = line.to_owned();
        for (key, value) in [
            ("steps: ", "4"),
            ("count: ", "200"),
            ("batch: ", "8"),
            ("depth: ", "2"),
        ] {
            let Some((before, after)) = line.split_once(key) else {
                continue;
            };
            let digits = after
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(after.len());
            if digits > 0 {
                line = format!("{before}{key}{value}{}", &after[digits..]);
            }
        }
        text.push_str(&line);
        text.push('\n');
        if line == "    kind: classifier" {
            text.push_str("    train: {steps: 4}\n");
        }
    }
    text
}

/// A block of commands.
#[derive(Default)]
struct Block {
    /// Not run: commands that begin with these words.
    marks: Vec<String>,
    /// Each with its continuation lines.
    commands: Vec<String>,
}

impl Block {
    /// The first command, without its comment.
    fn first(&self) -> Option<&str> {
        let first = self.commands.first()?;
        Some(first.split(" #").next().unwrap_or_default().trim())
    }
}

/// The blocks of a page that contain a command of retort.
#[track_caller]
fn blocks(page: &str, text: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let mut block = Block::default();
    let mut end = |block: &mut Block| {
        let mut lines = block.commands.iter().flat_map(|command| command.lines());
        if lines.any(|line| line.trim_start().starts_with("retort ")) {
            let block = std::mem::take(block);
            for mark in &block.marks {
                let used = block
                    .commands
                    .iter()
                    .any(|line| line.starts_with(mark.as_str()));
                assert!(used, "{page}: nothing begins with the marked `{mark}`");
            }
            found.push(block);
        }
        block.commands.clear();
    };
    let mut fence: Option<&str> = None;
    for line in text.lines() {
        if let Some(language) = line.strip_prefix("```") {
            end(&mut block);
            fence = fence.is_none().then_some(language);
            continue;
        }
        if let Some(mark) = line.strip_prefix("<!-- not run: ") {
            end(&mut block);
            let mark = mark
                .strip_suffix(" -->")
                .and_then(|mark| mark.split_once(": "));
            let (words, _reason) = mark.unwrap_or_else(|| panic!("{page}: {line}: no reason"));
            block.marks.push(words.to_owned());
            continue;
        }
        let goes_on = block
            .commands
            .last()
            .is_some_and(|last| last.ends_with('\\') || is_open(last));
        let command = match fence {
            None => line.strip_prefix("    "),
            Some("console") => line.strip_prefix("$ ").or(goes_on.then_some(line)),
            Some(_) => None,
        };
        match command {
            Some(more) if goes_on => {
                let last = block.commands.last_mut().unwrap();
                last.push('\n');
                last.push_str(more);
            }
            Some(command) => block.commands.push(command.to_owned()),
            // A command's output.
            None if fence == Some("console") => {}
            None => end(&mut block),
        }
    }
    end(&mut block);
    assert!(block.marks.is_empty(), "{page}: a mark without a block");
    found
}

/// Whether a command has an open quote.
fn is_open(command: &str) -> bool {
    let words = command.split(" #").next().unwrap_or_default();
    words.matches('"').count() % 2 == 1
}

/// The pages, by their paths from the root.
fn pages() -> Vec<(String, String)> {
    let pages = documentation().into_iter().map(|path| {
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        (name, fs::read_to_string(path).unwrap())
    });
    pages.collect()
}

#[test]
fn pages_are_followed_where_it_is_said() {
    for (page, _, test) in FOLLOWED_ELSEWHERE {
        let name = page.rsplit('/').next().unwrap();
        assert!(read(test).contains(name), "{test} does not follow {page}");
    }
    let named = FOLLOWED_ELSEWHERE.iter().chain(&PREPARED);
    for (page, first, _) in named {
        let found = blocks(page, &read(page))
            .iter()
            .filter(|block| block.first() == Some(*first))
            .count();
        assert_eq!(found, 1, "{page}: blocks that begin with `{first}`");
    }
}

#[test]
fn commands_of_the_help_are_in_the_table() {
    let Some(retort) = retort() else { return };
    let page = read("docs/commands.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    let cells = rows.filter_map(|row| row.split(" | ").next());
    let named: BTreeSet<&str> = cells
        .flat_map(|cell| cell.split('`').step_by(2))
        .filter_map(|command| command.split(' ').next())
        .collect();
    let help = Command::new(retort).arg("help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let listed: BTreeSet<&str> = examples::listed(&help).collect();
    assert!(listed.len() > 20, "{listed:?}");
    assert_eq!(named, listed, "the table of docs/commands.md, and the help");
}

#[test]
fn commands_of_the_documentation_exist() {
    let texts: Vec<String> = documentation()
        .iter()
        .map(|page| fs::read_to_string(page).unwrap())
        .collect();
    let commands: Vec<&str> = texts
        .iter()
        .flat_map(|text| text.lines())
        .filter_map(|line| line.strip_prefix("    "))
        .collect();
    let makefile = read("Makefile");
    for target in commands
        .iter()
        .filter_map(|line| line.strip_prefix("make "))
    {
        let target = target.split_whitespace().next().unwrap_or_default();
        // From a project of the reader.
        if target == "-C" {
            continue;
        }
        assert!(makefile.contains(&format!("\n{target}:")), "make {target}");
    }
    for needed in ["make digits", "make test"] {
        assert!(commands.contains(&needed), "{needed}");
    }

    let Some(retort) = retort() else { return };
    let lines: Vec<&str> = commands
        .iter()
        .filter_map(|line| line.strip_prefix("retort "))
        .collect();
    let mut known: BTreeMap<Vec<&str>, BTreeSet<String>> = BTreeMap::new();
    for line in &lines {
        let line = line.split(" #").next().unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        // A subcommand (`runs list`), or a command with an argument (`plan recipe.yaml`).
        let is_name = |word: &&str| word.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
        let names = words.iter().copied().take(2).take_while(is_name);
        let names: Vec<&str> = names.collect();
        let flags = (1..=names.len()).rev().find_map(|count| {
            let names = names[..count].to_vec();
            if let Some(flags) = known.get(&names) {
                return Some(flags.clone());
            }
            let flags = flags(&retort, &names)?;
            known.insert(names, flags.clone());
            Some(flags)
        });
        let flags = flags.unwrap_or_else(|| panic!("no such command: retort {line}"));
        for word in words.iter().filter(|word| word.starts_with('-')) {
            let flag = word.split('=').next().unwrap();
            assert!(flags.contains(flag), "no {flag} of retort {line}");
        }
    }
    assert!(known.len() > 15, "commands were found: {:?}", known.keys());
}

/// The flags in the help of a command; None if there is no such command.
fn flags(retort: &Path, names: &[&str]) -> Option<BTreeSet<String>> {
    let help = Command::new(retort).args(names).arg("--help").output();
    let help = help.unwrap();
    if !help.status.success() {
        return None;
    }
    let text = String::from_utf8(help.stdout).unwrap();
    let is_flag = |word: &&str| word.starts_with('-');
    let words = text
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with('-'))
        .flat_map(|line| line.split([' ', ',', '=']).filter(is_flag));
    let words = words.map(|word| word.trim_end_matches(['.', '[']).to_owned());
    Some(words.collect())
}
