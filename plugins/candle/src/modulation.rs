//! Layers whose parameters differ from sequence to sequence, as those of adaptive norms do: one pass over the rows each, in
//! which the gradients of the parameters are summed too.

use retort_engine::error::Result;
use retort_kernels::lanes::add_scaled;

use crate::T;
use crate::layout::whole;
use crate::norm::{standardise_row, standardise_row_backward};
use crate::rows::{by_rows, by_sequences};
use crate::view::{floats, fresh, tensor};

/// x + y gate (+ added): x, y and added (b, l, c), gate (b, 1, c).
pub fn gated_add(x: &T, y: &T, gate: &T, added: Option<&T>) -> Result<T> {
    let (x, y, gate) = (&whole(x)?, &whole(y)?, &whole(gate)?);
    let (shape, adds) = (x.dims().to_vec(), added.is_some());
    let (l, c) = (shape[1], shape[2]);
    // Not read if there is nothing to add.
    let added = &whole(added.unwrap_or(x))?;
    floats!(x, y, gate, added);
    let mut out = fresh(&shape);
    by_rows(
        &mut out,
        c,
        #[inline(always)]
        |first, out| {
            for (i, out) in out.chunks_exact_mut(c).enumerate() {
                let (at, own) = ((first + i) * c, (first + i) / l * c);
                let (x, y, gate) = (&x[at..][..c], &y[at..][..c], &gate[own..][..c]);
                for (out, (&x, (&y, &gate))) in out.iter_mut().zip(x.iter().zip(y.iter().zip(gate)))
                {
                    *out = x + y * gate;
                }
                if adds {
                    add_scaled(out, 1.0, &added[at..][..c]);
                }
            }
        },
    );
    tensor(out, &shape)
}

/// Gradients of [`gated_add`] for y and the gate.
pub fn gated_add_backward(y: &T, gate: &T, grad: &T) -> Result<(T, T)> {
    let (y, gate, grad) = (&whole(y)?, &whole(gate)?, &whole(grad)?);
    let (shape, of_gate) = (y.dims().to_vec(), gate.dims().to_vec());
    let (l, c) = (shape[1], shape[2]);
    floats!(y, gate, grad);
    let mut dy = fresh(&shape);
    let dgate = by_sequences(
        &mut dy,
        (l, c),
        c,
        #[inline(always)]
        |first, dy, dgate| {
            let gate = &gate[first / l * c..][..c];
            for (i, dy) in dy.chunks_exact_mut(c).enumerate() {
                let at = (first + i) * c;
                let (y, g) = (&y[at..][..c], &grad[at..][..c]);
                for (dy, (&g, &gate)) in dy.iter_mut().zip(g.iter().zip(gate)) {
                    *dy = g * gate;
                }
                for (dgate, (&g, &y)) in dgate.iter_mut().zip(g.iter().zip(y)) {
                    *dgate = g.mul_add(y, *dgate);
                }
            }
        },
    );
    Ok((tensor(dy, &shape)?, tensor(dgate, &of_gate)?))
}

/// Gradients of [`modulated_norm`](crate::norm::modulated_norm) for x, scale and shift; the one for x is added to `added`.
pub fn modulated_norm_backward(
    x: &T,
    scale: &T,
    grad: &T,
    eps: f64,
    added: Option<&T>,
) -> Result<(T, T, T)> {
    let (x, scale, grad) = (&whole(x)?, &whole(scale)?, &whole(grad)?);
    let (shape, of_scale, adds) = (x.dims().to_vec(), scale.dims().to_vec(), added.is_some());
    let (l, c) = (shape[1], shape[2]);
    // Not read if there is nothing to add to.
    let added = &whole(added.unwrap_or(grad))?;
    floats!(x, scale, grad, added);
    let mut dx = fresh(&shape);
    let sums = by_sequences(
        &mut dx,
        (l, c),
        2 * c,
        #[inline(always)]
        |first, dx, share| {
            let (dscale, dshift) = share.split_at_mut(c);
            let scale = &scale[first / l * c..][..c];
            // The gradient of the normalised row.
            let mut inner = vec![0.0; c];
            for (i, dx) in dx.chunks_exact_mut(c).enumerate() {
                let at = (first + i) * c;
                let (x, g) = (&x[at..][..c], &grad[at..][..c]);
                // The normalised row y first.
                let r = standardise_row(dx, x, eps);
                for (dscale, (&g, &y)) in dscale.iter_mut().zip(g.iter().zip(&*dx)) {
                    *dscale = g.mul_add(y, *dscale);
                }
                add_scaled(dshift, 1.0, g);
                for (inner, (&g, &scale)) in inner.iter_mut().zip(g.iter().zip(scale)) {
                    *inner = g * scale;
                }
                standardise_row_backward(dx, &inner, r);
                if adds {
                    add_scaled(dx, 1.0, &added[at..][..c]);
                }
            }
        },
    );
    let (mut dscale, mut dshift) = (Vec::new(), Vec::new());
    for own in sums.chunks_exact(2 * c) {
        dscale.extend_from_slice(&own[..c]);
        dshift.extend_from_slice(&own[c..]);
    }
    Ok((
        tensor(dx, &shape)?,
        tensor(dscale, &of_scale)?,
        tensor(dshift, &of_scale)?,
    ))
}

#[cfg(test)]
mod tests {
    use retort_engine::backend::{Layers, Norms, Tensors};

    use super::*;
    use crate::plain::Plain;
    use crate::rows::BLOCK;
    use crate::{Candle, waves};

    fn alike(got: &T, want: &T) {
        assert_eq!(got.dims(), want.dims());
        let [got, want] = [got, want].map(|x| Plain::to_floats(x).expect("floats"));
        for (got, want) in got.iter().zip(&want) {
            assert!(
                (got - want).abs() <= 1e-4 * want.abs().max(1.0),
                "{got}, not {want}"
            );
        }
    }

    #[test]
    fn long_sequences_are_summed_over_all_their_blocks() {
        let (shape, narrow) = ([3, 2 * BLOCK + 9, 21], [3, 1, 21]);
        let [x, y, grad, known] = [0.7, 0.9, 1.1, 1.3].map(|step| waves(step, &shape));
        let scale = waves(0.3, &narrow);
        let added = Some(&known);
        let got = Candle::modulated_norm_backward_adding(&x, &scale, &grad, 1e-5, added);
        let raw = added.map(|x| &x.raw);
        let want = Plain::modulated_norm_backward_adding(&x, &scale, &grad, 1e-5, raw);
        let (got, want) = (got.expect("gradients"), want.expect("gradients"));
        alike(&got.0, &want.0);
        alike(&got.1, &want.1);
        alike(&got.2, &want.2);

        for added in [None, added] {
            let got = Candle::gated_add(&x, &y, &scale, added).expect("a sum");
            let want = Plain::gated_add(&x, &y, &scale, added.map(|x| &x.raw)).expect("a sum");
            alike(&got, &want);
        }
        let got = Candle::gated_add_backward(&y, &scale, &grad).expect("gradients");
        let want = Plain::gated_add_backward(&y, &scale, &grad).expect("gradients");
        alike(&got.0, &want.0);
        alike(&got.1, &want.1);
    }
}
