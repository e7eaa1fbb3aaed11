//! New plugin projects: a few files that build, install and run at once.
//!
//! In: a name and what to begin with. Out: a directory. The files are those of `plugins/templates`, which the workspace
//! builds and tests under the names `hello` and `abacus`; a new project has its own name in their place. Deliberately
//! absent: building (the project's `cargo` or `make`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What a project begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Template {
    /// A kind of stage in Rust.
    Rust,
    /// A kind of stage in C.
    C,
    /// A kind of stage in C++.
    Cpp,
    /// A tensor backend in Rust, with every stage of the engine.
    Backend,
}

/// Why a project could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ProjectError {
    /// A name that recipes could not use.
    #[error("`{0}` is no name for a plugin")]
    Name(String),
    /// There is something already.
    #[error("{} exists and is not empty", .0.display())]
    Exists(PathBuf),
    /// What is said to be a clone of retort is none.
    #[error("{} is no clone of retort: it has no plugins/abi/Cargo.toml", .0.display())]
    NotAClone(PathBuf),
    /// Rust projects need a clone.
    #[error("a plugin in Rust is built against a clone of retort, and where that is is not known")]
    NoClone,
    /// The file system refuses.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl ProjectError {
    /// What to do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Name(_) => {
                Some("lower-case letters, digits, `-` and `_`, beginning with a letter")
            }
            Self::Exists(_) => Some("--into DIR names another directory"),
            Self::NotAClone(_) | Self::NoClone => {
                Some("--retort DIR names a clone of the repository of retort")
            }
            Self::Io { .. } => None,
        }
    }
}

/// A file of a template: where it goes and what it holds.
type TemplateFile = (&'static str, &'static str);

macro_rules! templates {
    ($($to:literal: $from:literal),* $(,)?) => {
        &[$(($to, include_str!(concat!("../../../plugins/", $from)))),*]
    };
}

const RUST: &[TemplateFile] = templates! {
    "Cargo.toml": "templates/rust/project.toml",
    "src/lib.rs": "templates/rust/src/lib.rs",
    "recipe.yaml": "templates/recipe.yaml",
    "README.md": "templates/rust/README.md",
    ".gitignore": "templates/ignore",
};
const C: &[TemplateFile] = templates! {
    "Makefile": "templates/c/Makefile",
    "plugin.c": "templates/c/plugin.c",
    "exports.map": "templates/exports.map",
    "retort_plugin.h": "abi/retort_plugin.h",
    "retort_text.h": "abi/retort_text.h",
    "recipe.yaml": "templates/recipe.yaml",
    "README.md": "templates/c/README.md",
    ".gitignore": "templates/ignore",
};
const CPP: &[TemplateFile] = templates! {
    "Makefile": "templates/cpp/Makefile",
    "plugin.cpp": "templates/cpp/plugin.cpp",
    "exports.map": "templates/exports.map",
    "retort_plugin.h": "abi/retort_plugin.h",
    "retort_text.h": "abi/retort_text.h",
    "recipe.yaml": "templates/recipe.yaml",
    "README.md": "templates/cpp/README.md",
    ".gitignore": "templates/ignore",
};
const BACKEND: &[TemplateFile] = templates! {
    "Cargo.toml": "templates/backend/project.toml",
    "src/lib.rs": "templates/backend/src/lib.rs",
    "src/backend.rs": "templates/backend/src/backend.rs",
    "recipe.yaml": "templates/backend/recipe.yaml",
    "README.md": "templates/backend/README.md",
    ".gitignore": "templates/ignore",
};

impl Template {
    /// Whether its projects are built against a clone of retort.
    pub fn needs_clone(self) -> bool {
        matches!(self, Self::Rust | Self::Backend)
    }

    fn files(self) -> &'static [TemplateFile] {
        match self {
            Self::Rust => RUST,
            Self::C => C,
            Self::Cpp => CPP,
            Self::Backend => BACKEND,
        }
    }

    /// The name that the template's plugin has.
    fn placeholder(self) -> &'static str {
        match self {
            Self::Backend => "abacus",
            _ => "hello",
        }
    }
}

/// Makes a project in `dir`, which must not hold anything yet. `clone` is a clone of retort, for those that need one.
///
/// # Errors
/// [`ProjectError`].
pub fn create(
    template: Template,
    name: &str,
    dir: &Path,
    clone: Option<&Path>,
) -> Result<(), ProjectError> {
    let well_formed = name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.bytes().all(|byte| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte)
        });
    if !well_formed {
        return Err(ProjectError::Name(name.to_owned()));
    }
    let clone = match (template.needs_clone(), clone) {
        (false, _) => String::new(),
        (true, None) => return Err(ProjectError::NoClone),
        (true, Some(clone)) => {
            let clone = std::path::absolute(clone).unwrap_or_else(|_| clone.to_owned());
            if !is_clone(&clone) {
                return Err(ProjectError::NotAClone(clone));
            }
            clone.display().to_string()
        }
    };
    if fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some()) || dir.is_file() {
        return Err(ProjectError::Exists(dir.to_owned()));
    }
    for (path, text) in template.files() {
        let path = dir.join(path);
        let write = || {
            fs::create_dir_all(path.parent().unwrap_or(dir))?;
            fs::write(&path, named(template, text, name, &clone))
        };
        write().map_err(|source| ProjectError::Io {
            path: path.clone(),
            source,
        })?;
    }
    Ok(())
}

/// A template's text with the project's name, and the place of its clone.
fn named(template: Template, text: &str, name: &str, clone: &str) -> String {
    let placeholder = template.placeholder();
    let library = |name: &str| format!("retort_{}", name.replace('-', "_"));
    // Both TOML and YAML read this in double quotes.
    let clone = clone.replace('\\', "\\\\").replace('"', "\\\"");
    text.replace(&library(placeholder), &library(name))
        .replace(placeholder, name)
        .replace("{{retort}}", &clone)
}

/// The clone of retort that this program was built in, where it is still there.
pub fn own_clone() -> Option<PathBuf> {
    let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let program = std::env::current_exe().ok();
    built_in
        .into_iter()
        .chain(program.iter().flat_map(|path| path.ancestors()))
        .find(|dir| is_clone(dir))
        .map(Path::to_owned)
}

fn is_clone(dir: &Path) -> bool {
    dir.join("plugins/abi/Cargo.toml").is_file() && dir.join("plugins/engine/Cargo.toml").is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_project_bears_its_name_and_nothing_is_left_to_fill_in() {
        let root = tempfile::tempdir().unwrap();
        for template in [
            Template::Rust,
            Template::C,
            Template::Cpp,
            Template::Backend,
        ] {
            let dir = root.path().join(format!("{template:?}"));
            create(template, "my-own", &dir, own_clone().as_deref()).unwrap();
            for (path, _) in template.files() {
                let text = fs::read_to_string(dir.join(path)).unwrap();
                let foreign = [template.placeholder(), "{{"];
                for word in foreign {
                    assert!(!text.contains(word), "{template:?} {path}: {word}");
                }
            }
            let recipe = fs::read_to_string(dir.join("recipe.yaml")).unwrap();
            assert!(recipe.contains("backend: my-own"), "{recipe}");
            let build = fs::read_to_string(dir.join("Makefile"))
                .or_else(|_| fs::read_to_string(dir.join("Cargo.toml")))
                .unwrap();
            assert!(build.contains("retort_my_own"), "{build}");
        }
    }

    #[test]
    fn a_stage_takes_sixty_lines_at_most() {
        for (files, path) in [(RUST, "src/lib.rs"), (C, "plugin.c"), (CPP, "plugin.cpp")] {
            let (_, text) = files.iter().find(|(to, _)| *to == path).unwrap();
            let lines = text.lines().count();
            assert!(lines <= 60, "{path}: {lines} lines");
        }
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let make = |name: &str, clone: Option<&Path>| {
            create(Template::Rust, name, &root.path().join(name), clone).unwrap_err()
        };
        assert!(matches!(make("Hello", None), ProjectError::Name(_)));
        assert!(matches!(make("../x", None), ProjectError::Name(_)));
        assert!(matches!(make("x", None), ProjectError::NoClone));
        assert!(matches!(
            make("x", Some(root.path())),
            ProjectError::NotAClone(_)
        ));
        fs::write(root.path().join("taken"), "").unwrap();
        let taken = create(Template::C, "x", root.path(), None).unwrap_err();
        assert!(matches!(taken, ProjectError::Exists(_)), "{taken}");
    }
}
