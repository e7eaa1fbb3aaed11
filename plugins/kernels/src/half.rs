//! Products in bf16 with sums in f32, by the matrix units of a processor (AMX) or its inner products of pairs (AVX-512 BF16).
//!
//! Operands are copied into tiles first, and rounded on the way if they are f32. Two neighbours along the dimension that is
//! summed share a word. The order of summation depends on nothing but the size of that dimension and the unit, so a row of a
//! product is the same whatever the number of rows and threads.

#[cfg(target_arch = "x86_64")]
mod amx;
mod packed;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod product;
#[cfg(target_arch = "x86_64")]
mod vectors;
pub mod windows;

pub use packed::{Element, Packed, Side};
pub use product::{Start, product};

/// How a processor multiplies numbers in bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// By tiles: AMX.
    Tiles,
    /// By inner products of pairs: AVX-512 BF16.
    Pairs,
}

impl Unit {
    /// The fastest that this processor has.
    pub fn best() -> Option<Self> {
        static BEST: std::sync::OnceLock<Option<Unit>> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| {
            [Self::Tiles, Self::Pairs]
                .into_iter()
                .find(|unit| unit.exists())
        })
    }

    /// Whether this processor has it, and the system lets the process use it. Operands are packed by AVX-512 either way.
    #[cfg(target_arch = "x86_64")]
    pub fn exists(self) -> bool {
        let has_pairs =
            crate::lanes::has_512_bits() && std::arch::is_x86_feature_detected!("avx512bf16");
        has_pairs && (self == Self::Pairs || amx::permitted())
    }

    /// Whether this processor has it, and the system lets the process use it.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn exists(self) -> bool {
        false
    }
}

/// Rows and columns of a tile of the result.
const SIDE: usize = 16;

/// Rows and columns of a block of the result: two tiles each way.
pub const BLOCK: usize = 2 * SIDE;

/// Inner elements of a tile.
const DEPTH: usize = 32;

/// A row of a tile: 16 pairs, a line of the processor's cache.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; SIDE]);

/// Rows of a result in memory: the first, and the elements from one to the next.
type Rows<P> = (P, usize);
