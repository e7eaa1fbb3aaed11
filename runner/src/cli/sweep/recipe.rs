//! The recipe of a sweep, and the plans of its points.

use std::path::PathBuf;

use crate::cli::{Error, SelectionArgs};
use crate::plan::decision::{self, Role};
use crate::plan::{self, Plan};
use crate::plugin::Plugins;
use crate::recipe::{self, Recipe};

/// The recipe that all points have in common.
pub struct SweepRecipe {
    /// The file, as people named it.
    pub shown_path: PathBuf,
    /// Its text.
    pub text: String,
    /// Directory that relative paths start from.
    pub base_dir: PathBuf,
    /// What `~/` stands for.
    pub home: Option<PathBuf>,
    /// The changes of `--set`.
    pub set: Vec<String>,
    /// Which stages.
    pub selection: SelectionArgs,
}

impl SweepRecipe {
    /// Of a recipe that was read.
    pub fn of(recipe: &Recipe, selection: &SelectionArgs) -> Self {
        let source = &recipe.source;
        Self {
            shown_path: source.path.clone(),
            text: source.text.clone(),
            base_dir: source.base_dir.clone(),
            home: source.home.clone(),
            set: source.set.clone(),
            selection: selection.clone(),
        }
    }

    /// The plan of the point with these values.
    pub fn plan(
        &self,
        settings: &[String],
        plugins: &mut Plugins<'_>,
    ) -> Result<(Plan, Vec<Role>), Error> {
        let set = [self.set.as_slice(), settings].concat();
        let mut recipe = recipe::parse(
            &self.shown_path,
            self.base_dir.clone(),
            self.text.clone(),
            &set,
        )?;
        recipe.source.home = self.home.clone();
        let plan = plan::plan(&recipe, plugins)?;
        let selection = &self.selection;
        let roles = decision::select(
            &plan,
            selection.from.as_deref(),
            selection.until.as_deref(),
            &[],
        )?;
        Ok((plan, roles))
    }
}
