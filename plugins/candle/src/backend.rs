//! `Candle` as the engine's backend: for each operation the fused kernel where one fits, else the plain form.

use candle_core::Tensor;
use retort_engine::backend::{Backend, Binary, Unary};
use retort_engine::error::Result;

use crate::plain::Plain;
use crate::{Candle, T};

impl Backend for Candle {
    type Tensor = Tensor;

    fn floats(&self, data: &[f32], shape: &[usize]) -> Result<T> {
        Plain(self.clone()).floats(data, shape)
    }
    fn indices(&self, data: &[u32], shape: &[usize]) -> Result<T> {
        Plain(self.clone()).indices(data, shape)
    }
    fn full(&self, shape: &[usize], value: f32) -> Result<T> {
        Plain(self.clone()).full(shape, value)
    }
    fn floats_beside(other: &T, data: &[f32], shape: &[usize]) -> Result<T> {
        Plain::floats_beside(other, data, shape)
    }
    fn indices_beside(other: &T, data: &[u32], shape: &[usize]) -> Result<T> {
        Plain::indices_beside(other, data, shape)
    }
    fn to_floats(x: &T) -> Result<Vec<f32>> {
        Plain::to_floats(x)
    }
    fn to_indices(x: &T) -> Result<Vec<u32>> {
        Plain::to_indices(x)
    }
    fn shape(x: &T) -> Vec<usize> {
        Plain::shape(x)
    }
    fn reshape(x: &T, shape: &[usize]) -> Result<T> {
        Plain::reshape(x, shape)
    }
    fn permute(x: &T, dims: &[usize]) -> Result<T> {
        Plain::permute(x, dims)
    }
    fn narrow(x: &T, dim: usize, start: usize, len: usize) -> Result<T> {
        Plain::narrow(x, dim, start, len)
    }
    fn cat(xs: &[&T], dim: usize) -> Result<T> {
        Plain::cat(xs, dim)
    }
    fn expand(x: &T, shape: &[usize]) -> Result<T> {
        Plain::expand(x, shape)
    }
    fn unary(x: &T, f: Unary) -> Result<T> {
        Plain::unary(x, f)
    }
    fn binary(a: &T, b: &T, f: Binary) -> Result<T> {
        Plain::binary(a, b, f)
    }
    fn affine(x: &T, mul: f64, add: f64) -> Result<T> {
        Plain::affine(x, mul, add)
    }
    fn sum(x: &T, dims: &[usize]) -> Result<T> {
        Plain::sum(x, dims)
    }
    fn max_last(x: &T) -> Result<T> {
        Plain::max_last(x)
    }
    fn argmax_last(x: &T) -> Result<T> {
        Plain::argmax_last(x)
    }
    fn matmul(a: &T, b: &T, ta: bool, tb: bool) -> Result<T> {
        Plain::matmul(a, b, ta, tb)
    }
    fn rows(table: &T, ids: &T) -> Result<T> {
        Plain::rows(table, ids)
    }
    fn rows_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        Plain::rows_adjoint(grad, ids, k)
    }
    fn pick(x: &T, ids: &T) -> Result<T> {
        Plain::pick(x, ids)
    }
    fn pick_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        Plain::pick_adjoint(grad, ids, k)
    }
    fn conv2d(x: &T, w: &T, stride: usize, padding: usize) -> Result<T> {
        Plain::conv2d(x, w, stride, padding)
    }
    fn conv2d_backward(
        x: &T,
        w: &T,
        grad: &T,
        stride: usize,
        padding: usize,
        want: (bool, bool),
    ) -> Result<(Option<T>, Option<T>)> {
        Plain::conv2d_backward(x, w, grad, stride, padding, want)
    }
    fn write_(x: &T, dim: usize, start: usize, src: &T) -> Result<()> {
        Plain::write_(x, dim, start, src)
    }
    fn assign_(x: &T, src: &T) -> Result<()> {
        Plain::assign_(x, src)
    }
}
