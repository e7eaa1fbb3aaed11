//! Tests of the examples in the commands' help and in the comments of recipes: changes of a recipe are planned.
//!
//! The help's examples are about `recipes/digits.yaml`; those in a recipe, about that recipe. Filters and fields need a history:
//! `pages.rs` tries [`of_the_history`] on one.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::{files, read, retort, retort_with_plugin, root, shown};

/// The recipe of the help's examples.
const RECIPE: &str = "recipes/digits.yaml";

#[test]
fn examples_of_the_help_and_of_recipes_can_be_planned() {
    let Some(retort) = retort_with_plugin() else {
        return;
    };
    let store = tempfile::tempdir().unwrap();
    let plan = |source: &str, recipe: &str, options: &str| {
        let output = Command::new("bash")
            .args([
                "-c",
                &format!("\"$0\" plan {recipe} {options} --store \"$1\""),
            ])
            .args([retort.as_path(), store.path()])
            .current_dir(root())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{source}: {options}\n{}",
            shown(&output)
        );
    };

    let mut tried = 0;
    for (command, help) in helps(&retort) {
        // What `sample` changes is a recipe of its own.
        let changes = code(&command, &help).filter(|_| command != "sample");
        for options in changes.filter_map(options) {
            plan(&format!("retort help {command}"), RECIPE, &options);
            tried += 1;
        }
    }
    // Of `run`, `plan` and `graph`.
    assert!(tried >= 15, "{tried} examples of the help");

    let mut tried = 0;
    for path in files(&root().join("recipes"), ".yaml") {
        let recipe = path.strip_prefix(root()).unwrap().display().to_string();
        for options in of_recipe(&recipe, &fs::read_to_string(&path).unwrap()) {
            plan(&recipe, &recipe, &options);
            tried += 1;
        }
    }
    assert!(tried >= 16, "{tried} examples of recipes");
}

#[test]
fn stages_in_the_help_are_those_of_the_digits() {
    let Some(retort) = retort() else { return };
    let recipe = read(RECIPE);
    let mut found = 0;
    for (command, help) in helps(&retort) {
        let stages = code(&command, &help).filter_map(|code| code.strip_prefix("latest/"));
        for stage in stages {
            let named = format!("\n  {stage}:\n");
            assert!(recipe.contains(&named), "retort help {command}: {stage}");
            found += 1;
        }
    }
    assert!(found >= 5, "{found} stages");
}

/// The examples of the help that need a history of the digits, as commands.
pub fn of_the_history(retort: &Path) -> Vec<String> {
    let mut commands = Vec::new();
    for (command, help) in helps(retort) {
        for code in code(&command, &help) {
            let is_field = code.starts_with("metrics.") || code.starts_with("params.");
            match command.as_str() {
                "runs list" if code.contains(" < ") => {
                    commands.push(format!("retort runs list --where '{code}'"));
                }
                "runs list" if is_field => {
                    commands.push(format!("retort runs list --show '{code}'"));
                }
                // A `network` is changed only if it is a published file.
                "sample" if code.starts_with("--set images.") => {
                    commands.push(format!("retort sample latest/student -n 2 {code}"));
                }
                _ => {}
            }
        }
    }
    assert!(commands.len() >= 4, "{commands:?}");
    commands
}

/// The complete help of each command, by its name, in one line.
pub fn helps(retort: &Path) -> BTreeMap<String, String> {
    let mut helps = BTreeMap::new();
    let mut names = vec![String::new()];
    while let Some(name) = names.pop() {
        let output = Command::new(retort)
            .arg("help")
            .args(name.split_whitespace())
            .output()
            .unwrap();
        assert!(output.status.success(), "{name}: {}", shown(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        names.extend(listed(&text).map(|below| format!("{name} {below}").trim().to_owned()));
        let words: Vec<&str> = text.split_whitespace().collect();
        helps.insert(name, words.join(" "));
    }
    assert!(helps.len() > 40, "{:?}", helps.keys());
    helps
}

/// The commands that a help lists.
pub fn listed(help: &str) -> impl Iterator<Item = &str> {
    let list = help.split("\nCommands:\n").nth(1).unwrap_or_default();
    let list = list.split("\n\n").next().unwrap_or_default();
    list.lines()
        .filter_map(|line| line.strip_prefix("  "))
        // The others continue a description.
        .filter(|line| !line.starts_with(' '))
        .filter_map(|line| line.split(' ').next())
        .filter(|name| *name != "help")
}

/// What stands between backquotes.
fn code<'t>(source: &str, text: &'t str) -> impl Iterator<Item = &'t str> {
    let quotes = text.matches('`').count();
    assert!(quotes.is_multiple_of(2), "{source}: {quotes} backquotes");
    text.split('`').skip(1).step_by(2)
}

/// The options of `plan` for an example, if that changes a recipe.
fn options(code: &str) -> Option<String> {
    let changes = ["--set ", "--force=", "--from ", "--until "];
    if changes.iter().any(|option| code.starts_with(option)) {
        return Some(code.to_owned());
    }
    // The values of a sweep: `seed=1..5`.
    let (path, _) = code.split_once('=')?;
    let is_path = |path: &str| {
        path.bytes()
            .all(|b| b.is_ascii_lowercase() || b"._".contains(&b))
    };
    is_path(path).then(|| format!("--sweep {code}"))
}

/// The options of `plan` for the examples in a recipe's comments: in backquotes, or indented lines.
fn of_recipe(recipe: &str, text: &str) -> Vec<String> {
    let comments = text
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix('#'));
    let comments: Vec<&str> = comments.collect();
    let joined = comments.join(" ");
    let mut found: Vec<String> = code(recipe, &joined)
        .filter(|code| code.starts_with("--") && code.contains([' ', '=']))
        .filter_map(options)
        .collect();
    let mut goes_on = false;
    for line in comments {
        let line = line.strip_prefix("   ").unwrap_or_default().trim_start();
        let line = line.split("  #").next().unwrap_or_default();
        let whole = ["retort run ", "retort plan "]
            .iter()
            .find_map(|command| line.strip_prefix(command));
        if let Some(rest) = whole {
            let options = rest.strip_prefix(recipe);
            let options = options.unwrap_or_else(|| panic!("{recipe}: another's: {line}"));
            found.push(options.replace(" --jobs 2", ""));
        } else if goes_on && line.starts_with("--") {
            let last = found.last_mut().expect("a line above");
            last.push(' ');
            last.push_str(line);
        } else if line.starts_with("--") {
            found.push(line.to_owned());
        }
        goes_on = whole.is_some() || line.starts_with("--");
    }
    found
}
