//! Matrices in memory.

/// A matrix: its elements from the first on, and the steps to the next row and column.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a, E = f32> {
    /// Elements.
    pub data: &'a [E],
    /// Step to the next row, in elements.
    pub row: usize,
    /// Step to the next column, in elements.
    pub column: usize,
}

impl<'a, E> Matrix<'a, E> {
    /// A row-major matrix with `width` columns.
    pub fn rows(data: &'a [E], width: usize) -> Self {
        Self {
            data,
            row: width,
            column: 1,
        }
    }

    /// The transposed matrix, in the same memory.
    pub fn turned(self) -> Self {
        Self {
            row: self.column,
            column: self.row,
            ..self
        }
    }

    /// Whether the memory has this many rows and columns, one each at least.
    pub fn holds(&self, rows: usize, columns: usize) -> bool {
        let last = (rows - 1).saturating_mul(self.row);
        last.saturating_add((columns - 1).saturating_mul(self.column)) < self.data.len()
    }
}
