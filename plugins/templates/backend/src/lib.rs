//! abacus: a backend of retort. The engine brings every stage and every network; this crate brings the tensors.
//!
//! Initially tensors are plain vectors in host memory and operations are plain loops: correct, complete and slow. Replace
//! them in `backend.rs` with those of your tensor library, one at a time, and run the test below after each: it checks every
//! operation against the engine's definition.

mod backend;

pub use backend::{Loops, Tensor};

use retort_abi::Device;
use retort_engine::plugin::{EnginePlugin, PluginInfo};

const ABOUT: PluginInfo = PluginInfo {
    name: "abacus",
    version: env!("CARGO_PKG_VERSION"),
    summary: "all stages on plain loops",
    license: env!("CARGO_PKG_LICENSE"),
    devices: &["cpu"],
    dtypes: &["f32"],
    libraries: &[],
};

fn plugin() -> EnginePlugin<Loops> {
    EnginePlugin {
        about: ABOUT,
        open: Loops::open,
        devices: || vec![Device::named("cpu")],
        collective: None,
    }
}

retort_abi::export_plugin!(crate::plugin());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_computes_what_the_engine_means() {
        let backend = Loops::open("cpu", "f32", 1).expect("the CPU opens");
        retort_engine::conformance::verify(&backend);
    }
}
