//! The plugin: all stages of the engine on libtorch.

use retort_abi::Device;
use retort_engine::plugin::{EnginePlugin, PluginInfo, processor};

use crate::{Libtorch, collective, cuda};

const ABOUT: PluginInfo = PluginInfo {
    name: "libtorch",
    version: env!("CARGO_PKG_VERSION"),
    summary: "all stages on libtorch, on CPUs and CUDA GPUs",
    license: env!("CARGO_PKG_LICENSE"),
    devices: &["cpu", "cuda"],
    dtypes: &["f32", "bf16"],
    libraries: &[concat!(
        "libtorch ",
        env!("RETORT_LIBTORCH_VERSION"),
        " in ",
        env!("RETORT_LIBTORCH_LIB")
    )],
};

/// What recipes call `libtorch`.
pub(crate) fn plugin() -> EnginePlugin<Libtorch> {
    EnginePlugin {
        about: ABOUT,
        open: Libtorch::open,
        devices,
        collective: Some(collective::meet),
    }
}

fn devices() -> Vec<Device> {
    let device = |name: String, model, memory, unusable| Device {
        name,
        model,
        memory,
        unusable,
    };
    let mut found = vec![device("cpu".into(), processor(), None, None)];
    match cuda::devices() {
        Ok(gpus) => found.extend(gpus.iter().enumerate().map(|(i, gpu)| {
            let model = gpu.model.clone();
            device(format!("cuda:{i}"), model, Some(gpu.memory), None)
        })),
        Err(why) => {
            let why = Some(why.to_owned());
            found.push(device("cuda:0".into(), String::new(), None, why));
        }
    }
    found
}

retort_abi::export_plugin!(crate::plugin::plugin());
