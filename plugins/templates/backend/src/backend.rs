//! Tensors as vectors in host memory, operations as loops over them.
//!
//! It implements only the required operations, those of `Tensors`. The engine composes the rest of them (norms, attention,
//! softmax, AdamW). Override a pair of those if your library has a faster version: each has a default in one of the other
//! traits.

use std::sync::{Arc, Mutex, PoisonError};

use retort_engine::backend::{
    Attention, Binary, Exchange, Layers, Norms, Optimiser, Sampling, Tensors, Unary,
};
use retort_engine::error::{Error, Result};

/// The backend. Handles of a tensor library (a device, a stream) belong here.
#[derive(Debug, Clone, Copy)]
pub struct Loops;

/// Elements in row-major order. Clones share them, so every clone sees writes in place.
#[derive(Debug, Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Data,
}

#[derive(Debug, Clone)]
enum Data {
    Floats(Arc<Mutex<Arc<Vec<f32>>>>),
    Indices(Arc<Vec<u32>>),
}

impl Loops {
    /// Opens a device for an element type; `threads` is how many the stage may use (these loops use one).
    pub fn open(device: &str, dtype: &str, _threads: usize) -> Result<Self> {
        match (device, dtype) {
            ("cpu", "f32") => Ok(Self),
            ("cpu", _) => Err(Error::option("/dtype", format!("{dtype}: expected f32"))),
            _ => Err(Error::option("/device", format!("{device}: expected cpu"))),
        }
    }
}

impl Tensor {
    fn floats(shape: &[usize], data: Vec<f32>) -> Result<Self> {
        fits(shape, data.len())?;
        Ok(Self {
            shape: shape.to_vec(),
            data: Data::Floats(Arc::new(Mutex::new(Arc::new(data)))),
        })
    }

    fn indices(shape: &[usize], data: Vec<u32>) -> Result<Self> {
        fits(shape, data.len())?;
        Ok(Self {
            shape: shape.to_vec(),
            data: Data::Indices(Arc::new(data)),
        })
    }

    /// A snapshot of the floats.
    fn read(&self) -> Result<Arc<Vec<f32>>> {
        match &self.data {
            Data::Floats(data) => Ok(Arc::clone(
                &data.lock().unwrap_or_else(PoisonError::into_inner),
            )),
            Data::Indices(_) => Err(Error::backend("expected floats, found indices")),
        }
    }

    fn ids(&self) -> Result<&[u32]> {
        match &self.data {
            Data::Indices(data) => Ok(data),
            Data::Floats(_) => Err(Error::backend("expected indices, found floats")),
        }
    }

    /// A new tensor from elements of this one.
    fn select(&self, shape: &[usize], places: &[usize]) -> Result<Self> {
        match &self.data {
            Data::Floats(_) => {
                let data = self.read()?;
                Self::floats(shape, places.iter().map(|&at| data[at]).collect())
            }
            Data::Indices(data) => {
                Self::indices(shape, places.iter().map(|&at| data[at]).collect())
            }
        }
    }

    fn last(&self) -> Result<usize> {
        let last = self.shape.last().copied();
        last.ok_or_else(|| Error::backend("a tensor without dimensions has no last one"))
    }

    /// A function of each row of the last dimension.
    fn rows<T>(&self, f: impl Fn(&[f32]) -> T) -> Result<Vec<T>> {
        let data = self.read()?;
        Ok(data.chunks_exact(self.last()?).map(f).collect())
    }
}

fn fits(shape: &[usize], count: usize) -> Result<()> {
    if shape.iter().product::<usize>() == count {
        return Ok(());
    }
    Err(Error::backend(format!(
        "{count} elements do not make a tensor of shape {shape:?}"
    )))
}

/// The strides of a row-major array.
fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d];
    }
    strides
}

/// The offsets of an array's elements, in row-major order, given its strides.
fn places(shape: &[usize], strides: &[usize], start: usize) -> Vec<usize> {
    let mut places = vec![start];
    for (&n, &stride) in shape.iter().zip(strides) {
        places = places
            .iter()
            .flat_map(|&at| (0..n).map(move |i| at + i * stride))
            .collect();
    }
    places
}

/// The offsets of the elements of `from` when it is broadcast to `shape`.
fn spread(from: &[usize], shape: &[usize]) -> Result<Vec<usize>> {
    let lead = shape.len().checked_sub(from.len());
    let fits = |lead: usize| {
        let pairs = from.iter().zip(&shape[lead..]);
        pairs.clone().all(|(&n, &wide)| n == wide || n == 1)
    };
    let Some(lead) = lead.filter(|&lead| fits(lead)) else {
        return Err(Error::backend(format!(
            "{from:?} cannot be broadcast to {shape:?}"
        )));
    };
    let mut wide = vec![0; lead];
    let own = strides(from).into_iter().zip(from);
    wide.extend(own.map(|(stride, &n)| if n == 1 { 0 } else { stride }));
    Ok(places(shape, &wide, 0))
}

/// The error function, by its series of positive terms.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-18 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
}

fn function(x: f64, f: Unary) -> f64 {
    match f {
        Unary::Exp => x.exp(),
        Unary::Log => x.ln(),
        Unary::Sqrt => x.sqrt(),
        Unary::Square => x * x,
        Unary::Recip => x.recip(),
        Unary::Tanh => x.tanh(),
        Unary::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Unary::Erf => erf(x),
        Unary::Silu => x / (1.0 + (-x).exp()),
        Unary::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + u.tanh())
        }
        Unary::GeluErf => 0.5 * x * (1.0 + erf(x * 0.5f64.sqrt())),
        Unary::Relu => x.max(0.0),
    }
}

/// Calls `each` with the offsets in input (b, c, h, w), kernel (o, c, kh, kw) and output of every product in a convolution.
fn products(
    [x, w, y]: [&[usize]; 3],
    stride: usize,
    padding: [usize; 2],
    mut each: impl FnMut(usize, usize, usize),
) {
    let inside = |at: usize, d: usize| at.checked_sub(padding[d - 2]).filter(|&at| at < x[d]);
    for (place, at) in indices(y).enumerate() {
        for (kernel, k) in indices(&w[1..]).enumerate() {
            let row = inside(at[2] * stride + k[1], 2);
            if let (Some(row), Some(column)) = (row, inside(at[3] * stride + k[2], 3)) {
                let input = ((at[0] * x[1] + k[0]) * x[2] + row) * x[3] + column;
                let kernels = w[1] * w[2] * w[3];
                each(input, at[1] * kernels + kernel, place);
            }
        }
    }
}

/// All indices of an array, in row-major order.
fn indices(shape: &[usize]) -> impl Iterator<Item = Vec<usize>> {
    let (shape, strides) = (shape.to_vec(), strides(shape));
    (0..shape.iter().product()).map(move |at: usize| {
        let pairs = strides.iter().zip(&shape);
        pairs.map(|(&stride, &n)| at / stride % n).collect()
    })
}

type T = Tensor;

impl Tensors for Loops {
    type Tensor = Tensor;

    fn of(_: &T) -> Self {
        Self
    }

    fn exact(&self) -> Self {
        *self
    }

    fn floats(&self, data: &[f32], shape: &[usize]) -> Result<T> {
        Tensor::floats(shape, data.to_vec())
    }

    fn indices(&self, data: &[u32], shape: &[usize]) -> Result<T> {
        Tensor::indices(shape, data.to_vec())
    }

    fn full(&self, shape: &[usize], value: f32) -> Result<T> {
        Tensor::floats(shape, vec![value; shape.iter().product()])
    }

    fn to_floats(x: &T) -> Result<Vec<f32>> {
        Ok(x.read()?.to_vec())
    }

    fn to_indices(x: &T) -> Result<Vec<u32>> {
        Ok(x.ids()?.to_vec())
    }

    fn shape(x: &T) -> Vec<usize> {
        x.shape.clone()
    }

    fn reshape(x: &T, shape: &[usize]) -> Result<T> {
        fits(shape, x.shape.iter().product())?;
        Ok(Tensor {
            shape: shape.to_vec(),
            data: x.data.clone(),
        })
    }

    fn permute(x: &T, dims: &[usize]) -> Result<T> {
        let own = strides(&x.shape);
        let shape: Vec<usize> = dims.iter().map(|&d| x.shape[d]).collect();
        let turned: Vec<usize> = dims.iter().map(|&d| own[d]).collect();
        x.select(&shape, &places(&shape, &turned, 0))
    }

    fn narrow(x: &T, dim: usize, start: usize, len: usize) -> Result<T> {
        let (mut shape, strides) = (x.shape.clone(), strides(&x.shape));
        if start + len > shape[dim] {
            return Err(Error::backend(format!(
                "{start}..{} is beyond the {} of dimension {dim}",
                start + len,
                shape[dim]
            )));
        }
        shape[dim] = len;
        x.select(&shape, &places(&shape, &strides, start * strides[dim]))
    }

    fn cat(xs: &[&T], dim: usize) -> Result<T> {
        fn joined<E: Copy>(parts: &[(&[E], usize)], outer: usize) -> Vec<E> {
            let rows = (0..outer).flat_map(|i| parts.iter().map(move |&(data, n)| (i, data, n)));
            rows.flat_map(|(i, data, n)| data[i * n..(i + 1) * n].iter().copied())
                .collect()
        }
        let first = xs
            .first()
            .ok_or_else(|| Error::backend("nothing to join"))?;
        let mut shape = first.shape.clone();
        shape[dim] = xs.iter().map(|x| x.shape[dim]).sum();
        let outer = shape[..dim].iter().product();
        let inner = |x: &T| x.shape[dim..].iter().product();
        if matches!(first.data, Data::Indices(_)) {
            let parts: Result<Vec<_>> = xs.iter().map(|x| Ok((x.ids()?, inner(x)))).collect();
            return Tensor::indices(&shape, joined(&parts?, outer));
        }
        let data: Result<Vec<_>> = xs.iter().map(|x| x.read()).collect();
        let data = data?;
        let parts: Vec<_> = data
            .iter()
            .zip(xs)
            .map(|(d, x)| (&d[..], inner(x)))
            .collect();
        Tensor::floats(&shape, joined(&parts, outer))
    }

    fn expand(x: &T, shape: &[usize]) -> Result<T> {
        x.select(shape, &spread(&x.shape, shape)?)
    }

    fn unary(x: &T, f: Unary) -> Result<T> {
        let data = x.read()?;
        let y = data.iter().map(|&x| function(f64::from(x), f) as f32);
        Tensor::floats(&x.shape, y.collect())
    }

    fn binary(a: &T, b: &T, f: Binary) -> Result<T> {
        let rank = a.shape.len().max(b.shape.len());
        let size = |x: &T, d: usize| {
            (d + x.shape.len())
                .checked_sub(rank)
                .map_or(1, |d| x.shape[d])
        };
        // A dimension of size 1 takes the other's size, which may be 0.
        let shape: Vec<usize> = (0..rank)
            .map(|d| match (size(a, d), size(b, d)) {
                (1, n) => n,
                (n, _) => n,
            })
            .collect();
        let (x, y) = (a.read()?, b.read()?);
        let pairs = spread(&a.shape, &shape)?
            .into_iter()
            .zip(spread(&b.shape, &shape)?);
        let z = pairs.map(|(i, j)| match f {
            Binary::Add => x[i] + y[j],
            Binary::Sub => x[i] - y[j],
            Binary::Mul => x[i] * y[j],
            Binary::Div => x[i] / y[j],
            Binary::Max => x[i].max(y[j]),
        });
        Tensor::floats(&shape, z.collect())
    }

    fn affine(x: &T, mul: f64, add: f64) -> Result<T> {
        let data = x.read()?;
        let y = data.iter().map(|&x| (f64::from(x) * mul + add) as f32);
        Tensor::floats(&x.shape, y.collect())
    }

    fn sum(x: &T, dims: &[usize]) -> Result<T> {
        let mut shape = x.shape.clone();
        dims.iter().for_each(|&d| shape[d] = 1);
        let mut sums = vec![0.0; shape.iter().product()];
        for (&x, at) in x.read()?.iter().zip(spread(&shape, &x.shape)?) {
            sums[at] += f64::from(x);
        }
        Tensor::floats(&shape, sums.into_iter().map(|sum| sum as f32).collect())
    }

    fn max_last(x: &T) -> Result<T> {
        let mut shape = x.shape.clone();
        let max = x.rows(|row| row.iter().copied().fold(f32::NEG_INFINITY, f32::max))?;
        *shape.last_mut().expect("a row was found") = 1;
        Tensor::floats(&shape, max)
    }

    fn argmax_last(x: &T) -> Result<T> {
        let first =
            |row: &[f32]| (1..row.len()).fold(0, |top, i| if row[i] > row[top] { i } else { top });
        let ids = x.rows(|row| first(row) as u32)?;
        Tensor::indices(&x.shape[..x.shape.len() - 1], ids)
    }

    fn matmul(a: &T, b: &T, ta: bool, tb: bool) -> Result<T> {
        let rank = a.shape.len();
        let size = |x: &T, turned: bool| {
            let (rows, columns) = (x.shape[rank - 2], x.shape[rank - 1]);
            if turned {
                (columns, rows)
            } else {
                (rows, columns)
            }
        };
        let ((m, k), (same, n)) = (size(a, ta), size(b, tb));
        if b.shape.len() != rank || b.shape[..rank - 2] != a.shape[..rank - 2] || k != same {
            return Err(Error::backend(format!(
                "matrices {:?} and {:?} cannot be multiplied",
                a.shape, b.shape
            )));
        }
        let (x, y) = (a.read()?, b.read()?);
        let at = |turned: bool, i: usize, j: usize, rows: usize, columns: usize| {
            if turned {
                j * rows + i
            } else {
                i * columns + j
            }
        };
        let mut shape = a.shape[..rank - 2].to_vec();
        let mut z = vec![0.0; shape.iter().product::<usize>() * m * n];
        for (batch, z) in z.chunks_exact_mut((m * n).max(1)).enumerate() {
            let (x, y) = (&x[batch * m * k..], &y[batch * k * n..]);
            for (i, row) in z.chunks_exact_mut(n).enumerate() {
                for p in 0..k {
                    let x = x[at(ta, i, p, m, k)];
                    for (j, z) in row.iter_mut().enumerate() {
                        *z += x * y[at(tb, p, j, k, n)];
                    }
                }
            }
        }
        shape.extend([m, n]);
        Tensor::floats(&shape, z)
    }

    fn rows(table: &T, ids: &T) -> Result<T> {
        let (d, data) = (table.last()?, table.read()?);
        let rows = ids.ids()?.iter().map(|&id| id as usize * d);
        let y = rows.flat_map(|at| data[at..at + d].iter().copied());
        Tensor::floats(&[&ids.shape[..], &[d]].concat(), y.collect())
    }

    fn rows_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        let (d, data) = (grad.last()?, grad.read()?);
        let mut table = vec![0.0; k * d];
        for (&id, row) in ids.ids()?.iter().zip(data.chunks_exact(d)) {
            let sums = &mut table[id as usize * d..][..d];
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        Tensor::floats(&[k, d], table)
    }

    fn pick(x: &T, ids: &T) -> Result<T> {
        let (k, data) = (x.last()?, x.read()?);
        let rows = ids.ids()?.iter().zip(data.chunks_exact(k));
        Tensor::floats(
            &ids.shape,
            rows.map(|(&id, row)| row[id as usize]).collect(),
        )
    }

    fn pick_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        let data = grad.read()?;
        let mut placed = vec![0.0; data.len() * k];
        for ((i, &id), &x) in ids.ids()?.iter().enumerate().zip(data.iter()) {
            placed[i * k + id as usize] = x;
        }
        Tensor::floats(&[&grad.shape[..], &[k]].concat(), placed)
    }

    fn conv2d(x: &T, w: &T, stride: usize, padding: [usize; 2]) -> Result<T> {
        let out = |d: usize| (x.shape[d] + 2 * padding[d - 2] - w.shape[d]) / stride + 1;
        let shape = [x.shape[0], w.shape[0], out(2), out(3)];
        let (input, kernel) = (x.read()?, w.read()?);
        let mut y = vec![0.0; shape.iter().product()];
        products([&x.shape, &w.shape, &shape], stride, padding, |i, k, o| {
            y[o] += input[i] * kernel[k];
        });
        Tensor::floats(&shape, y)
    }

    fn conv2d_backward(
        x: &T,
        w: &T,
        grad: &T,
        stride: usize,
        padding: [usize; 2],
        want: (bool, bool),
    ) -> Result<(Option<T>, Option<T>)> {
        let (input, kernel, g) = (x.read()?, w.read()?, grad.read()?);
        let (mut dx, mut dw) = (vec![0.0; input.len()], vec![0.0; kernel.len()]);
        let shapes = [&x.shape[..], &w.shape, &grad.shape];
        products(shapes, stride, padding, |i, k, o| {
            dx[i] += g[o] * kernel[k];
            dw[k] += g[o] * input[i];
        });
        Ok((
            want.0.then(|| Tensor::floats(&x.shape, dx)).transpose()?,
            want.1.then(|| Tensor::floats(&w.shape, dw)).transpose()?,
        ))
    }

    fn write_(x: &T, dim: usize, start: usize, src: &T) -> Result<()> {
        let strides = strides(&x.shape);
        let new = src.read()?;
        let Data::Floats(data) = &x.data else {
            return Err(Error::backend("expected floats, found indices"));
        };
        let mut data = data.lock().unwrap_or_else(PoisonError::into_inner);
        let data = Arc::make_mut(&mut data);
        let places = places(&src.shape, &strides, start * strides[dim]);
        places
            .iter()
            .zip(new.iter())
            .for_each(|(&at, &x)| data[at] = x);
        Ok(())
    }

    fn assign_(x: &T, src: &T) -> Result<()> {
        let new = src.read()?;
        fits(&x.shape, new.len())?;
        let Data::Floats(data) = &x.data else {
            return Err(Error::backend("expected floats, found indices"));
        };
        *data.lock().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }
}

// Composed of the operations above. Override a pair here where a kernel of your own is faster.
impl Layers for Loops {}
impl Norms for Loops {}
impl Attention for Loops {}
impl Optimiser for Loops {}
impl Exchange for Loops {}
impl Sampling for Loops {}
