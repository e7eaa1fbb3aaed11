//! Host kernels on libtorch's tensors and threads.

use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use retort_engine::backend::FlowSolver;
use retort_engine::error::{Error, Result};
use retort_kernels::skinny::{self, FEW, Weight};
use retort_kernels::{Pool, flow};
use tch::{Device, Kind, Tensor};

use crate::{aten, failed};

/// libtorch's threads.
struct Threads;

impl Pool for Threads {
    fn threads(&self) -> usize {
        usize::try_from(tch::get_num_threads()).unwrap_or(1)
    }

    fn each(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        // A free thread takes the next task.
        let next = AtomicUsize::new(0);
        let worker = |_| {
            loop {
                match next.fetch_add(1, Ordering::Relaxed) {
                    i if i < count => task(i),
                    _ => return,
                }
            }
        };
        if aten::each(self.threads().min(count), &worker).is_err() {
            worker(0);
        }
    }
}

/// x (.., i) times w (o, i) transposed, plus bias (o), if x has few rows and everything is in host memory, with w in f32 or
/// bf16. Otherwise None.
pub(crate) fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Option<Result<Tensor>> {
    let (xs, ws) = (x.size(), w.size());
    let (&[o, i], Some((&last, _))) = (&ws[..], xs.split_last()) else {
        return None;
    };
    let n = x.numel() / (i as usize).max(1);
    let on_host = |x: &Tensor| x.device() == Device::Cpu;
    let fits = last == i
        && (1..=FEW).contains(&n)
        && o > 0
        && [Some(x), Some(w), bias].into_iter().flatten().all(on_host)
        && bias.is_none_or(|b| b.size() == [o]);
    if !fits {
        return None;
    }
    match w.kind() {
        Kind::Float => Some(few::<f32>(x, w, bias)),
        Kind::BFloat16 => Some(few::<bf16>(x, w, bias)),
        _ => None,
    }
}

fn few<W: Weight + Element>(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (w, mut shape) = (w.f_contiguous().map_err(failed)?, x.size());
    let x = floats(x)?;
    let (o, i) = (w.size()[0], w.size()[1]);
    if let Some(last) = shape.last_mut() {
        *last = o;
    }
    let mut y = Tensor::f_empty(&shape[..], (Kind::Float, Device::Cpu)).map_err(failed)?;
    if let Some(bias) = bias {
        y.f_copy_(bias).map_err(failed)?;
    }
    let (o, i) = (o as usize, i as usize);
    let n = x.numel() / i;
    skinny::product(
        &Threads,
        elements_mut(&mut y)?,
        elements::<f32>(&x)?,
        (elements::<W>(&w)?, i),
        [n, i, o],
        bias.is_some(),
    );
    Ok(y)
}

/// logits (n, k), -inf where excluded; noise (n, d); codebook (k, d) -> ids (n). None if they are on a GPU.
pub(crate) fn flow_map(
    logits: &Tensor,
    noise: &Tensor,
    codebook: &Tensor,
    solver: &FlowSolver,
) -> Option<Result<Tensor>> {
    let all = [logits, noise, codebook];
    if all.iter().any(|x| x.device() != Device::Cpu) {
        return None;
    }
    let (sizes, d) = (all.map(Tensor::size), *codebook.size().last()?);
    let (n, k) = (noise.numel() as i64 / d, codebook.numel() as i64 / d);
    if sizes != [vec![n, k], vec![n, d], vec![k, d]] {
        let message = format!("flow map: logits, noise and codebook of shapes {sizes:?}");
        return Some(Err(Error::Backend(message)));
    }
    let run = || {
        let [logits, noise, codebook] = [floats(logits)?, floats(noise)?, floats(codebook)?];
        let (codebook, d) = (elements(&codebook)?, d as usize);
        let (logits, noise) = (elements(&logits)?, elements(&noise)?);
        let ids = flow::flow_map(&Threads, logits, noise, codebook, d, solver);
        let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
        Tensor::f_from_slice(&ids).map_err(failed)
    };
    Some(run())
}

/// The same floats in f32 and row-major.
fn floats(x: &Tensor) -> Result<Tensor> {
    let same = x.f_to_kind(Kind::Float).and_then(|x| x.f_contiguous());
    same.map_err(failed)
}

/// What tensors hold.
trait Element: Sized {
    const KIND: Kind;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;
}

impl Element for bf16 {
    const KIND: Kind = Kind::BFloat16;
}

/// The elements of a row-major tensor in host memory.
fn elements<T: Element>(x: &Tensor) -> Result<&[T]> {
    let (start, count) = place::<T>(x)?;
    // SAFETY: `place` has checked that this many elements of this type begin here; the borrowed tensor keeps them alive, and
    // nobody writes to tensors that are being read (the engine's contract).
    Ok(unsafe { std::slice::from_raw_parts(start, count) })
}

/// The elements of a row-major tensor in host memory that is not shared.
fn elements_mut(x: &mut Tensor) -> Result<&mut [f32]> {
    let (start, count) = place::<f32>(x)?;
    // SAFETY: as above, and the tensor is new and borrowed mutably.
    Ok(unsafe { std::slice::from_raw_parts_mut(start, count) })
}

fn place<T: Element>(x: &Tensor) -> Result<(*mut T, usize)> {
    if x.kind() != T::KIND || x.device() != Device::Cpu || !x.is_contiguous() || x.numel() == 0 {
        let message = format!("a kernel of the host got {x:?}");
        return Err(Error::Internal(message));
    }
    Ok((x.data_ptr().cast(), x.numel()))
}
