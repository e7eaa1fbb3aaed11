//! Where a stage runs: which build of its plugin, on which device.

use std::rc::Rc;

use retort_abi::Device;

use super::{Planner, UnresolvedStage};
use crate::diagnostic::{Cause, Finding};
use crate::plan::prepared::AddedPlace;
use crate::plan::{Build, PlannedStage, PluginIdentity};
use crate::yaml::EntryPart;

/// Where a stage runs.
pub(super) struct DevicePlacement {
    pub(super) build: Rc<Build>,
    pub(super) device: String,
    /// The devices for workers: only this one if the recipe names it, else all that could have been chosen.
    pub(super) devices: Vec<String>,
    /// Whether the plan chose the device.
    pub(super) chosen: bool,
}

impl DevicePlacement {
    fn on(build: &Rc<Build>, device: &str, chosen: bool) -> Self {
        Self {
            build: Rc::clone(build),
            device: device.to_owned(),
            devices: vec![device.to_owned()],
            chosen,
        }
    }

    /// The same, with workers on all usable ones of these.
    fn spread(self, gpus: &[&Device]) -> Self {
        let usable = gpus.iter().filter(|device| device.unusable.is_none());
        Self {
            devices: usable.map(|device| device.name.clone()).collect(),
            ..self
        }
    }
}

/// A device in a recipe.
#[derive(Clone, Copy, PartialEq, Eq)]
enum DeviceRequest<'a> {
    /// `auto`: a usable GPU, else the CPU.
    Auto,
    /// `cpu`
    Cpu,
    /// `cuda`: any usable GPU.
    AnyGpu,
    /// `cuda:1`
    Gpu(&'a str),
}

impl<'a> DeviceRequest<'a> {
    /// None if it is not a device by the recipe's schema.
    fn parse(written: &'a str) -> Option<Self> {
        let kind = written.split(':').next()?;
        match kind {
            "cpu" => Some(Self::Cpu),
            "cuda" if written == kind => Some(Self::AnyGpu),
            "cuda" => Some(Self::Gpu(written)),
            "auto" if written == kind => Some(Self::Auto),
            _ => None,
        }
    }

    /// The kind of device that a build must support.
    fn kind(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Auto | Self::AnyGpu | Self::Gpu(_) => "cuda",
        }
    }

    /// Whether this GPU qualifies.
    fn takes(self, device: &Device) -> bool {
        match self {
            Self::Gpu(name) => device.name == name,
            Self::Auto | Self::AnyGpu => true,
            Self::Cpu => false,
        }
    }
}

impl Planner<'_> {
    /// Chooses the build of the plugin and the device for a stage.
    pub(super) fn place(
        &mut self,
        unresolved: &UnresolvedStage<'_>,
        base: &Rc<Build>,
    ) -> Option<DevicePlacement> {
        let own = unresolved.stage.device.as_deref();
        let shared = self.recipe.device.as_deref();
        let written = own.or(shared).unwrap_or("auto");
        // The schema has reported invalid devices.
        let wanted = DeviceRequest::parse(written)?;
        let pointer = self.setting(unresolved, "device", own.is_some());
        if wanted == DeviceRequest::Cpu && base.drives("cpu") {
            return Some(DevicePlacement::on(base, "cpu", false));
        }
        let mut builds = vec![Rc::clone(base)];
        builds.extend(self.variants_of(&base.identity.name));
        let driving = |kind: &str| builds.iter().find(|build| build.drives(kind));
        let build = match (driving(wanted.kind()), wanted) {
            (Some(build), DeviceRequest::Cpu) => {
                return Some(DevicePlacement::on(build, "cpu", false));
            }
            (Some(build), _) => build,
            (None, DeviceRequest::Auto) => {
                let first = base.description.devices.first();
                return Some(DevicePlacement::on(
                    base,
                    first.map_or("cpu", String::as_str),
                    true,
                ));
            }
            (None, _) => {
                self.report(cannot_drive(wanted, &builds, &pointer), EntryPart::Value);
                return None;
            }
        };
        let kind = unresolved.kind()?.kind.as_str();
        let devices = match self.plugins.devices_elsewhere(kind) {
            Some(devices) => devices,
            None => self.devices_of(&build.identity, &pointer)?,
        };
        let gpus: Vec<&Device> = devices
            .iter()
            .filter(|device| device.name.starts_with("cuda"))
            .collect();
        let usable = |device: &&&Device| device.unusable.is_none() && wanted.takes(device);
        match (gpus.iter().find(usable), wanted) {
            (Some(device), DeviceRequest::Auto) => {
                let named = [device.name.as_str(), device.model.as_str()].join(" ");
                self.note(format!("device `auto` is {}", named.trim_end()));
                Some(DevicePlacement::on(build, &device.name, true).spread(&gpus))
            }
            // In the form `cuda:0`, so that a plan names one device.
            (Some(device), DeviceRequest::AnyGpu) => {
                Some(DevicePlacement::on(build, &device.name, true).spread(&gpus))
            }
            (Some(_), _) => Some(DevicePlacement::on(build, written, false)),
            (None, DeviceRequest::Auto) if let Some(other) = driving("cpu") => {
                let why = gpus.iter().find_map(|device| device.unusable.as_deref());
                if let Some(why) = why {
                    self.note(format!("device `auto` is cpu: no usable GPU ({why})"));
                }
                Some(DevicePlacement::on(other, "cpu", true))
            }
            (None, _) => {
                let found = gpus.iter().find(|device| wanted.takes(device));
                let message = match found.and_then(|device| device.unusable.as_deref()) {
                    Some(why) => format!("device `{written}` cannot be used: {why}"),
                    None => format!("there is no device `{written}` on this machine"),
                };
                let finding = Finding::error(pointer, message);
                let hint = usable_here(driving("cpu").is_some(), &gpus);
                self.report(finding.hint(hint), EntryPart::Value);
                None
            }
        }
    }

    /// Where a stage of this kind runs that is added for another one: on the same device, but on the CPU if jobs of the kind
    /// have no such device. `None` if its plugin needs a GPU.
    pub(super) fn place_added(&mut self, first: &PlannedStage, kind: &str) -> Option<AddedPlace> {
        let has_device = |devices: Vec<Device>| {
            let mut usable = devices.iter().filter(|device| device.unusable.is_none());
            usable.any(|device| device.name == first.device)
        };
        if self.plugins.devices_elsewhere(kind).is_none_or(has_device) {
            return Some(AddedPlace {
                plugin: first.plugin.clone(),
                device: first.device.clone(),
                dtype: first.dtype.clone(),
            });
        }
        let mut builds: Vec<Rc<Build>> = Vec::new();
        builds.extend(self.known.get(&first.plugin.name).cloned().flatten());
        builds.extend(self.variants_of(&first.plugin.name));
        let build = builds.iter().find(|build| build.drives("cpu"))?;
        let dtypes = &build.description.dtypes;
        let dtype = dtypes.iter().find(|dtype| **dtype == first.dtype);
        Some(AddedPlace {
            plugin: build.identity.clone(),
            device: "cpu".to_owned(),
            dtype: dtype.or(dtypes.first()).unwrap_or(&first.dtype).clone(),
        })
    }

    /// The other builds of a plugin; one that does not answer is reported and skipped.
    fn variants_of(&mut self, plugin: &str) -> Vec<Rc<Build>> {
        if let Some(known) = self.variants.get(plugin) {
            return known.clone();
        }
        let mut found = Vec::new();
        for answer in self.plugins.variants(plugin) {
            match answer {
                Ok(variant) => found.push(variant),
                Err(error) => self.note(format!("a variant of `{plugin}` is left out: {error}")),
            }
        }
        self.variants.insert(plugin.to_owned(), found.clone());
        found
    }

    fn devices_of(&mut self, identity: &PluginIdentity, pointer: &str) -> Option<Vec<Device>> {
        if let Some(known) = self.devices.get(&identity.path) {
            return known.clone();
        }
        let answer = match self.plugins.devices(identity) {
            Ok(devices) => Some(devices),
            Err(error) => {
                let finding = Finding::error(pointer, error.message);
                self.report(
                    Finding {
                        cause: Cause::Plugin,
                        hint: error.hint,
                        ..finding
                    },
                    EntryPart::Value,
                );
                None
            }
        };
        self.devices.insert(identity.path.clone(), answer.clone());
        answer
    }
}

fn cannot_drive(wanted: DeviceRequest<'_>, builds: &[Rc<Build>], pointer: &str) -> Finding {
    let plugin = &builds[0].identity.name;
    let message = format!("plugin `{plugin}` cannot drive `{}`", wanted.kind());
    let known = builds.iter().flat_map(|build| &build.description.devices);
    let known: Vec<&str> = known.map(String::as_str).collect();
    let hint = format!("it supports `{}`", known.join("`, `"));
    Finding::error(pointer, message).hint(hint)
}

fn usable_here(cpu: bool, gpus: &[&Device]) -> String {
    let gpus = gpus.iter().filter(|device| device.unusable.is_none());
    let names: Vec<&str> = cpu
        .then_some("cpu")
        .into_iter()
        .chain(gpus.map(|device| device.name.as_str()))
        .collect();
    match names.as_slice() {
        [] => "no usable device here".to_owned(),
        names => format!("usable here: `{}`", names.join("`, `")),
    }
}
