//! Products in bf16, by the processor's units for them ([`retort_kernels::half`]).

use candle_core::DType;
use retort_engine::error::Result;
use retort_kernels::Rayon;
use retort_kernels::half::{Operand, Packed, Side, Start, Unit, product};

use crate::layout::{rows, whole};
use crate::tensor::{Tensor, Tiles};
use crate::view::{floats, fresh, tensor};
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
                let _ = tiles.set(turned(&w.single()?)?);
            }
            let packed = tiles.get().expect("set above");
            linear_by(unit, x, packed, bias)
        }
    }
}

/// The tiles of a weight (o, i), transposed.
fn turned(w: &T) -> Result<Packed> {
    let w = &rows(w)?;
    let (o, i) = w.dims2().map_err(failed)?;
    let column = w.stride()[0];
    floats!(w);
    let from = Operand {
        data: w,
        row: 1,
        column,
    };
    Ok(Packed::new(&Rayon, Side::Right, from, [o, i]))
}

fn linear_by(unit: Unit, x: &T, w: &Packed, bias: Option<&T>) -> Result<T> {
    let x = &whole(x)?;
    let mut shape = x.dims().to_vec();
    let (o, i) = (w.outer(), w.inner());
    let n = shape.iter().product::<usize>() / i;
    *shape.last_mut().expect("rank >= 1") = o;
    let bias = bias.map(whole).transpose()?;
    floats!(x);
    let x = Packed::new(&Rayon, Side::Left, by_rows(x, i), [n, i]);
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
        let g = Packed::new(&Rayon, Side::Left, by_rows(grad, o), [n, o]);
        let w = Packed::new(&Rayon, Side::Right, by_rows(w, i), [i, o]);
        let mut dx = fresh(&[n, i]);
        product(unit, &Rayon, (&mut dx, i), &g, &w, Start::Zero);
        tensor(dx, &shape)
    };
    let dx = w.map(dx).transpose()?;
    let dw = |x: &T| {
        let x = &whole(x)?;
        let i = x.elem_count() / n;
        floats!(x);
        let turned = Operand {
            data: grad,
            row: 1,
            column: o,
        };
        let g = Packed::new(&Rayon, Side::Left, turned, [o, n]);
        let x = Packed::new(&Rayon, Side::Right, by_rows(x, i), [i, n]);
        let mut dw = fresh(&[o, i]);
        product(unit, &Rayon, (&mut dw, i), &g, &x, Start::Zero);
        tensor(dw, &[o, i])
    };
    Ok((dx, x.map(dw).transpose()?))
}

/// A matrix with `width` columns, stored by rows.
fn by_rows(data: &[f32], width: usize) -> Operand<'_, f32> {
    Operand {
        data,
        row: width,
        column: 1,
    }
}
