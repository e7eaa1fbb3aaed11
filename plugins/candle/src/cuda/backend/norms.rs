//! `Cuda`: norms and their gradients.

use candle_core::DType;
use retort_engine::backend::{Norms, Precision};
use retort_engine::error::{Error, Result};

use crate::cuda::Cuda;
use crate::cuda::arguments::{four, grouped, lengths, rows, same, sized};
use crate::cuda::kernels;
use crate::cuda::launch::{HELD, SHORT, blocks, launch, warps};
use crate::cuda::sums::{part_of, sum, sum_columns};
use crate::cuda::tensor::Tensor;
use crate::cuda::tensor::{Raw, device, fresh, pointer};
use crate::failed;

type T = Tensor;

impl Norms for Cuda {
    fn rms_norm(x: &T, w: &T, eps: f64, precision: Precision) -> Result<T> {
        rms_norm(x, w, eps, x.stored_as(precision))
    }

    fn rms_norm_backward(x: &T, w: &T, grad: &T, eps: f64) -> Result<(T, T)> {
        let (from, n, d) = rows(x)?;
        let (scale, g) = (sized(w, d as usize)?, grad.single()?);
        same(&from, &g)?;
        let device = device(&from)?;
        let dx = fresh(&device, from.dims(), DType::F32)?;
        let parts = fresh(&device, &[n, d as usize], DType::F32)?;
        let (kernel, blocks) = match d <= SHORT {
            true => (kernels::rms_norm_short_backward, warps(n)?),
            false => (kernels::rms_norm_backward, n),
        };
        launch(
            &device,
            kernel,
            blocks,
            0,
            (
                n as u32,
                d,
                eps as f32,
                pointer(&from)?,
                pointer(&scale)?,
                pointer(&g)?,
                pointer(&dx)?,
                pointer(&parts)?,
            ),
        )?;
        let dw = sum(&parts, &[0])?.reshape(w.raw.shape());
        Ok((x.like(dx), w.with(dw)?))
    }

    fn layer_norm(x: &T, eps: f64) -> Result<T> {
        let (from, n, d) = rows(x)?;
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        launch(
            &device,
            kernels::group_norm,
            n,
            0,
            (
                d,
                1u32,
                1u32,
                eps as f32,
                0i32,
                pointer(&from)?,
                0u64,
                0u64,
                pointer(&to)?,
            ),
        )?;
        Ok(x.like(to))
    }

    fn layer_norm_backward(x: &T, grad: &T, eps: f64) -> Result<T> {
        let (from, n, d) = rows(x)?;
        let g = grad.single()?;
        same(&from, &g)?;
        let device = device(&from)?;
        let dx = fresh(&device, from.dims(), DType::F32)?;
        launch(
            &device,
            kernels::group_norm_backward,
            n,
            0,
            (
                d,
                1u32,
                1u32,
                eps as f32,
                pointer(&from)?,
                0u64,
                pointer(&g)?,
                pointer(&dx)?,
                0u64,
            ),
        )?;
        Ok(x.like(dx))
    }

    fn modulated_norm(x: &T, scale: &T, shift: &T, eps: f64) -> Result<T> {
        let m = Modulated::new(x, scale)?;
        let shift = sized(shift, m.b * m.d)?;
        let device = device(&m.x)?;
        let to = fresh(&device, m.x.dims(), x.storage())?;
        let kernel = match (four(m.d, &[&m.x, &m.scale, &shift])?, x.half) {
            (true, true) => kernels::modulated_norm_four_bf16,
            (true, false) => kernels::modulated_norm_four_f32,
            (false, true) => kernels::modulated_norm_one_bf16,
            (false, false) => kernels::modulated_norm_one_f32,
        };
        launch(
            &device,
            kernel,
            m.b * m.l,
            0,
            (
                m.l as u32,
                m.d as u32,
                eps as f32,
                pointer(&m.x)?,
                pointer(&m.scale)?,
                pointer(&shift)?,
                pointer(&to)?,
            ),
        )?;
        Ok(x.like(to))
    }

    fn modulated_norm_backward(x: &T, scale: &T, grad: &T, eps: f64) -> Result<(T, T, T)> {
        let m = Modulated::new(x, scale)?;
        let g = grad.single()?;
        same(&m.x, &g)?;
        let device = device(&m.x)?;
        let dx = fresh(&device, m.x.dims(), DType::F32)?;
        let moments = fresh(&device, &[m.b * m.l, 2], DType::F32)?;
        let kernel = match four(m.d, &[&m.x, &m.scale, &g])? {
            true => kernels::modulated_norm_backward_four,
            false => kernels::modulated_norm_backward_one,
        };
        launch(
            &device,
            kernel,
            m.b * m.l,
            0,
            (
                m.l as u32,
                m.d as u32,
                eps as f32,
                pointer(&m.x)?,
                pointer(&m.scale)?,
                pointer(&g)?,
                pointer(&dx)?,
                pointer(&moments)?,
            ),
        )?;
        let part = part_of(m.l, m.b * m.d);
        let parts = m.l.div_ceil(part);
        let some = fresh(&device, &[2 * m.b, parts, m.d], DType::F32)?;
        launch(
            &device,
            kernels::sum_modulation,
            blocks(m.b * parts * m.d)?,
            0,
            (
                m.b as u32,
                m.l as u32,
                m.d as u32,
                part as u32,
                pointer(&m.x)?,
                pointer(&g)?,
                pointer(&moments)?,
                pointer(&some)?,
            ),
        )?;
        let both = sum_columns(&some, None, [2 * m.b, parts, m.d])?;
        let half = |at: usize| {
            let own = both.narrow(0, at * m.b, m.b);
            own.and_then(|own| own.reshape((m.b, 1, m.d)))
        };
        Ok((x.like(dx), scale.with(half(0))?, scale.with(half(1))?))
    }

    fn unit(x: &T, length: Option<&T>) -> Result<T> {
        let (from, rows, d) = rows(x)?;
        let (h, lengths) = lengths(&from, length)?;
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), x.storage())?;
        let kernel = match x.half {
            true => kernels::unit_bf16,
            false => kernels::unit_f32,
        };
        launch(
            &device,
            kernel,
            warps(rows)?,
            0,
            (
                rows as u32,
                h as u32,
                d,
                pointer(&from)?,
                lengths.as_ref().map_or(Ok(0), pointer)?,
                pointer(&to)?,
            ),
        )?;
        Ok(x.like(to))
    }

    fn unit_backward(x: &T, length: Option<&T>, grad: &T) -> Result<(T, Option<T>)> {
        let (from, rows, d) = rows(x)?;
        let g = grad.single()?;
        same(&from, &g)?;
        let (h, lengths) = lengths(&from, length)?;
        let device = device(&from)?;
        let dx = fresh(&device, from.dims(), DType::F32)?;
        let parts = fresh(&device, &[rows / h, h], DType::F32)?;
        launch(
            &device,
            kernels::unit_backward,
            warps(rows)?,
            0,
            (
                rows as u32,
                h as u32,
                d,
                pointer(&from)?,
                lengths.as_ref().map_or(Ok(0), pointer)?,
                pointer(&g)?,
                pointer(&dx)?,
                pointer(&parts)?,
            ),
        )?;
        let dlength = |length: &T| {
            let all = sum_columns(&parts, None, [1, rows / h, h])?;
            length.with(all.reshape(length.raw.shape()))
        };
        Ok((x.like(dx), length.map(dlength).transpose()?))
    }

    fn group_norm(x: &T, groups: usize, w: &T, bias: &T, eps: f64) -> Result<T> {
        group_norm(x, groups, w, bias, eps, false)
    }

    fn group_norm_silu(x: &T, groups: usize, w: &T, bias: &T, eps: f64) -> Result<T> {
        group_norm(x, groups, w, bias, eps, true)
    }

    fn group_norm_backward(x: &T, groups: usize, w: &T, grad: &T, eps: f64) -> Result<(T, T, T)> {
        let (from, g) = (x.single()?, grad.single()?);
        same(&from, &g)?;
        let [rows, n, area] = grouped(&from, groups)?;
        let scale = sized(w, from.dims()[1])?;
        let device = device(&from)?;
        let dx = fresh(&device, from.dims(), DType::F32)?;
        let parts = fresh(&device, from.dims(), DType::F32)?;
        launch(
            &device,
            kernels::group_norm_backward,
            rows,
            0,
            (
                n as u32,
                area as u32,
                groups as u32,
                eps as f32,
                pointer(&from)?,
                pointer(&scale)?,
                pointer(&g)?,
                pointer(&dx)?,
                pointer(&parts)?,
            ),
        )?;
        let dw = sum(&parts, &[0, 2, 3])?.reshape(w.raw.shape());
        let db = sum(&g, &[0, 2, 3])?.reshape(w.raw.shape());
        Ok((x.like(dx), w.with(dw)?, w.with(db)?))
    }
}

/// x / sqrt(mean(x^2) + eps) * w over the last dimension, in a type.
fn rms_norm(x: &T, w: &T, eps: f64, dtype: DType) -> Result<T> {
    let (from, n, d) = rows(x)?;
    let scale = sized(w, d as usize)?;
    let device = device(&from)?;
    let to = fresh(&device, from.dims(), dtype)?;
    let (kernel, blocks) = match (dtype, d <= SHORT) {
        (DType::BF16, true) => (kernels::rms_norm_short_bf16, warps(n)?),
        (DType::BF16, false) => (kernels::rms_norm_bf16, n),
        (_, true) => (kernels::rms_norm_short_f32, warps(n)?),
        (_, false) => (kernels::rms_norm_f32, n),
    };
    launch(
        &device,
        kernel,
        blocks,
        0,
        (
            n as u32,
            d,
            eps as f32,
            pointer(&from)?,
            pointer(&scale)?,
            pointer(&to)?,
        ),
    )?;
    Ok(x.like(to))
}

/// Group normalisation of (b, c, h, w) with scale and shift (c), then silu if `active`.
fn group_norm(x: &T, groups: usize, w: &T, bias: &T, eps: f64, active: bool) -> Result<T> {
    let from = x.single()?;
    let [rows, n, area] = grouped(&from, groups)?;
    let channels = from.dims()[1];
    let (scale, shift) = (sized(w, channels)?, sized(bias, channels)?);
    let device = device(&from)?;
    let to = fresh(&device, from.dims(), DType::F32)?;
    launch(
        &device,
        kernels::group_norm,
        rows,
        0,
        (
            n as u32,
            area as u32,
            groups as u32,
            eps as f32,
            i32::from(active),
            pointer(&from)?,
            pointer(&scale)?,
            pointer(&shift)?,
            pointer(&to)?,
        ),
    )?;
    Ok(x.like(to))
}

/// What a modulated norm works on.
struct Modulated {
    x: Raw,
    scale: Raw,
    b: usize,
    l: usize,
    d: usize,
}

impl Modulated {
    fn new(x: &T, scale: &T) -> Result<Self> {
        let (x, _, _) = rows(x)?;
        let (b, l, d) = x.dims3().map_err(failed)?;
        if d > HELD {
            let message =
                format!("a modulated norm takes rows of at most {HELD} elements, got {d}");
            return Err(Error::Backend(message));
        }
        let scale = sized(scale, b * d)?;
        Ok(Self { x, scale, b, l, d })
    }
}
