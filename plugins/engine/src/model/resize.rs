//! Resizing square maps by matrices: torch's `interpolate` in the modes `area` and `bicubic` (a = -0.75,
//! `align_corners=False`, no antialiasing).
//!
//! Both are linear and the same for every map, so one matrix (to^2, from^2) over flattened maps expresses them on any
//! backend and its transpose is their gradient.

/// Each target cell is the mean of the source cells it touches: row-major (to^2, from^2).
pub fn area(from: usize, to: usize) -> Vec<f32> {
    square(&area_axis(from, to), from, to)
}

/// Cubic convolution (Keys 1981) of the four nearest source cells per axis, borders repeated: row-major (to^2, from^2).
pub fn bicubic(from: usize, to: usize) -> Vec<f32> {
    square(&bicubic_axis(from, to), from, to)
}

/// Resizes planes of pixels on the host, like [`bicubic`] but one axis at a time.
pub fn bicubic_planes(planes: &[f32], from: [usize; 2], to: [usize; 2]) -> Vec<f32> {
    let [rows_of, columns_of] = [0, 1].map(|axis| taps(from[axis], to[axis]));
    let (plane, width) = (from[0] * from[1], to[1]);
    let mut out = Vec::with_capacity(planes.len() / plane * to[0] * width);
    let mut rows = vec![0.0; from[0] * width];
    for plane in planes.chunks_exact(plane) {
        let lines = plane.chunks_exact(from[1]);
        for (source, row) in lines.zip(rows.chunks_exact_mut(width)) {
            for (x, taps) in row.iter_mut().zip(&columns_of) {
                *x = taps.iter().map(|&(at, w)| w * f64::from(source[at])).sum();
            }
        }
        for taps in &rows_of {
            out.extend((0..width).map(|column| {
                let sum = taps.iter().map(|&(at, w)| w * rows[at * width + column]);
                sum.sum::<f64>() as f32
            }));
        }
    }
    out
}

/// The few source cells of each target cell of an axis, with their weights.
fn taps(from: usize, to: usize) -> Vec<Vec<(usize, f64)>> {
    let axis = bicubic_axis(from, to);
    let cells = |row: &[f64]| {
        let cells = row.iter().copied().enumerate();
        cells.filter(|&(_, weight)| weight != 0.0).collect()
    };
    axis.chunks_exact(from).map(cells).collect()
}

/// (to, from): cell i covers floor(i from / to) .. ceil((i + 1) from / to).
fn area_axis(from: usize, to: usize) -> Vec<f64> {
    let mut matrix = vec![0.0; to * from];
    for (i, row) in matrix.chunks_exact_mut(from).enumerate() {
        let covered = i * from / to..((i + 1) * from).div_ceil(to);
        let share = 1.0 / covered.len() as f64;
        row[covered].fill(share);
    }
    matrix
}

fn bicubic_axis(from: usize, to: usize) -> Vec<f64> {
    const A: f64 = -0.75;
    let kernel = |x: f64| match x.abs() {
        x if x <= 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        x if x < 2.0 => ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A,
        _ => 0.0,
    };
    let mut matrix = vec![0.0; to * from];
    for (i, row) in matrix.chunks_exact_mut(from).enumerate() {
        let at = (i as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        let base = at.floor();
        for tap in -1..=2 {
            let cell = base + f64::from(tap);
            row[cell.clamp(0.0, (from - 1) as f64) as usize] += kernel(at - cell);
        }
    }
    matrix
}

/// The matrix of both axes from that of one: the Kronecker product with itself.
fn square(axis: &[f64], from: usize, to: usize) -> Vec<f32> {
    let mut matrix = Vec::with_capacity(to * to * from * from);
    for target in 0..to * to {
        let (rows, columns) = (
            &axis[target / to * from..][..from],
            &axis[target % to * from..][..from],
        );
        matrix.extend(
            rows.iter()
                .flat_map(|r| columns.iter().map(move |c| (r * c) as f32)),
        );
    }
    matrix
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn area_means_what_a_cell_touches() {
        assert_eq!(area_axis(4, 2), [0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5]);
        // Cells overlap if the sizes do not divide.
        assert_eq!(area_axis(3, 2), [0.5, 0.5, 0.0, 0.0, 0.5, 0.5]);
        assert_eq!(area(2, 1), [0.25; 4]);
    }

    #[test]
    fn planes_are_resized_as_by_the_matrix() {
        let planes: Vec<f32> = (0..2 * 36).map(|i| (i * 7 % 11) as f32).collect();
        for to in [4, 6, 9] {
            let matrix = bicubic(6, to);
            let found = bicubic_planes(&planes, [6, 6], [to, to]);
            assert_eq!(found.len(), 2 * to * to);
            for (plane, found) in planes.chunks_exact(36).zip(found.chunks_exact(to * to)) {
                for (row, x) in matrix.chunks_exact(36).zip(found) {
                    let sum: f32 = row.iter().zip(plane).map(|(a, b)| a * b).sum();
                    assert!((sum - x).abs() < 1e-4, "{to}: {sum} and {x}");
                }
            }
        }
    }

    #[test]
    fn height_and_width_change_apart() {
        // Equal rows stay equal at any height, and equal those of a square.
        let row: Vec<f32> = (0..6).map(|i| (i * 7 % 11) as f32).collect();
        let wide = bicubic_planes(&row.repeat(4), [4, 6], [3, 9]);
        let square = bicubic_planes(&row.repeat(6), [6, 6], [9, 9]);
        assert_eq!(wide.len(), 27);
        for (a, b) in wide.iter().zip(&square) {
            assert!((a - b).abs() < 1e-5, "{a} and {b}");
        }
        // The same with height and width exchanged.
        let transposed: Vec<f32> = (0..24).map(|i| row[i / 4]).collect();
        let tall = bicubic_planes(&transposed, [6, 4], [9, 3]);
        for (i, b) in tall.iter().enumerate() {
            assert!((wide[i / 3] - b).abs() < 1e-5, "{i}");
        }
    }

    #[test]
    fn bicubic_keeps_what_it_must() {
        // The same size is the identity; rows sum to 1 at any size, so constants are preserved.
        assert_eq!(
            bicubic_axis(3, 3),
            [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
        );
        for (from, to) in [(1, 4), (2, 4), (3, 16), (13, 16)] {
            for row in bicubic(from, to).chunks_exact(from * from) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
            }
        }
        // Target cell 3 of 8 lies at 1.25 of 4.
        let middle = &bicubic_axis(4, 8)[3 * 4..][..4];
        let quarter = [-0.10546875, 0.87890625, 0.26171875, -0.03515625];
        assert!(
            middle
                .iter()
                .zip(quarter)
                .all(|(a, b)| (a - b).abs() < 1e-12),
            "{middle:?}"
        );
    }
}
