//! Products of matrices that fit into the cache.

/// Width of the narrowest tile: the columns of a right operand are a multiple of it.
pub const TILE: usize = 8;

/// The left operand of a small product: element (i, p) at i * row + p * column.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    data: &'a [f32],
    row: usize,
    column: usize,
}

impl<'a> Operand<'a> {
    /// Rows of `width` elements.
    #[inline(always)]
    pub fn rows(data: &'a [f32], width: usize) -> Self {
        Self {
            data,
            row: width,
            column: 1,
        }
    }

    /// The transposed matrix.
    #[inline(always)]
    pub fn transposed(data: &'a [f32], width: usize) -> Self {
        Self {
            data,
            row: 1,
            column: width,
        }
    }
}

/// c (m, n) = or += a (m, k) b (k, n), n a multiple of [`TILE`]; small enough for the cache, so nothing is packed.
#[inline(always)]
pub fn tiles<const GROW: bool>(
    c: &mut [f32],
    c_row: usize,
    a: Operand<'_>,
    b: &[f32],
    b_row: usize,
    (m, n, k): (usize, usize, usize),
) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!(
        n % TILE == 0
            && (m - 1) * c_row + n <= c.len()
            && (m - 1) * a.row + (k - 1) * a.column < a.data.len()
            && (k - 1) * b_row + n <= b.len(),
        "a small product beyond its operands"
    );
    let mut j = 0;
    while j < n {
        let wide = n - j >= 2 * TILE;
        let mut i = 0;
        while i < m {
            let high = m - i >= 4;
            // SAFETY: rows i.. and columns j.. of this tile lie within (m, n), which the assertion keeps inside the slices.
            unsafe {
                let c = c.as_mut_ptr().add(i * c_row + j);
                let a = (a.data.as_ptr().add(i * a.row), a.row, a.column);
                let b = b.as_ptr().add(j);
                match (high, wide) {
                    (true, true) => tile::<4, 16, GROW>(c, c_row, a, b, b_row, k),
                    (true, false) => tile::<4, 8, GROW>(c, c_row, a, b, b_row, k),
                    (false, true) => tile::<1, 16, GROW>(c, c_row, a, b, b_row, k),
                    (false, false) => tile::<1, 8, GROW>(c, c_row, a, b, b_row, k),
                }
            }
            i += if high { 4 } else { 1 };
        }
        j += if wide { 2 * TILE } else { TILE };
    }
}

/// R rows and W columns of a product, summed in registers.
///
/// # Safety
/// For all r < R and p < k: `c + r c_row` is valid for reads and writes of W elements, `a + r row + p column` for a read
/// of one and `b + p b_row` for reads of W.
#[inline(always)]
unsafe fn tile<const R: usize, const W: usize, const GROW: bool>(
    c: *mut f32,
    c_row: usize,
    (a, row, column): (*const f32, usize, usize),
    b: *const f32,
    b_row: usize,
    k: usize,
) {
    let mut total = [[0.0f32; W]; R];
    for p in 0..k {
        // SAFETY: p < k, and an array of f32 has the alignment of f32; see above.
        let b = unsafe { &*b.add(p * b_row).cast::<[f32; W]>() };
        for (r, total) in total.iter_mut().enumerate() {
            // SAFETY: r < R and p < k; see above.
            let a = unsafe { *a.add(r * row + p * column) };
            for w in 0..W {
                total[w] = a.mul_add(b[w], total[w]);
            }
        }
    }
    for (r, total) in total.iter().enumerate() {
        // SAFETY: r < R; see above.
        let c = unsafe { &mut *c.add(r * c_row).cast::<[f32; W]>() };
        for w in 0..W {
            c[w] = if GROW { c[w] + total[w] } else { total[w] };
        }
    }
}
