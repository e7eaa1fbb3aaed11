//! Files must not depend on each other in cycles, except a module and its children; nor must folders.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::{files, root};

/// A module by its path in the crate: `cli/runs`.
type Module = Vec<String>;

/// The folders below which a crate's modules lie. A test that has a folder is a crate.
const CRATES: [&str; 12] = [
    "runner/src",
    "plugins/abi/src",
    "plugins/checkpoint/src",
    "plugins/engine/src",
    "plugins/kernels/src",
    "plugins/candle/src",
    "plugins/libtorch/src",
    "tests/src",
    "tests/soak/src",
    "tests/tests/repository",
    "tests/tests/runner",
    "tests/tests/ui",
];

#[test]
fn files_do_not_need_each_other_in_circles() {
    for name in CRATES {
        let needs = needs(&root().join(name));
        assert!(needs.len() > 2, "{name}");
        if let Some(circle) = circle(&needs) {
            let circle: Vec<String> = circle.iter().map(|module| module.join("/")).collect();
            panic!("{name}: {} need each other", circle.join(" -> "));
        }
    }
}

/// A folder includes the file with its name.
#[test]
fn folders_do_not_need_each_other_in_circles() {
    for name in CRATES {
        let needs = of_folders(&needs(&root().join(name)));
        if let Some(circle) = circle(&needs) {
            let circle: Vec<String> = circle.iter().map(|module| module.join("/")).collect();
            panic!("{name}: {} need each other", circle.join(" -> "));
        }
    }
}

/// The dependencies between the entries of each folder.
fn of_folders(needs: &BTreeMap<Module, BTreeSet<Module>>) -> BTreeMap<Module, BTreeSet<Module>> {
    let mut found: BTreeMap<Module, BTreeSet<Module>> = BTreeMap::new();
    for (from, targets) in needs {
        for to in targets {
            let same = from.iter().zip(to).take_while(|(a, b)| a == b).count();
            // One contains the other.
            if same == from.len() || same == to.len() {
                continue;
            }
            let [from, to] = [from, to].map(|module| module[..=same].to_vec());
            found.entry(to.clone()).or_default();
            found.entry(from).or_default().insert(to);
        }
    }
    found
}

#[test]
fn a_circle_is_found() {
    let module = |name: &str| name.split('/').map(str::to_owned).collect::<Module>();
    let needs = |pairs: &[(&str, &str)]| {
        let mut needs: BTreeMap<Module, BTreeSet<Module>> = BTreeMap::new();
        for (from, to) in pairs {
            needs.entry(module(from)).or_default().insert(module(to));
            needs.entry(module(to)).or_default();
        }
        needs
    };
    assert!(circle(&needs(&[("a", "b"), ("b", "c"), ("a", "c")])).is_none());
    let found = circle(&needs(&[("a", "b"), ("b", "c/d"), ("c/d", "b")])).unwrap();
    assert_eq!(found.len(), 3, "{found:?}");
    // No cycle of files, one of folders.
    let apart = needs(&[("a/x", "b/x"), ("b/y", "a/y"), ("a", "a/x"), ("a/x", "a/y")]);
    assert!(circle(&apart).is_none());
    assert_eq!(circle(&of_folders(&apart)).unwrap().len(), 3);
    assert!(
        circle(&of_folders(&needs(&[
            ("a/x", "b/x"),
            ("a/y", "b/y"),
            ("b", "b/x")
        ])))
        .is_none()
    );
    assert_eq!(
        paths("use crate::{a::{b, C}, d};\nfn f() -> super::e::G { crate::h::i() } // crate::no"),
        [
            "crate::a::b",
            "crate::a::C",
            "crate::d",
            "crate::h::i",
            "super::e::G"
        ]
    );
}

/// The dependencies of each file within its crate, without tests.
fn needs(source: &Path) -> BTreeMap<Module, BTreeSet<Module>> {
    let module_of = |path: &Path| -> Module {
        let path = path.strip_prefix(source).unwrap().with_extension("");
        let parts = path.iter().map(|part| part.to_string_lossy().into_owned());
        parts.collect()
    };
    let is_test = |module: &Module| module.iter().any(|part| part == "tests");
    let all: BTreeMap<Module, String> = files(source, ".rs")
        .iter()
        .map(|path| (module_of(path), fs::read_to_string(path).unwrap()))
        .filter(|(module, _)| !is_test(module) && module != &["lib"] && module != &["main"])
        .collect();
    let mut needs = BTreeMap::new();
    for (module, text) in &all {
        let tests = ["mod tests {", "pub(super) mod tests {"];
        let tests = tests.map(|module| format!("#[cfg(test)]\n{module}"));
        let text = &text[..tests
            .iter()
            .filter_map(|tests| text.find(tests))
            .min()
            .unwrap_or(text.len())];
        let targets = paths(text).into_iter().filter_map(|path| {
            let mut parts: Vec<&str> = path.split("::").collect();
            let mut base: Module = match parts.remove(0) {
                "crate" => Vec::new(),
                _ => module[..module.len() - 1].to_vec(),
            };
            while parts.first() == Some(&"super") {
                base.pop();
                parts.remove(0);
            }
            // Up to the last file on the path, which contains the rest.
            let mut found = all.contains_key(&base).then(|| base.clone());
            for part in parts {
                base.push(part.to_owned());
                if all.contains_key(&base) {
                    found = Some(base.clone());
                }
            }
            found.filter(|target| target != module)
        });
        needs.insert(module.clone(), targets.collect());
    }
    needs
}

/// The paths in a text that begin with `crate` or `super`, without braces, in alphabetical order.
fn paths(text: &str) -> Vec<String> {
    let code = text.lines().map(|line| line.split("//").next().unwrap());
    let code = code.collect::<Vec<_>>().join("\n");
    let mut found = BTreeSet::new();
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            let before = &code[..at];
            let is_inside = before.ends_with(|c: char| c.is_alphanumeric() || "_:$".contains(c));
            if !is_inside && !before.ends_with("pub(in ") {
                expand("", &code[at..], &mut found);
            }
        }
    }
    let mut found: Vec<String> = found.into_iter().collect();
    found.sort_by_key(|path| path.to_lowercase());
    found
}

/// Adds the paths at the beginning of a text, and returns their length in bytes.
fn expand(prefix: &str, text: &str, found: &mut BTreeSet<String>) -> usize {
    let name = text.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
    let name = name.unwrap_or(text.len());
    let path = format!("{prefix}{}", &text[..name]);
    if !text[name..].starts_with('{') {
        let path = path.trim_end_matches(':');
        found.insert(path.trim_end_matches("::self").to_owned());
        return name;
    }
    let mut at = name + 1;
    while let Some(next) = text[at..].chars().next() {
        match next {
            '}' => return at + 1,
            c if c.is_alphabetic() || c == '_' => at += expand(&path, &text[at..], found),
            c => at += c.len_utf8(),
        }
        // A new name: `x as y`.
        if text[at..].starts_with(" as ") {
            at += text[at..].find([',', '}']).unwrap_or(0);
        }
    }
    at
}

/// A cycle of files, if there is one.
fn circle(needs: &BTreeMap<Module, BTreeSet<Module>>) -> Option<Vec<Module>> {
    fn visit<'a>(
        module: &'a Module,
        needs: &'a BTreeMap<Module, BTreeSet<Module>>,
        way: &mut Vec<&'a Module>,
        done: &mut BTreeSet<&'a Module>,
    ) -> Option<Vec<Module>> {
        if let Some(at) = way.iter().position(|known| *known == module) {
            let circle = way[at..].iter().map(|module| (*module).clone());
            return Some(circle.chain([module.clone()]).collect());
        }
        if !done.insert(module) {
            return None;
        }
        way.push(module);
        let found = needs[module]
            .iter()
            .find_map(|next| visit(next, needs, way, done));
        way.pop();
        found
    }
    let (mut way, mut done) = (Vec::new(), BTreeSet::new());
    needs
        .keys()
        .find_map(|module| visit(module, needs, &mut way, &mut done))
}
