//! The recipe of a sweep, and the plans of its points.

use std::path::PathBuf;

use crate::cli::{Error, SelectionArgs};
use crate::cluster::devices;
use crate::plan::Plan;
use crate::plan::decision::{self, Role};
use crate::plugin::Plugins;
use crate::recipe::{self, Recipe};
use crate::settings::Settings;

/// The recipe shared by all points.
pub struct SweepRecipe {
    /// The file, as typed.
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
    /// Where stages run.
    pub placement: Settings,
}

impl SweepRecipe {
    /// From a recipe that has been read.
    pub fn of(recipe: &Recipe, selection: &SelectionArgs, placement: Settings) -> Self {
        let source = &recipe.source;
        Self {
            shown_path: source.path.clone(),
            text: source.text.clone(),
            base_dir: source.base_dir.clone(),
            home: source.home.clone(),
            set: source.set.clone(),
            selection: selection.clone(),
            placement,
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
        let plan = devices::plan(&recipe, plugins, &self.placement)?;
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
