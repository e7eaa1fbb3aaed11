//! The kernels by name, with their parameters in order. A test compares these with the compiled source.
#![expect(non_upper_case_globals, reason = "the kernels' own names")]

use std::marker::PhantomData;

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchArgs, PushKernelArg};

use crate::cuda::structures::{Adamw, Flow, Heads, PoolWindow, Steps, StridedDims, VisibleKeys};

/// The kernels, for the driver to compile.
pub const SOURCE: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// A kernel that takes arguments of these types.
pub struct Kernel<A> {
    /// Its name in the source.
    pub name: &'static str,
    takes: PhantomData<fn(A)>,
}

impl<A> Clone for Kernel<A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for Kernel<A> {}

/// A kernel's arguments, in order.
pub trait Arguments {
    /// Their types, as PTX writes them.
    #[cfg(test)]
    const TYPES: &[fn() -> String];

    /// Hands them to a launch.
    fn push<'a>(&'a self, launch: &mut LaunchArgs<'a>);
}

/// An address in the device's memory.
type Address = u64;

/// A type that kernels take by value.
pub trait Argument: DeviceRepr + Sized {
    /// The type as PTX writes it: `u32`, or a structure of so many bytes (`b8[40]`).
    #[cfg(test)]
    fn ptx() -> String {
        format!("b8[{}]", size_of::<Self>())
    }
}

macro_rules! plain {
    ($($kind:ty: $ptx:literal),*) => {
        $(impl Argument for $kind {
            #[cfg(test)]
            fn ptx() -> String {
                $ptx.to_owned()
            }
        })*
    };
}
plain!(u32: "u32", i32: "u32", u64: "u64", f32: "f32", f64: "f64");

impl Argument for StridedDims {}
impl Argument for Steps {}
impl Argument for Heads {}
impl Argument for VisibleKeys {}
impl Argument for PoolWindow {}
impl Argument for Adamw {}
impl Argument for Flow {}

macro_rules! arguments {
    ($($kind:ident)*) => {
        impl<$($kind: Argument),*> Arguments for ($($kind,)*) {
            #[cfg(test)]
            const TYPES: &[fn() -> String] = &[$($kind::ptx),*];

            #[expect(non_snake_case, reason = "a variable for each type")]
            fn push<'a>(&'a self, launch: &mut LaunchArgs<'a>) {
                let ($($kind,)*) = self;
                $(launch.arg($kind);)*
            }
        }
    };
}
arguments!(A B C);
arguments!(A B C D);
arguments!(A B C D E);
arguments!(A B C D E F);
arguments!(A B C D E F G);
arguments!(A B C D E F G H);
arguments!(A B C D E F G H I);
arguments!(A B C D E F G H I J);
arguments!(A B C D E F G H I J K L);
arguments!(A B C D E F G H I J K L M N O P);
arguments!(A B C D E F G H I J K L M N O P Q R);

/// Declares kernels, grouped by their parameters.
macro_rules! kernels {
    ($($takes:ty: $($name:ident),*;)*) => {
        $($(
            pub const $name: Kernel<$takes> = Kernel {
                name: stringify!($name),
                takes: PhantomData,
            };
        )*)*

        /// Name and types of each.
        #[cfg(test)]
        const DECLARED: &[(&str, &[fn() -> String])] = &[
            $($((stringify!($name), <$takes as Arguments>::TYPES),)*)*
        ];
    };
}

kernels! {
    (u32, StridedDims, Address, Address):
        copy_f32_f32, copy_four_f32_f32, copy_f32_bf16, copy_four_f32_bf16, copy_f32_f16, copy_four_f32_f16,
        copy_bf16_f32, copy_four_bf16_f32, copy_bf16_bf16, copy_four_bf16_bf16, copy_u32_u32,
        copy_four_u32_u32;
    (u32, f32, Address): fill_f32, fill_bf16;
    (u32, i32, Address, Address): unary_f32, unary_bf16, unary_four_f32, unary_four_bf16;
    (u32, i32, Address, Address, Address, Address): unary_backward_one, unary_backward_four;
    (u32, i32, StridedDims, Address, Address, Address): binary_one, binary_four;
    (u32, u32, u32, Address, Address, Address, Address, Address): gated_add_one, gated_add_four;
    (u32, f32, f32, Address, Address): affine;
    (u32, u32, Address, Address): swiglu_f32, swiglu_bf16;
    (u32, u32, Address, Address, Address): swiglu_backward;
    (u32, StridedDims, StridedDims, Address, Address): sum;
    (u32, u32, StridedDims, StridedDims, Address, Address): sum_few;
    (u32, u32, u32, u32, Address, Address, Address): sum_columns;
    (u32, Address, Address): max_last, argmax_last;
    (u32, u32, u32, Address, Address, Address): rows_f32, rows_bf16;
    (u32, u32, u32, u32, Address, Address, Address): rows_adjoint;
    (u32, u32, Address, Address, Address): pick, pick_adjoint;
    (u32, Address, Address): softmax;
    (u32, Address, Address, Address): softmax_backward, cross_entropy;
    (u32, Address, Address, Address, Address): cross_entropy_backward;
    (u32, u32, f32, Address, Address, Address): rms_norm_short_f32, rms_norm_short_bf16, rms_norm_f32, rms_norm_bf16;
    (u32, u32, f32, Address, Address, Address, Address, Address): rms_norm_backward, rms_norm_short_backward;
    (u32, u32, u32, f32, i32, Address, Address, Address, Address): group_norm;
    (u32, u32, f32, Address, Address, Address, Address):
        modulated_norm_one_f32, modulated_norm_one_bf16, modulated_norm_four_f32, modulated_norm_four_bf16;
    (u32, u32, f32, Address, Address, Address, Address, Address):
        modulated_norm_backward_one, modulated_norm_backward_four;
    (u32, u32, u32, u32, Address, Address, Address, Address): sum_modulation;
    (u32, u32, u32, Address, Address, Address): unit_f32, unit_bf16;
    (u32, u32, u32, Address, Address, Address, Address, Address): unit_backward;
    (u32, u32, u32, f32, Address, Address, Address, Address, Address): group_norm_backward;
    (u32, PoolWindow, Address, Address): unfold_one_f32, unfold_four_f32, unfold_one_f16, unfold_eight_f16, unfold_3x3_f16;
    (u32, u32, u32, Address, Address, Address): plus_one, plus_four;
    (u32, PoolWindow, Address, Address): fold, max_pool;
    (u32, PoolWindow, Address, Address, Address): max_pool_backward;
    (u32, u32, u32, u32, Steps, Address, Address, Address, Address): rope;
    (u32, u32, u32, u32, Steps, Steps, Steps, Steps, Steps, Address, Address, Address, Address, Address, Address, Address, Address, Address):
        rope_cached_f32, rope_cached_bf16;
    (u32, u32, u32, u32, f32, i32, Steps, Address, Address, Address): weights;
    (u32, u32, f32, Address, Address, Address): weights_backward;
    (u32, u32, u32, u32, f32, i32, Steps, Steps, Steps, Steps, Address, Address, Address, Address, Address, Address):
        attend_f32, attend_bf16;
    (u32, VisibleKeys, Address): mask_kinds;
    (u32, u32, f32, Heads, Heads, Heads, VisibleKeys, Address): attention_32, attention_64, attention_128;
    (u32, u32, f32, Heads, Heads, Heads, Heads, Heads, VisibleKeys, Address, Address, Address):
        attention_dq_32, attention_dq_64, attention_dq_128;
    (u32, u32, f32, Heads, Heads, Heads, Heads, VisibleKeys, Address, Address, Address, Address):
        attention_dkv_32, attention_dkv_64, attention_dkv_128;
    (u32, Adamw, Address, Address, Address, Address): adamw;
    (u32, f32, f32, Address, Address): ema;
    (u32, f32, u32, f64, Address, Address): truncate;
    (u32, Address, Address, Address): categorical;
    (u32, Address, Address): spread_parts;
    (u32, u32, Address, Address, Address): spread_steps;
    (u32, u32, Flow, Address, Address, Address, Address, Address, Address, Address):
        flow_4, flow_together_4, flow_8, flow_together_8, flow_16, flow_together_16, flow_32,
        flow_together_32;
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// The entries of PTX, each with the types of its parameters.
    fn compiled() -> BTreeMap<&'static str, Vec<String>> {
        let entries = SOURCE.split(".visible .entry ").skip(1);
        entries
            .map(|entry| {
                let (name, rest) = entry.split_once('(').expect("parameters");
                let (list, _) = rest.split_once(')').expect("the end of the parameters");
                let kinds = list.split(".param ").skip(1).map(|parameter| {
                    // `.u64 name_param_0,` or `.align 8 .b8 name_param_1[168],`
                    let parameter = parameter.trim().trim_end_matches(',');
                    let (kind, name) = parameter.rsplit_once(' ').expect("a type and a name");
                    let kind = kind.rsplit('.').next().expect("a type");
                    let count = name.find('[').map_or("", |at| &name[at..]);
                    format!("{kind}{count}")
                });
                (name.trim(), kinds.collect())
            })
            .collect()
    }

    #[test]
    fn each_takes_what_its_source_says() {
        let compiled = compiled();
        let declared: BTreeMap<_, Vec<String>> = DECLARED
            .iter()
            .map(|(name, kinds)| (*name, kinds.iter().map(|kind| kind()).collect()))
            .collect();
        assert_eq!(declared.len(), DECLARED.len(), "a kernel is declared twice");
        assert_eq!(declared, compiled);
    }
}
