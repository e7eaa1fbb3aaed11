//! LPIPS, the learned perceptual distance of images (Zhang et al. 2018, arXiv 1801.03924, eq. 1; version 0.1), on VGG-16
//! (Simonyan and Zisserman 2014, arXiv 1409.1556, configuration D). Parameter names are those of torchvision's
//! `vgg16-*.pth` and of the published linear layers `vgg.pth`.
//!
//! ```text
//! images (b, c, h, w) -> VGG-16 -> five maps, each pixel's channels made a unit vector
//! distance (b) = sum over the maps of the mean over pixels of lin * (difference)^2
//! ```
//!
//! Differentiable in both images. Deliberately absent: the other trunks (AlexNet, SqueezeNet), distances per pixel.

use crate::backend::{Backend, Unary, Window};
use crate::error::Result;
use crate::tape::Variable;
use crate::weights::{Init, Loader};

/// The convolutions of VGG-16 by stage: index in torchvision's `features`, and channels. Each stage ends with a compared map;
/// the next begins with a pooling.
const STAGES: [(&[usize], usize); 5] = [
    (&[0, 2], 64),
    (&[5, 7], 128),
    (&[10, 12, 14], 256),
    (&[17, 19, 21], 512),
    (&[24, 26, 28], 512),
];

/// Minimum side of an image: the fourth pooling must leave a pixel.
pub const LEAST_SIDE: usize = 16;

/// Mean and deviation of the colours the networks were trained on, for pixels in [-1, 1].
const SHIFT: [f32; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f32; 3] = [0.458, 0.448, 0.450];

/// The network with its linear layers.
pub struct Lpips<B: Backend> {
    /// Weights and biases of the convolutions of each stage.
    stages: Vec<Vec<(Variable<B>, Variable<B>)>>,
    /// Weights of the channels of each map, (c, 1, 1).
    linear: Vec<Variable<B>>,
    /// x * mul + add standardises colours, each (3, 1, 1).
    colours: (Variable<B>, Variable<B>),
}

impl<B: Backend> Lpips<B> {
    /// Takes the parameters: of VGG-16 and of the linear layers.
    pub fn load(vgg: &mut Loader<B>, linear: &mut Loader<B>) -> Result<Self> {
        let mut stages = Vec::new();
        let mut lin = Vec::new();
        let mut input = 3;
        for (map, (indices, channels)) in STAGES.into_iter().enumerate() {
            let mut convolutions = Vec::new();
            for index in indices {
                let name = format!("features.{index}");
                let bound = (6.0 / (9 * input) as f32).sqrt();
                convolutions.push((
                    vgg.get(
                        &format!("{name}.weight"),
                        &[channels, input, 3, 3],
                        Init::Uniform(bound),
                    )?,
                    vgg.get(&format!("{name}.bias"), &[channels], Init::Constant(0.0))?,
                ));
                input = channels;
            }
            stages.push(convolutions);
            let name = format!("lin{map}.model.1.weight");
            let equal = Init::Constant((channels as f32).recip());
            lin.push(
                linear
                    .get(&name, &[1, channels, 1, 1], equal)?
                    .reshape(&[channels, 1, 1])?,
            );
        }
        let backend = vgg.backend();
        let colour = |f: &dyn Fn(usize) -> f32| {
            let values = [0, 1, 2].map(f);
            Ok::<_, crate::Error>(Variable::constant(backend.floats(&values, &[3, 1, 1])?))
        };
        Ok(Self {
            stages,
            linear: lin,
            colours: (
                colour(&|i| SCALE[i].recip())?,
                colour(&|i| -SHIFT[i] / SCALE[i])?,
            ),
        })
    }

    /// Distances (b) of images (b, c, h, w) in [-1, 1]; c is 3, or 1 for grey; sides of at least [`LEAST_SIDE`].
    pub fn distance(&self, a: &Variable<B>, b: &Variable<B>) -> Result<Variable<B>> {
        let batch = a.shape()[0];
        let mut sum: Option<Variable<B>> = None;
        for ((a, b), linear) in self.maps(a)?.iter().zip(self.maps(b)?).zip(&self.linear) {
            let s = a.shape();
            let square = a.sub(&b)?.unary(Unary::Square)?;
            let term = square
                .mul(linear)?
                .sum(&[1, 2, 3])?
                .affine(1.0 / (s[2] * s[3]) as f64, 0.0)?;
            sum = Some(match sum {
                Some(sum) => sum.add(&term)?,
                None => term,
            });
        }
        sum.expect("five maps").reshape(&[batch])
    }

    /// The five maps of images, with unit vectors of channels.
    fn maps(&self, images: &Variable<B>) -> Result<Vec<Variable<B>>> {
        // Grey is broadcast to three colours.
        let mut x = images.mul(&self.colours.0)?.add(&self.colours.1)?;
        let halve = Window {
            size: 2,
            stride: 2,
            padding: 0,
        };
        let mut maps = Vec::new();
        for (i, convolutions) in self.stages.iter().enumerate() {
            if i > 0 {
                x = x.max_pool2d(halve)?;
            }
            for (weight, bias) in convolutions {
                x = x
                    .conv2d_bias(weight, bias, None, 1, [1, 1])?
                    .unary(Unary::Relu)?;
            }
            maps.push(unit(&x)?);
        }
        Ok(maps)
    }
}

/// x / (|x| + 1e-10) over the channels. The added 1e-20 under the root changes no value, and keeps the gradient of a pixel
/// without any activation finite: 0.
pub fn unit<B: Backend>(x: &Variable<B>) -> Result<Variable<B>> {
    let norm = x
        .unary(Unary::Square)?
        .sum(&[1])?
        .affine(1.0, 1e-20)?
        .unary(Unary::Sqrt)?;
    x.mul(&norm.affine(1.0, 1e-10)?.unary(Unary::Recip)?)
}
