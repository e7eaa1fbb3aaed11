//! The plugin: all stages of the engine on candle.

use retort_abi::Device;
use retort_engine::plugin::{About, EnginePlugin};

use crate::Candle;

const ABOUT: About = About {
    name: "candle",
    version: env!("CARGO_PKG_VERSION"),
    summary: "all stages in pure Rust, on candle with fused CPU kernels",
    license: env!("CARGO_PKG_LICENSE"),
    devices: &["cpu"],
    dtypes: &["f32"],
};

/// What recipes call `candle`.
pub(crate) fn plugin() -> EnginePlugin<Candle> {
    EnginePlugin {
        about: ABOUT,
        open: Candle::open,
        devices,
    }
}

fn devices() -> Vec<Device> {
    let model = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        });
    vec![Device {
        name: "cpu".into(),
        model: model.unwrap_or_default(),
        memory: None,
        unusable: None,
    }]
}

retort_abi::export_plugin!(crate::plugin::plugin());
