//! Products in bf16, by the processor's units for them ([`retort_kernels::half`]).

use candle_core::DType;
use retort_engine::error::Result;
use retort_kernels::half::{Element, Packed, Side, Start, Unit, product};
use retort_kernels::{Matrix, Rayon};

use crate::layout::{rows, whole};
use crate::tensor::{Tensor, Tiles};
use crate::view::{floats, fresh, halves, tensor};
use crate::{T, failed};

/// A weight matrix (o, i) that never changes, in bf16, if products with it are in bf16 too.
pub fn factor(x: &Tensor) -> Result<Tensor> {
    if !x.half || x.rank() != 2 || Unit::best().is_none() {
        return Ok(x.clone());
    }
    let raw = x.raw.to_dtype(DType::BF16).map_err(failed)?;
    Ok(Tensor::new(raw, true))
}

/// x (.., i) times w (o, i) transposed, plus bias (o).
pub fn linear(unit: Unit, x: &Tensor, w: &Tensor, bias: Option<&T>) -> Result<T> {
    match &w.tiles {
        None => linear_by(unit, x, &turned(&w.raw)?, bias),
        Some(Tiles(tiles)) => {
            if tiles.get().is_none() {
                // Whoever is first sets it; the tiles are the same.
                let _ = tiles.set(turned(&w.raw)?);
            }
            let packed = tiles.get().expect("set above");
            linear_by(unit, x, packed, bias)
        }
    }
}

/// The tiles of a weight (o, i), transposed.
fn turned(w: &T) -> Result<Packed> {
    fn packed<E: Element>(w: &[E], w_row: usize, shape: [usize; 2]) -> Packed {
        Packed::new(&Rayon, Side::Right, Matrix::rows(w, w_row).turned(), shape)
    }
    let w = &rows(w)?;
    let (shape, w_row) = (w.dims2().map_err(failed)?.into(), w.stride()[0]);
    if w.dtype() == DType::BF16 {
        let (guard, layout) = w.storage_and_layout();
        return Ok(packed(halves(&guard, layout)?, w_row, shape));
    }
    floats!(w);
    Ok(packed(w, w_row, shape))
}

fn linear_by(unit: Unit, x: &T, w: &Packed, bias: Option<&T>) -> Result<T> {
    let x = &whole(x)?;
    let mut shape = x.dims().to_vec();
    let (o, i) = (w.outer(), w.inner());
    let n = shape.iter().product::<usize>() / i;
    *shape.last_mut().expect("rank >= 1") = o;
    let bias = bias.map(whole).transpose()?;
    floats!(x);
    let x = Packed::new(&Rayon, Side::Left, Matrix::rows(x, i), [n, i]);
    let mut y = fresh(&[n, o]);
    match &bias {
        None => product(unit, &Rayon, (&mut y, o), &x, w, Start::Zero),
        Some(bias) => {
            floats!(bias);
            product(unit, &Rayon, (&mut y, o), &x, w, Start::Bias(bias));
        }
    }
    tensor(y, &shape)
}

/// Gradients of [`linear`] for its input, given w, and for its weight, given x.
pub fn linear_backward(
    unit: Unit,
    x: Option<&T>,
    w: Option<&T>,
    grad: &T,
) -> Result<(Option<T>, Option<T>)> {
    let grad = &whole(grad)?;
    let mut shape = grad.dims().to_vec();
    let o = shape[shape.len() - 1];
    let n = grad.elem_count() / o;
    floats!(grad);
    let dx = |w: &T| {
        let w = &whole(w)?;
        let i = w.dims2().map_err(failed)?.1;
        *shape.last_mut().expect("rank >= 1") = i;
        floats!(w);
        let g = Packed::new(&Rayon, Side::Left, Matrix::rows(grad, o), [n, o]);
        let w = Packed::new(&Rayon, Side::Right, Matrix::rows(w, i), [i, o]);
        let mut dx = fresh(&[n, i]);
        product(unit, &Rayon, (&mut dx, i), &g, &w, Start::Zero);
        tensor(dx, &shape)
    };
    let dx = w.map(dx).transpose()?;
    let dw = |x: &T| {
        let x = &whole(x)?;
        let i = x.elem_count() / n;
        floats!(x);
        let g = Matrix::rows(grad, o).turned();
        let g = Packed::new(&Rayon, Side::Left, g, [o, n]);
        let x = Packed::new(&Rayon, Side::Right, Matrix::rows(x, i), [i, n]);
        let mut dw = fresh(&[o, i]);
        product(unit, &Rayon, (&mut dw, i), &g, &x, Start::Zero);
        tensor(dw, &[o, i])
    };
    Ok((dx, x.map(dw).transpose()?))
}
