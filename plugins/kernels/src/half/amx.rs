//! The matrix units. Their instructions are spelled out: the compiler's functions for them are not stable, and it uses no tile
//! itself.

use std::arch::asm;
use std::sync::OnceLock;

use super::{Line, Rows, SIDE};

/// Whether the processor has them and Linux lets this process use them.
pub fn permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        let leaf = std::arch::x86_64::__cpuid_count(7, 0);
        // Tiles, and products of bf16 in them.
        let has = leaf.edx & (1 << 24) != 0 && leaf.edx & (1 << 22) != 0;
        has && granted()
    })
}

/// Asks Linux for the permission.
#[cfg(target_os = "linux")]
fn granted() -> bool {
    const REQUEST: libc::c_long = 0x1023;
    const TILES: libc::c_long = 18;
    // SAFETY: the call only asks for a permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILES) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn granted() -> bool {
    false
}

/// Tiles of 16 lines on this thread, for as long as this value lives.
pub struct Tiles;

#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    lines: [u8; 16],
}

static SHAPES: Shapes = {
    let (mut bytes, mut lines, mut i) = ([0; 16], [0; 16], 0);
    while i < 8 {
        bytes[i] = 64;
        lines[i] = 16;
        i += 1;
    }
    Shapes {
        palette: 1,
        start: 0,
        reserved: [0; 14],
        bytes,
        lines,
    }
};

impl Tiles {
    pub fn new() -> Self {
        assert!(permitted());
        // SAFETY: the processor has tiles.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const SHAPES, options(nostack, preserves_flags))
        }
        Self
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) }
    }
}

/// A block of the result in four tiles: a sum of products of `steps` tiles of both operands, one after the other in memory.
///
/// # Safety
/// As of the pairs' block, and tiles are configured.
pub unsafe fn block(
    a: [*const Line; 2],
    b: [*const Line; 2],
    steps: usize,
    from: Option<Rows<*const f32>>,
    to: Rows<*mut f32>,
) {
    // SAFETY: rows and columns are those of a block, and the tiles are there.
    unsafe {
        match from {
            None => zero(),
            Some((from, row)) => {
                let below = from.add(SIDE * row);
                asm!(
                    "tileloadd tmm0, [{above} + {row}]",
                    "tileloadd tmm1, [{above} + {row} + 64]",
                    "tileloadd tmm2, [{below} + {row}]",
                    "tileloadd tmm3, [{below} + {row} + 64]",
                    above = in(reg) from, below = in(reg) below, row = in(reg) 4 * row,
                    options(nostack, preserves_flags)
                );
            }
        }
        for step in 0..steps {
            let tile = |x: *const Line| x.add(step * SIDE);
            multiply((a.map(tile), 1), (b.map(tile), 1));
        }
        store(to);
    }
}

/// Clears the tiles of a block.
///
/// # Safety
/// Tiles are configured.
#[inline(always)]
pub unsafe fn zero() {
    // SAFETY: no memory is touched.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            options(nomem, nostack, preserves_flags)
        );
    }
}

/// Adds the product of two tiles of each operand to the tiles of a block; an operand's rows are as many lines apart.
///
/// # Safety
/// The 16 rows of each can be read; tiles are configured.
#[inline(always)]
pub unsafe fn multiply<A, B>(a: Rows<[*const A; 2]>, b: Rows<[*const B; 2]>) {
    let (a, a_row) = (a.0, a.1 * size_of::<A>());
    let (b, b_row) = (b.0, b.1 * size_of::<B>());
    // SAFETY: the caller has made sure.
    unsafe {
        asm!(
            "tileloadd tmm4, [{a0} + {a_row}]",
            "tileloadd tmm6, [{b0} + {b_row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {b_row}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {a_row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            a0 = in(reg) a[0], a1 = in(reg) a[1], a_row = in(reg) a_row,
            b0 = in(reg) b[0], b1 = in(reg) b[1], b_row = in(reg) b_row,
            options(readonly, nostack, preserves_flags)
        );
    }
}

/// The same for operands in two parts each, first and remainder, without the product of both remainders.
///
/// # Safety
/// As of [`multiply`], for both parts.
#[inline(always)]
pub unsafe fn multiply_twice<A, B>(a: Rows<[[*const A; 2]; 2]>, b: Rows<[[*const B; 2]; 2]>) {
    let (a, a_row) = (a.0, a.1 * size_of::<A>());
    let (b, b_row) = (b.0, b.1 * size_of::<B>());
    // SAFETY: the caller has made sure.
    unsafe {
        asm!(
            "tileloadd tmm4, [{a0} + {a_row}]",
            "tileloadd tmm6, [{r0} + {b_row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{r1} + {b_row}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {a_row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm6, [{b0} + {b_row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {b_row}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm4, [{s0} + {a_row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{s1} + {a_row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            a0 = in(reg) a[0][0], a1 = in(reg) a[0][1], s0 = in(reg) a[1][0], s1 = in(reg) a[1][1],
            b0 = in(reg) b[0][0], b1 = in(reg) b[0][1], r0 = in(reg) b[1][0], r1 = in(reg) b[1][1],
            a_row = in(reg) a_row, b_row = in(reg) b_row,
            options(readonly, nostack, preserves_flags)
        );
    }
}

/// Writes a block.
///
/// # Safety
/// Its rows and columns can be written; tiles are configured.
#[inline(always)]
pub unsafe fn store((to, row): Rows<*mut f32>) {
    // SAFETY: the caller has made sure.
    unsafe {
        let below = to.add(SIDE * row);
        asm!(
            "tilestored [{above} + {row}], tmm0",
            "tilestored [{above} + {row} + 64], tmm1",
            "tilestored [{below} + {row}], tmm2",
            "tilestored [{below} + {row} + 64], tmm3",
            above = in(reg) to, below = in(reg) below, row = in(reg) 4 * row,
            options(nostack, preserves_flags)
        );
    }
}
