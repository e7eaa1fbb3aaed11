//! The plugin: all stages of the engine on candle.

use retort_abi::Device;
use retort_engine::plugin::{EnginePlugin, PluginInfo, processor};

use crate::Candle;

const ABOUT: PluginInfo = PluginInfo {
    name: "candle",
    version: env!("CARGO_PKG_VERSION"),
    summary: "all stages in pure Rust, on candle with fused CPU kernels",
    license: env!("CARGO_PKG_LICENSE"),
    devices: &["cpu"],
    dtypes: &["f32", "bf16"],
    libraries: &[],
};

/// What recipes call `candle`.
pub(crate) fn plugin() -> EnginePlugin<Candle> {
    EnginePlugin {
        about: ABOUT,
        open: Candle::open,
        devices,
        collective: None,
    }
}

fn devices() -> Vec<Device> {
    vec![Device {
        name: "cpu".into(),
        model: processor(),
        memory: None,
        unusable: None,
    }]
}

retort_abi::export_plugin!(crate::plugin::plugin());
