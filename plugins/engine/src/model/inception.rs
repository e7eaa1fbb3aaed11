//! The Inception network for comparing images: Inception-v3 (Szegedy et al. 2015, arXiv 1512.00567) in the variant of
//! December 2015 with which the Frechet distance was defined (Heusel et al. 2017, arXiv 1706.08500), as in pytorch-fid.
//! Parameter names are those of `pt_inception-2015-12-05-*.pth`.
//!
//! ```text
//! images (b, c, h, w) in [0, 1] -> 299 x 299 in [-1, 1] -> stem -> Mixed_5b .. Mixed_7c -> mean -> classes
//! ```
//!
//! It differs from today's Inception-v3: average pooling excludes the border, the last block uses max pooling, and there are
//! 1008 classes. Batch normalisations are folded into the convolutions. Deliberately absent: the auxiliary classifier.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::backend::{Backend, Unary, Window};
use crate::error::Result;
use crate::tape::Variable;
use crate::weights::{Init, Loader};

/// Side of the images the network sees.
const SIDE: usize = 299;
/// Rows of the classifier.
pub const CLASSES: usize = 1008;
/// Channels of the spatial features, and the side of their map.
const SPATIAL: (usize, usize) = (7, 17);
/// Spatial features of an image.
pub const SPATIAL_FEATURES: usize = SPATIAL.0 * SPATIAL.1 * SPATIAL.1;
/// Numbers of features of an image, by depth: after the first and the second pooling, before the auxiliary classifier,
/// and at the end, where the Frechet distance is usually taken.
pub const FEATURES: [usize; 4] = [64, 192, 768, 2048];

/// How images are resized and scaled for the network. The network was trained with TensorFlow's method; most figures from
/// PyTorch code use the other. They differ by a few percent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Preparation {
    /// Bilinear with pixels as areas (torch's `align_corners=False`), without antialiasing; 0..255 becomes -1..1. As
    /// pytorch-fid.
    #[default]
    Pytorch,
    /// Bilinear with pixels as points, aligned at the first pixel; 0..255 becomes -1..127/128. As ADM's evaluation suite
    /// (TensorFlow 1) and torch-fidelity.
    Tensorflow,
}

impl Preparation {
    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pytorch => "pytorch",
            Self::Tensorflow => "tensorflow",
        }
    }

    /// A description, for people.
    pub fn describe(self) -> String {
        let how = match self {
            Self::Pytorch => "with pixels as areas, as pytorch-fid",
            Self::Tensorflow => "with pixels as points, as ADM's suite and torch-fidelity",
        };
        format!(
            "{}: resized to {SIDE} x {SIDE} bilinearly {how}",
            self.name()
        )
    }
}

/// The network.
pub struct Inception<B: Backend> {
    stem: Vec<Unit<B>>,
    blocks: Vec<Block<B>>,
    classifier: Variable<B>,
}

/// The network's outputs.
pub struct Outputs<B: Backend> {
    /// Means over the map at the depths of [`FEATURES`], each (b, d).
    pub features: [Variable<B>; 4],
    /// The first seven channels of the first branch of Mixed_6d, (b, 2023): row by row, channels last, as ADM's
    /// evaluation suite orders them.
    pub spatial: Variable<B>,
    /// Logits of the classes without their biases (b, 1008): for the inception score.
    pub logits: Variable<B>,
}

impl<B: Backend> Inception<B> {
    /// Takes the parameters.
    pub fn load(loader: &mut Loader<B>) -> Result<Self> {
        let l = loader;
        let stem = vec![
            Unit::valid(l, "Conv2d_1a_3x3", [3, 32], 3, 2)?,
            Unit::valid(l, "Conv2d_2a_3x3", [32, 32], 3, 1)?,
            Unit::same(l, "Conv2d_2b_3x3", [32, 64], [3, 3])?,
            Unit::valid(l, "Conv2d_3b_1x1", [64, 80], 1, 1)?,
            Unit::valid(l, "Conv2d_4a_3x3", [80, 192], 3, 1)?,
        ];
        let blocks = vec![
            Block::a(l, "Mixed_5b", 192, 32)?,
            Block::a(l, "Mixed_5c", 256, 64)?,
            Block::a(l, "Mixed_5d", 288, 64)?,
            Block::b(l, "Mixed_6a", 288)?,
            Block::c(l, "Mixed_6b", 768, 128)?,
            Block::c(l, "Mixed_6c", 768, 160)?,
            Block::c(l, "Mixed_6d", 768, 160)?,
            Block::c(l, "Mixed_6e", 768, 192)?,
            Block::d(l, "Mixed_7a", 768)?,
            Block::e(l, "Mixed_7b", 1280, Pool::Mean)?,
            Block::e(l, "Mixed_7c", 2048, Pool::Max)?,
        ];
        let bound = (2048f32).sqrt().recip();
        Ok(Self {
            stem,
            blocks,
            classifier: l.get("fc.weight", &[CLASSES, 2048], Init::Uniform(bound))?,
        })
    }

    /// Runs the network on images (b, c, h, w) in [0, 1]; c is 3, or 1 for grey.
    pub fn look(&self, images: &Variable<B>, preparation: Preparation) -> Result<Outputs<B>> {
        let shape = images.shape();
        // Grey becomes three equal colours.
        let colours = images.expand(&[shape[0], 3, shape[2], shape[3]])?;
        let stretch = match preparation {
            Preparation::Pytorch => 2.0,
            Preparation::Tensorflow => 255.0 / 128.0,
        };
        let mut x = resize(&colours, preparation)?.affine(stretch, -1.0)?;
        for unit in &self.stem[..3] {
            x = unit.forward(&x)?;
        }
        x = x.max_pool2d(HALVE)?; // (b, 64, 73, 73)
        let first = mean(&x)?;
        for unit in &self.stem[3..] {
            x = unit.forward(&x)?;
        }
        x = x.max_pool2d(HALVE)?; // (b, 192, 35, 35)
        let second = mean(&x)?;
        let (mut spatial, mut third) = (None, None);
        for block in &self.blocks {
            let branches = block.branches(&x)?;
            if block.name == "Mixed_6d" {
                spatial = Some(branches[0].narrow(1, 0, SPATIAL.0)?);
            }
            x = Variable::cat(&branches.iter().collect::<Vec<_>>(), 1)?;
            if block.name == "Mixed_6e" {
                third = Some(mean(&x)?);
            }
        }
        let last = mean(&x)?;
        let spatial = spatial.expect("Mixed_6d is a block");
        Ok(Outputs {
            logits: last.linear(&self.classifier, None)?,
            spatial: spatial
                .permute(&[0, 2, 3, 1])?
                .reshape(&[shape[0], SPATIAL_FEATURES])?,
            features: [first, second, third.expect("Mixed_6e is a block"), last],
        })
    }
}

/// A convolution with its folded batch normalisation, and ReLU.
struct Unit<B: Backend> {
    weight: Variable<B>,
    bias: Variable<B>,
    stride: usize,
    padding: [usize; 2],
}

impl<B: Backend> Unit<B> {
    /// A kernel that keeps the size.
    fn same(
        l: &mut Loader<B>,
        name: &str,
        channels: [usize; 2],
        kernel: [usize; 2],
    ) -> Result<Self> {
        Self::load(l, name, channels, kernel, (1, kernel.map(|k| k / 2)))
    }

    /// A square kernel that stays inside.
    fn valid(
        l: &mut Loader<B>,
        name: &str,
        channels: [usize; 2],
        kernel: usize,
        stride: usize,
    ) -> Result<Self> {
        Self::load(l, name, channels, [kernel; 2], (stride, [0, 0]))
    }

    fn load(
        l: &mut Loader<B>,
        name: &str,
        [input, output]: [usize; 2],
        [kh, kw]: [usize; 2],
        (stride, padding): (usize, [usize; 2]),
    ) -> Result<Self> {
        let bound = (6.0 / (input * kh * kw) as f32).sqrt();
        let kernel = l.get(
            &format!("{name}.conv.weight"),
            &[output, input, kh, kw],
            Init::Uniform(bound),
        )?;
        let mut norm = |part: &str, start| {
            l.get(
                &format!("{name}.bn.{part}"),
                &[output],
                Init::Constant(start),
            )
        };
        let (gamma, beta) = (norm("weight", 1.0)?, norm("bias", 0.0)?);
        let (mean, variance) = (norm("running_mean", 0.0)?, norm("running_var", 1.0)?);
        // gamma (w * x - mean) / sqrt(variance + eps) + beta
        let scale = variance
            .affine(1.0, 1e-3)?
            .unary(Unary::Sqrt)?
            .unary(Unary::Recip)?
            .mul(&gamma)?;
        Ok(Self {
            weight: kernel.mul(&scale.reshape(&[output, 1, 1, 1])?)?,
            bias: beta.sub(&mean.mul(&scale)?)?,
            stride,
            padding,
        })
    }

    fn forward(&self, x: &Variable<B>) -> Result<Variable<B>> {
        x.conv2d_bias(&self.weight, &self.bias, None, self.stride, self.padding)?
            .unary(Unary::Relu)
    }
}

/// How a branch pools first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pool {
    None,
    /// Mean of the 3 x 3 neighbours that lie inside.
    Mean,
    /// Maximum of the 3 x 3 neighbours.
    Max,
    /// Maximum of 3 x 3 windows two pixels apart.
    Halve,
}

/// 3 x 3 windows two pixels apart.
const HALVE: Window = Window {
    size: 3,
    stride: 2,
    padding: 0,
};

/// A branch of a block: a pooling, units in sequence, and parallel units at the end.
struct Branch<B: Backend> {
    pool: Pool,
    units: Vec<Unit<B>>,
    last: Vec<Unit<B>>,
}

impl<B: Backend> Branch<B> {
    fn of(units: Vec<Unit<B>>) -> Self {
        Self::pooled(Pool::None, units)
    }

    fn pooled(pool: Pool, units: Vec<Unit<B>>) -> Self {
        Self {
            pool,
            units,
            last: Vec::new(),
        }
    }

    fn forward(&self, x: &Variable<B>) -> Result<Variable<B>> {
        let mut x = match self.pool {
            Pool::None => x.clone(),
            Pool::Mean => neighbours(x)?,
            Pool::Max => x.max_pool2d(Window {
                size: 3,
                stride: 1,
                padding: 1,
            })?,
            Pool::Halve => x.max_pool2d(HALVE)?,
        };
        for unit in &self.units {
            x = unit.forward(&x)?;
        }
        if self.last.is_empty() {
            return Ok(x);
        }
        let ends = self.last.iter().map(|unit| unit.forward(&x));
        let ends = ends.collect::<Result<Vec<_>>>()?;
        Variable::cat(&ends.iter().collect::<Vec<_>>(), 1)
    }
}

/// Branches whose outputs are the channels of the next block's input, in this order.
struct Block<B: Backend> {
    name: &'static str,
    branches: Vec<Branch<B>>,
}

impl<B: Backend> Block<B> {
    fn branches(&self, x: &Variable<B>) -> Result<Vec<Variable<B>>> {
        self.branches.iter().map(|b| b.forward(x)).collect()
    }

    fn a(l: &mut Loader<B>, name: &'static str, input: usize, pooled: usize) -> Result<Self> {
        let mut unit = |part: &str, channels, kernel| {
            Unit::same(l, &format!("{name}.{part}"), channels, kernel)
        };
        let branches = vec![
            Branch::of(vec![unit("branch1x1", [input, 64], [1, 1])?]),
            Branch::of(vec![
                unit("branch5x5_1", [input, 48], [1, 1])?,
                unit("branch5x5_2", [48, 64], [5, 5])?,
            ]),
            Branch::of(vec![
                unit("branch3x3dbl_1", [input, 64], [1, 1])?,
                unit("branch3x3dbl_2", [64, 96], [3, 3])?,
                unit("branch3x3dbl_3", [96, 96], [3, 3])?,
            ]),
            Branch::pooled(
                Pool::Mean,
                vec![unit("branch_pool", [input, pooled], [1, 1])?],
            ),
        ];
        Ok(Self { name, branches })
    }

    fn b(l: &mut Loader<B>, name: &'static str, input: usize) -> Result<Self> {
        let branches = vec![
            Branch::of(vec![Unit::valid(
                l,
                &format!("{name}.branch3x3"),
                [input, 384],
                3,
                2,
            )?]),
            Branch::of(vec![
                Unit::same(l, &format!("{name}.branch3x3dbl_1"), [input, 64], [1, 1])?,
                Unit::same(l, &format!("{name}.branch3x3dbl_2"), [64, 96], [3, 3])?,
                Unit::valid(l, &format!("{name}.branch3x3dbl_3"), [96, 96], 3, 2)?,
            ]),
            Branch::pooled(Pool::Halve, Vec::new()),
        ];
        Ok(Self { name, branches })
    }

    fn c(l: &mut Loader<B>, name: &'static str, input: usize, narrow: usize) -> Result<Self> {
        let (row, column) = ([1, 7], [7, 1]);
        let mut unit = |part: &str, channels, kernel| {
            Unit::same(l, &format!("{name}.{part}"), channels, kernel)
        };
        let branches = vec![
            Branch::of(vec![unit("branch1x1", [input, 192], [1, 1])?]),
            Branch::of(vec![
                unit("branch7x7_1", [input, narrow], [1, 1])?,
                unit("branch7x7_2", [narrow, narrow], row)?,
                unit("branch7x7_3", [narrow, 192], column)?,
            ]),
            Branch::of(vec![
                unit("branch7x7dbl_1", [input, narrow], [1, 1])?,
                unit("branch7x7dbl_2", [narrow, narrow], column)?,
                unit("branch7x7dbl_3", [narrow, narrow], row)?,
                unit("branch7x7dbl_4", [narrow, narrow], column)?,
                unit("branch7x7dbl_5", [narrow, 192], row)?,
            ]),
            Branch::pooled(Pool::Mean, vec![unit("branch_pool", [input, 192], [1, 1])?]),
        ];
        Ok(Self { name, branches })
    }

    fn d(l: &mut Loader<B>, name: &'static str, input: usize) -> Result<Self> {
        let part = |part: &str| format!("{name}.{part}");
        let branches = vec![
            Branch::of(vec![
                Unit::same(l, &part("branch3x3_1"), [input, 192], [1, 1])?,
                Unit::valid(l, &part("branch3x3_2"), [192, 320], 3, 2)?,
            ]),
            Branch::of(vec![
                Unit::same(l, &part("branch7x7x3_1"), [input, 192], [1, 1])?,
                Unit::same(l, &part("branch7x7x3_2"), [192, 192], [1, 7])?,
                Unit::same(l, &part("branch7x7x3_3"), [192, 192], [7, 1])?,
                Unit::valid(l, &part("branch7x7x3_4"), [192, 192], 3, 2)?,
            ]),
            Branch::pooled(Pool::Halve, Vec::new()),
        ];
        Ok(Self { name, branches })
    }

    fn e(l: &mut Loader<B>, name: &'static str, input: usize, pool: Pool) -> Result<Self> {
        let mut unit = |part: &str, channels, kernel| {
            Unit::same(l, &format!("{name}.{part}"), channels, kernel)
        };
        let branches = vec![
            Branch::of(vec![unit("branch1x1", [input, 320], [1, 1])?]),
            Branch {
                pool: Pool::None,
                units: vec![unit("branch3x3_1", [input, 384], [1, 1])?],
                last: vec![
                    unit("branch3x3_2a", [384, 384], [1, 3])?,
                    unit("branch3x3_2b", [384, 384], [3, 1])?,
                ],
            },
            Branch {
                pool: Pool::None,
                units: vec![
                    unit("branch3x3dbl_1", [input, 448], [1, 1])?,
                    unit("branch3x3dbl_2", [448, 384], [3, 3])?,
                ],
                last: vec![
                    unit("branch3x3dbl_3a", [384, 384], [1, 3])?,
                    unit("branch3x3dbl_3b", [384, 384], [3, 1])?,
                ],
            },
            Branch::pooled(pool, vec![unit("branch_pool", [input, 192], [1, 1])?]),
        ];
        Ok(Self { name, branches })
    }
}

/// Means over the map: (b, c, h, w) -> (b, c).
fn mean<B: Backend>(x: &Variable<B>) -> Result<Variable<B>> {
    let s = x.shape();
    x.mean(&[2, 3])?.reshape(&s[..2])
}

/// Mean of the 3 x 3 neighbours of each pixel, excluding those outside.
fn neighbours<B: Backend>(x: &Variable<B>) -> Result<Variable<B>> {
    let s = x.shape();
    let (h, w) = (s[2], s[3]);
    let ones = Variable::constant(B::of(x.value()).floats(&[1.0; 9], &[1, 1, 3, 3])?);
    let inside = |i: usize, n: usize| 3 - usize::from(i == 0) - usize::from(i + 1 == n);
    let share: Vec<f32> = (0..h * w)
        .map(|i| ((inside(i / w, h) * inside(i % w, w)) as f32).recip())
        .collect();
    let share = Variable::constant(B::of(x.value()).floats(&share, &[h, w])?);
    // Each channel is a separate image.
    x.reshape(&[s[0] * s[1], 1, h, w])?
        .conv2d(&ones, 1, [1, 1])?
        .mul(&share)?
        .reshape(&s)
}

/// Bilinear interpolation to [`SIDE`] x [`SIDE`].
fn resize<B: Backend>(x: &Variable<B>, preparation: Preparation) -> Result<Variable<B>> {
    let &[b, c, h, w] = &x.shape()[..] else {
        unreachable!("images have rank 4")
    };
    let axis = |n: usize| {
        let matrix = bilinear(n, SIDE, preparation);
        Ok::<_, crate::Error>(Variable::constant(
            B::of(x.value()).floats(&matrix, &[SIDE, n])?,
        ))
    };
    let mut y = x.clone();
    if w != SIDE {
        y = y.reshape(&[b * c * h, w])?.linear(&axis(w)?, None)?;
    }
    y = y.reshape(&[b, c, h, SIDE])?;
    if h != SIDE {
        y = y
            .permute(&[0, 1, 3, 2])?
            .reshape(&[b * c * SIDE, h])?
            .linear(&axis(h)?, None)?
            .reshape(&[b, c, SIDE, SIDE])?
            .permute(&[0, 1, 3, 2])?;
    }
    Ok(y)
}

/// The matrix (to, from) of the interpolation along one side.
fn bilinear(from: usize, to: usize, preparation: Preparation) -> Vec<f32> {
    // The source position of a pixel's centre.
    let centre = match preparation {
        Preparation::Pytorch => 0.5,
        Preparation::Tensorflow => 0.0,
    };
    let mut matrix = vec![0.0; to * from];
    for (i, row) in matrix.chunks_exact_mut(from).enumerate() {
        let at = ((i as f64 + centre) * from as f64 / to as f64 - centre).max(0.0);
        let low = at as usize;
        let high = (low + 1).min(from - 1);
        let share = (at - low as f64) as f32;
        row[low] += 1.0 - share;
        row[high] += share;
    }
    matrix
}
