//! The plugin: all stages of the engine on libtorch.

use retort_abi::Device;
use retort_engine::plugin::{About, EnginePlugin, processor};

use crate::{Libtorch, cuda};

const ABOUT: About = About {
    name: "libtorch",
    version: env!("CARGO_PKG_VERSION"),
    summary: "all stages on libtorch, on CPUs and CUDA GPUs",
    license: env!("CARGO_PKG_LICENSE"),
    devices: if cfg!(with_cuda) {
        &["cpu", "cuda"]
    } else {
        &["cpu"]
    },
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
    }
}

fn devices() -> Vec<Device> {
    let device = |name: String, model, unusable| Device {
        name,
        model,
        memory: None,
        unusable,
    };
    let mut found = vec![device("cpu".into(), processor(), None)];
    match cuda::devices() {
        Ok(count) => {
            found.extend((0..count).map(|i| device(format!("cuda:{i}"), String::new(), None)));
        }
        Err(why) => found.push(device("cuda:0".into(), String::new(), Some(why.to_owned()))),
    }
    found
}

retort_abi::export_plugin!(crate::plugin::plugin());
