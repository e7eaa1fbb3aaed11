//! Rules of the repository: promises of ARCHITECTURE.md, README.md and docs/ that a program can check.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use retort_tests::skip::skip;

#[path = "repository/examples.rs"]
mod examples;
#[path = "repository/pages.rs"]
mod pages;
#[path = "repository/structure.rs"]
mod structure;

#[test]
fn the_map_stays_short() {
    let lines = read("ARCHITECTURE.md").lines().count();
    assert!(
        lines < 200,
        "ARCHITECTURE.md has {lines} lines; it is a map, keep it below 200"
    );
}

#[test]
fn the_map_names_every_module_and_no_other() {
    let mapped = mapped();
    for path in &mapped {
        assert!(
            root().join(path).exists(),
            "ARCHITECTURE.md names {}",
            path.display()
        );
    }
    for crate_folder in ["runner", "plugins/checkpoint", "plugins/engine"] {
        let folder = Path::new(crate_folder).join("src");
        for entry in fs::read_dir(root().join(&folder)).unwrap() {
            let name = entry.unwrap().file_name();
            let known = ["lib.rs", "main.rs", "error.rs"]
                .iter()
                .any(|known| name == *known);
            let path = folder.join(&name);
            let is_module = path.extension() == Some(OsStr::new("rs")) && !known;
            assert!(
                !is_module || mapped.contains(&path),
                "the map in ARCHITECTURE.md lacks {}",
                path.display()
            );
        }
    }
}

#[test]
fn the_walk_of_a_recipe_leads_through_files_that_are_there() {
    let text = read("ARCHITECTURE.md");
    let walk = text
        .split("## From a recipe to a result")
        .nth(1)
        .expect("a walk");
    let walk = walk.split("\n## ").next().unwrap_or(walk);
    let steps = walk.lines().filter(|line| {
        line.split_once(". ")
            .is_some_and(|(number, _)| number.parse::<u32>().is_ok())
    });
    assert_eq!(steps.count(), 12);
    let named = walk.split('`').skip(1).step_by(2);
    let files: Vec<&str> = named.filter(|name| name.ends_with(".rs")).collect();
    assert!(files.len() >= 12);
    for file in files {
        assert!(root().join(file).exists(), "ARCHITECTURE.md names {file}");
    }
}

/// Paths from the root in ARCHITECTURE.md's map.
fn mapped() -> BTreeSet<PathBuf> {
    let text = read("ARCHITECTURE.md");
    let map = text.split("## The map").nth(1).expect("a map");
    let map = map.split("\n## ").next().unwrap_or(map);
    let mut folder = PathBuf::new();
    let mut paths = BTreeSet::new();
    for line in map.lines().filter(|line| line.starts_with("    ")) {
        let indent = line.len() - line.trim_start().len();
        let is_name = |word: &&str| word.ends_with(['/']) || Path::new(word).extension().is_some();
        let words = line
            .split_whitespace()
            .map(|word| word.trim_end_matches(','));
        for name in words.take_while(is_name) {
            if indent == 4 {
                folder = PathBuf::from(name);
                paths.insert(folder.clone());
            } else {
                paths.insert(folder.join("src").join(name));
            }
        }
    }
    paths
}

#[test]
fn modules_are_files_named_by_their_noun() {
    for file in sources() {
        assert!(
            file.file_name() != Some(OsStr::new("mod.rs")),
            "{}",
            file.display()
        );
    }
}

/// Longer files are hard to hold in mind. The soak's corpus is data.
#[test]
fn no_source_file_is_long() {
    let endings = [
        ".rs", ".cu", ".cuh", ".c", ".cpp", ".h", ".js", ".css", ".py", ".yaml", ".sql",
    ];
    let mut checked = 0;
    for folder in ["runner", "plugins", "tests", "recipes", "migrations"] {
        let found = endings.map(|ending| files(&root().join(folder), ending));
        let corpus = root().join("tests/soak/corpus");
        for file in found.iter().flatten() {
            if file.starts_with(&corpus) {
                continue;
            }
            let lines = fs::read_to_string(file).unwrap().lines().count();
            assert!(lines <= 800, "{} has {lines} lines", file.display());
            checked += 1;
        }
    }
    assert!(checked > 500, "{checked} files");
}

#[test]
fn one_module_knows_the_yaml_parsers() {
    let this = Path::new(file!()).file_name().unwrap();
    let module = root().join("runner/src/yaml");
    for parser in ["saphyr_parser", "serde_yaml"] {
        let users: Vec<PathBuf> = sources()
            .into_iter()
            .filter(|file| file.file_name() != Some(this))
            .filter(|file| {
                fs::read_to_string(file).unwrap().lines().any(|line| {
                    let code = line.split("//").next().unwrap_or_default();
                    code.contains(parser)
                })
            })
            .collect();
        assert!(!users.is_empty(), "{parser}");
        assert!(
            users.iter().all(|user| user.starts_with(&module)),
            "{parser}: {users:?}"
        );
    }
}

#[test]
fn dependencies_are_versioned_once() {
    for manifest in files(root(), "Cargo.toml") {
        if manifest == root().join("Cargo.toml") {
            continue;
        }
        let text = fs::read_to_string(&manifest).unwrap();
        let mut in_dependencies = false;
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            if line.starts_with('[') {
                in_dependencies = line.ends_with("dependencies]");
            } else if in_dependencies && !line.starts_with('#') {
                assert!(
                    line.contains("workspace = true"),
                    "{}: {line}",
                    manifest.display()
                );
            }
        }
    }
}

#[test]
fn migrations_are_numbered_without_gaps() {
    let mut names: Vec<String> = fs::read_dir(root().join("migrations"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(!names.is_empty());
    for (name, number) in names.iter().zip(1..) {
        assert!(
            name.starts_with(&format!("{number:04}_")) && name.ends_with(".sql"),
            "expected {number:04}_*.sql, found {name}"
        );
    }
}

#[test]
fn data_is_attributed() {
    let notice = read("recipes/data/README.md");
    let ignored = read(".gitignore");
    // What a recipe has users put there is not part of the repository.
    let is_ignored = |name: &str| {
        let mut patterns = ignored
            .lines()
            .filter_map(|line| line.strip_prefix("/recipes/data/"));
        patterns.any(|pattern| match pattern.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == pattern,
        })
    };
    assert!(is_ignored("captioned") && !is_ignored("digits.csv"));
    for entry in fs::read_dir(root().join("recipes/data")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            name == "README.md" || is_ignored(&name) || notice.contains(&format!("`{name}`")),
            "{name}"
        );
    }
}

#[test]
fn the_readme_stays_short() {
    let lines = read("README.md").lines().count();
    assert!(lines <= 150, "README.md has {lines} lines; docs/ has room");
}

#[test]
fn links_of_the_documentation_lead_somewhere() {
    let mut checked = 0;
    for page in documentation() {
        let text = fs::read_to_string(&page).unwrap();
        let targets = text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
            .filter(|target| !target.contains("://"));
        for target in targets {
            let file = target.split('#').next().unwrap();
            let place = page.parent().unwrap().join(file);
            assert!(place.exists(), "{}: {target}", page.display());
            checked += 1;
        }
    }
    assert!(checked > 20, "links were found: {checked}");
}

#[test]
fn every_page_is_listed() {
    let list = read("docs/README.md");
    for page in files(&root().join("docs"), ".md") {
        let name = page.file_name().unwrap().to_string_lossy();
        assert!(
            name == "README.md" || list.contains(&format!("]({name})")),
            "docs/README.md lacks {name}"
        );
    }
}

#[test]
fn the_book_is_built_and_its_links_lead_somewhere() {
    let test = std::env::current_exe().unwrap();
    let target = test
        .ancestors()
        .nth(3)
        .expect("target/<profile>/deps/<test>");
    let on_path = Command::new("mdbook").arg("--version").output().is_ok();
    if !on_path && !target.join("tools/bin/mdbook").exists() {
        return skip("mdbook is not installed; `make book` does that");
    }
    let dir = tempfile::tempdir().unwrap();
    let tools = target.join("tools");
    fs::create_dir_all(&tools).unwrap();
    std::os::unix::fs::symlink(tools, dir.path().join("tools")).unwrap();
    let output = Command::new(root().join("docs/book"))
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    let book = dir.path().join("book");
    let mut checked = 0;
    for page in files(&book, ".html") {
        // All pages in one, for printing; and the server's page for missing addresses.
        if ["print.html", "404.html"]
            .iter()
            .any(|name| page.ends_with(name))
        {
            continue;
        }
        let text = fs::read_to_string(&page).unwrap();
        for target in text.split("href=\"").skip(1) {
            let target = target.split('"').next().unwrap();
            if target.contains("://") || target.starts_with("data:") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let place = match file {
                "" => page.clone(),
                file => page.parent().unwrap().join(file),
            };
            assert!(place.exists(), "{}: {target}", page.display());
            let named = || fs::read_to_string(&place).unwrap();
            assert!(
                anchor.is_empty() || named().contains(&format!("id=\"{anchor}\"")),
                "{}: {target}",
                page.display()
            );
            checked += 1;
        }
    }
    assert!(checked > 300, "links were found: {checked}");
}

/// Every regression test named in SECURITY.md exists.
#[test]
fn the_tests_of_found_faults_are_there() {
    let tests: BTreeSet<String> = sources()
        .iter()
        .flat_map(|path| {
            let text = fs::read_to_string(path).unwrap();
            let text = text.replace("#[tokio::test]", "#[test]");
            let named = text.split("#[test]").skip(1).filter_map(|after| {
                let name = after.split("fn ").nth(1)?.split('(').next()?;
                Some(name.to_owned())
            });
            named.collect::<Vec<_>>()
        })
        .collect();
    let page = read("SECURITY.md");
    let rows = page.lines().filter(|line| line.starts_with("| "));
    let mut named = 0;
    for cell in rows.filter_map(|row| row.trim_end_matches(" |").rsplit_once(" | ")) {
        for name in cell.1.split('`').skip(1).step_by(2) {
            assert!(tests.contains(name), "SECURITY.md: no test {name}");
            named += 1;
        }
    }
    assert!(named >= 28, "{named} tests");
}

#[test]
fn exit_codes_are_the_same_everywhere() {
    let Some(retort) = retort() else { return };
    let help = Command::new(retort).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let documented = help
        .split("Exit codes:")
        .nth(1)
        .expect("exit codes in the help");
    let codes = |text: &str, separator: &[char]| -> BTreeSet<u8> {
        text.lines()
            .filter_map(|line| {
                line.trim()
                    .split(separator)
                    .find(|cell| !cell.is_empty())?
                    .trim()
                    .parse()
                    .ok()
            })
            .collect()
    };
    let page = read("docs/commands.md");
    let table = page.split("## Exit codes").nth(1).unwrap();
    let table = table.split("\n## ").next().unwrap();
    let expected = BTreeSet::from([0, 1, 2, 3, 4, 5, 75, 100, 130]);
    assert_eq!(codes(table, &['|']), expected, "docs/commands.md");
    assert_eq!(codes(documented, &[' ']), expected, "retort --help");
}

#[test]
fn recipes_are_valid_and_can_be_planned() {
    let Some(retort) = retort_with_plugin() else {
        return;
    };
    let store = tempfile::tempdir().unwrap();
    let recipes = files(&root().join("recipes"), ".yaml");
    assert!(!recipes.is_empty());
    for recipe in recipes {
        check_recipe(&retort, &["validate"], &recipe, store.path());
        check_recipe(&retort, &["plan"], &recipe, store.path());
    }
}

#[test]
fn the_schema_beside_the_recipes_is_the_present_one() {
    let Some(retort) = retort_with_plugin() else {
        return;
    };
    let store = tempfile::tempdir().unwrap();
    let output = Command::new(retort)
        .args(["schema", "--plugin", "candle", "--store"])
        .arg(store.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    assert!(
        String::from_utf8_lossy(&output.stdout) == read("recipes/retort.schema.json"),
        "recipes/retort.schema.json is out of date; `make schema` writes it anew"
    );
}

#[test]
fn recipes_tell_editors_their_schema() {
    let recipes = files(&root().join("recipes"), ".yaml");
    for recipe in recipes {
        let text = fs::read_to_string(&recipe).unwrap();
        let first = text.lines().next().unwrap_or_default();
        let schema = first.strip_prefix("# yaml-language-server: $schema=");
        let schema = schema.unwrap_or_else(|| panic!("{}: no modeline", recipe.display()));
        let place = recipe.parent().unwrap().join(schema);
        assert!(place.is_file(), "{}: no {schema}", recipe.display());
    }
}

fn check_recipe(retort: &Path, command: &[&str], recipe: &Path, store: &Path) {
    let output = Command::new(retort)
        .args(command)
        .arg(recipe)
        .arg("--store")
        .arg(store)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{command:?} {}: {}",
        recipe.display(),
        shown(&output)
    );
}

fn shown(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!(
        "{}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    )
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The pages in docs/ and elsewhere.
fn documentation() -> Vec<PathBuf> {
    let mut pages = files(&root().join("docs"), ".md");
    let others = [
        "README.md",
        "SECURITY.md",
        "CONTRIBUTING.md",
        "plugins/README.md",
    ];
    pages.extend(others.map(|page| root().join(page)));
    pages
}

/// All Rust files of the workspace's crates.
fn sources() -> Vec<PathBuf> {
    ["runner", "plugins", "tests"]
        .iter()
        .flat_map(|folder| files(&root().join(folder), ".rs"))
        .collect()
}

/// Files below a folder with this ending, without build outputs and hidden folders.
fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" {
                found.extend(files(&path, ending));
            }
        } else if name.ends_with(ending) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The binary beside this test, as `make test` builds it.
fn retort() -> Option<PathBuf> {
    built("retort")
}

/// The binary, if the candle plugin is beside it.
fn retort_with_plugin() -> Option<PathBuf> {
    built("libretort_candle.so").and_then(|_| retort())
}

fn built(name: &str) -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let folder = test
        .ancestors()
        .nth(2)
        .expect("target/<profile>/deps/<test>");
    let path = folder.join(name);
    if path.exists() {
        return Some(path);
    }
    skip(&format!(
        "{} is not built; `make test` builds it",
        path.display()
    ));
    None
}
