//! New plugin projects: a few files that build, install and run at once.
//!
//! In: a name, a template and, for Rust, the sources of retort. Out: a directory. The files come from `plugins/templates`,
//! which the workspace builds and tests under the names `hello` and `abacus`; a new project's name replaces those.
//! Deliberately absent: building (the project's `cargo` or `make`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The template of a project.
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

/// Why a project could not be created.
#[derive(Debug, thiserror::Error)]
pub enum ProjectError {
    /// A name that recipes could not use.
    #[error("`{0}` is not a valid plugin name")]
    Name(String),
    /// The directory is not empty.
    #[error("{} exists and is not empty", .0.display())]
    Exists(PathBuf),
    /// The given path or URL is not the sources of retort.
    #[error("{} does not hold the sources of retort: it has no plugins/abi/Cargo.toml", .0.display())]
    NotSources(PathBuf),
    /// Rust projects need the sources.
    #[error(
        "a plugin in Rust is built against the sources of retort, and where they are is not known"
    )]
    NoSources,
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
            Self::NotSources(_) | Self::NoSources => {
                Some("--retort names a clone of the repository of retort, or its URL for git")
            }
            Self::Io { .. } => None,
        }
    }
}

/// The sources of retort, for projects in Rust.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sources {
    /// In a directory.
    Dir(PathBuf),
    /// In a git repository, for cargo to fetch.
    Git(String),
}

impl Sources {
    /// Parses a user's text: in the form of a URL (`https://host/retort`, `user@host:retort.git`) it is one, otherwise a
    /// directory.
    pub fn parse(text: &str) -> Self {
        let is_url = text.contains("://")
            || text
                .split_once(':')
                .is_some_and(|(host, _)| host.contains('@'));
        match is_url {
            true => Self::Git(text.to_owned()),
            false => Self::Dir(text.into()),
        }
    }

    /// The value of a dependency on a crate of the repository, in TOML.
    fn dependency(&self, krate: &str) -> String {
        let quoted =
            |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        match self {
            Self::Dir(dir) => {
                let path = dir.join("plugins").join(krate);
                format!("{{ path = {} }}", quoted(&path.display().to_string()))
            }
            // Cargo finds the crate in the repository by its name. It takes no short form `user@host:path`.
            Self::Git(url) => {
                let url = match url.split_once(':') {
                    Some((host, path)) if !url.contains("://") => format!("ssh://{host}/{path}"),
                    _ => url.clone(),
                };
                format!("{{ git = {} }}", quoted(&url))
            }
        }
    }
}

/// A file of a template: its path and content.
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
    "patterns.csv": "templates/backend/patterns.csv",
    "recipe.yaml": "templates/backend/recipe.yaml",
    "README.md": "templates/backend/README.md",
    ".gitignore": "templates/ignore",
};

impl Template {
    /// Whether its projects are built against the sources of retort.
    pub fn needs_sources(self) -> bool {
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

/// Creates a project in `dir`, which must be empty. Projects in Rust need the sources of retort.
///
/// # Errors
/// [`ProjectError`].
pub fn create(
    template: Template,
    name: &str,
    dir: &Path,
    sources: Option<&Sources>,
) -> Result<(), ProjectError> {
    let well_formed = name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.bytes().all(|byte| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte)
        });
    if !well_formed {
        return Err(ProjectError::Name(name.to_owned()));
    }
    let sources = match sources.filter(|_| template.needs_sources()) {
        None if template.needs_sources() => return Err(ProjectError::NoSources),
        Some(Sources::Dir(given)) => {
            let given = std::path::absolute(given).unwrap_or_else(|_| given.clone());
            if !holds_sources(&given) {
                return Err(ProjectError::NotSources(given));
            }
            Some(Sources::Dir(given))
        }
        other => other.cloned(),
    };
    if fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some()) || dir.is_file() {
        return Err(ProjectError::Exists(dir.to_owned()));
    }
    for (path, text) in template.files() {
        let path = dir.join(path);
        let write = || {
            fs::create_dir_all(path.parent().unwrap_or(dir))?;
            fs::write(&path, named(template, text, name, sources.as_ref()))
        };
        write().map_err(|source| ProjectError::Io {
            path: path.clone(),
            source,
        })?;
    }
    Ok(())
}

/// A template's text with the project's name and its dependencies filled in.
fn named(template: Template, text: &str, name: &str, sources: Option<&Sources>) -> String {
    let placeholder = template.placeholder();
    let library = |name: &str| format!("retort_{}", name.replace('-', "_"));
    let mut text = text
        .replace(&library(placeholder), &library(name))
        .replace(placeholder, name);
    for krate in ["abi", "engine"] {
        if let Some(sources) = sources {
            text = text.replace(&format!("{{{{{krate}}}}}"), &sources.dependency(krate));
        }
    }
    text
}

/// The sources that this program was built from, if they still exist.
pub fn own_sources() -> Option<Sources> {
    let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let program = std::env::current_exe().ok();
    built_in
        .into_iter()
        .chain(program.iter().flat_map(|path| path.ancestors()))
        .find(|dir| holds_sources(dir))
        .map(|dir| Sources::Dir(dir.to_owned()))
}

fn holds_sources(dir: &Path) -> bool {
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
            create(template, "my-own", &dir, own_sources().as_ref()).unwrap();
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
        let make = |name: &str, sources: Option<Sources>| {
            let dir = root.path().join(name);
            create(Template::Rust, name, &dir, sources.as_ref()).unwrap_err()
        };
        assert!(matches!(make("Hello", None), ProjectError::Name(_)));
        assert!(matches!(make("../x", None), ProjectError::Name(_)));
        assert!(matches!(make("x", None), ProjectError::NoSources));
        assert!(matches!(
            make("x", Some(Sources::Dir(root.path().to_owned()))),
            ProjectError::NotSources(_)
        ));
        fs::write(root.path().join("taken"), "").unwrap();
        let taken = create(Template::C, "x", root.path(), None).unwrap_err();
        assert!(matches!(taken, ProjectError::Exists(_)), "{taken}");
    }

    #[test]
    fn sources_are_a_directory_or_a_repository() {
        let root = tempfile::tempdir().unwrap();
        for (text, abi) in [
            ("https://host/retort", r#"{ git = "https://host/retort" }"#),
            (
                "git@host:me/retort.git",
                r#"{ git = "ssh://git@host/me/retort.git" }"#,
            ),
            ("/a \"b\"/c", r#"{ path = "/a \"b\"/c/plugins/abi" }"#),
        ] {
            assert_eq!(Sources::parse(text).dependency("abi"), abi);
        }
        let git = Sources::parse("https://host/retort");
        let dir = root.path().join("x");
        create(Template::Backend, "x", &dir, Some(&git)).unwrap();
        let manifest = fs::read_to_string(dir.join("Cargo.toml")).unwrap();
        for krate in ["abi", "engine"] {
            let line = format!("\nretort-{krate} = {{ git = \"https://host/retort\" }}\n");
            assert!(manifest.contains(&line), "{manifest}");
        }
    }
}
