//! A build of a plugin, as planning knows it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use retort_abi::{Description, StageKind};

use super::PluginIdentity;
use crate::schema::Checker;

/// A build of a plugin: its identity and its description. The description is large and shared by stages and plans, because a
/// sweep has thousands of them. So are the compiled schemas.
pub struct Build {
    /// Which it is.
    pub identity: PluginIdentity,
    /// What it says of itself.
    pub description: Description,
    /// By stage kind.
    checkers: RefCell<HashMap<String, Rc<Checker>>>,
}

impl Build {
    /// Of what a plugin says.
    pub fn new(identity: PluginIdentity, description: Description) -> Rc<Self> {
        Rc::new(Self {
            identity,
            description,
            checkers: RefCell::default(),
        })
    }

    /// Whether it runs stages on devices of this kind: `cpu`, `cuda`.
    pub(crate) fn drives(&self, kind: &str) -> bool {
        self.description.devices.iter().any(|known| known == kind)
    }

    /// The compiled schema of one of its kinds.
    pub(super) fn checker(&self, kind: &StageKind) -> Rc<Checker> {
        let mut checkers = self.checkers.borrow_mut();
        let ready = checkers
            .entry(kind.kind.clone())
            .or_insert_with(|| Rc::new(Checker::new(&kind.schema)));
        Rc::clone(ready)
    }
}
