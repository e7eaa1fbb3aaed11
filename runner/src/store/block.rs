//! Points of one series, packed into bytes.
//!
//! In: points in order of their steps. Out: `packs.data`, and what `blocks` keeps of it. Layout, numbers as LEB128
//! varints (signed ones zigzag):
//!
//! ```text
//! flags    1 byte: bit 0, values are f32; bit 1, steps are evenly spaced
//! count    number of points
//! first    first step
//! steps    evenly spaced: the distance, once; otherwise count - 1 distances
//! times    count signed differences, the first from 0: milliseconds after `series.base`
//! values   count little-endian floats; f32 if that loses nothing, as for most series of losses
//! ```
//!
//! Nothing is lost except the payload of a NaN.

/// A point within a series.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct BlockPoint {
    pub(super) step: i64,
    pub(super) value: f64,
    /// Milliseconds after the series' base.
    pub(super) at: i64,
}

/// A block's summary, available without unpacking it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Summary {
    pub(super) first_step: i64,
    pub(super) last_step: i64,
    pub(super) points: i64,
    /// How many values are not NaN; the next three fields cover only these.
    pub(super) numbers: i64,
    pub(super) sum: f64,
    pub(super) min: Option<f64>,
    pub(super) max: Option<f64>,
    pub(super) first_at: i64,
    pub(super) last_at: i64,
}

const F32: u8 = 1;
const EVEN: u8 = 2;

/// The bytes are not a block.
#[derive(Debug, thiserror::Error)]
#[error("a block of points is damaged")]
pub(super) struct Damaged;

impl Summary {
    /// The summary of at least one point, in order.
    pub(super) fn of(points: &[BlockPoint]) -> Self {
        let (mut numbers, mut sum) = (0, 0.0);
        let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
        for &BlockPoint { value, .. } in points {
            let is_number = !value.is_nan();
            numbers += i64::from(is_number);
            sum += if is_number { value } else { 0.0 };
            // Comparisons with NaN are false.
            min = if value < min { value } else { min };
            max = if value > max { value } else { max };
        }
        Self {
            first_step: points[0].step,
            last_step: points[points.len() - 1].step,
            points: points.len() as i64,
            numbers,
            sum,
            min: (numbers > 0).then_some(min),
            max: (numbers > 0).then_some(max),
            first_at: points[0].at,
            last_at: points[points.len() - 1].at,
        }
    }

    /// The summary of the points of both.
    pub(super) fn with(&self, other: &Self) -> Self {
        let either = |a: Option<f64>, b: Option<f64>, pick: fn(f64, f64) -> f64| match (a, b) {
            (Some(a), Some(b)) => Some(pick(a, b)),
            (a, b) => a.or(b),
        };
        Self {
            first_step: self.first_step.min(other.first_step),
            last_step: self.last_step.max(other.last_step),
            points: self.points + other.points,
            numbers: self.numbers + other.numbers,
            sum: self.sum + other.sum,
            min: either(self.min, other.min, f64::min),
            max: either(self.max, other.max, f64::max),
            first_at: self.first_at.min(other.first_at),
            last_at: self.last_at.max(other.last_at),
        }
    }
}

/// Packs points, which are in strictly ascending order of steps.
pub(super) fn pack(points: &[BlockPoint]) -> Vec<u8> {
    let narrow = points.iter().all(|point| {
        point.value.is_nan() || f64::from(point.value as f32).to_bits() == point.value.to_bits()
    });
    let distance = |pair: &[BlockPoint]| pair[1].step.wrapping_sub(pair[0].step).cast_unsigned();
    let stride = points.get(..2).map_or(1, distance);
    let even = points.windows(2).all(|pair| distance(pair) == stride);
    let mut bytes = Vec::with_capacity(16 + points.len() * if narrow { 6 } else { 10 });
    bytes.push(if narrow { F32 } else { 0 } | if even { EVEN } else { 0 });
    put(&mut bytes, points.len() as u64);
    put(
        &mut bytes,
        points.first().map_or(0, |point| zigzag(point.step)),
    );
    if even {
        put(&mut bytes, stride);
    } else {
        for pair in points.windows(2) {
            put(&mut bytes, distance(pair));
        }
    }
    let mut before = 0;
    for point in points {
        put(&mut bytes, zigzag(point.at.wrapping_sub(before)));
        before = point.at;
    }
    for point in points {
        if narrow {
            bytes.extend_from_slice(&(point.value as f32).to_le_bytes());
        } else {
            bytes.extend_from_slice(&point.value.to_le_bytes());
        }
    }
    bytes
}

/// The points of a block.
pub(super) fn unpack(bytes: &[u8]) -> Result<Vec<BlockPoint>, Damaged> {
    let (&flags, mut rest) = bytes.split_first().ok_or(Damaged)?;
    let count = usize::try_from(take(&mut rest)?).map_err(|_| Damaged)?;
    let width = if flags & F32 != 0 { 4 } else { 8 };
    // A damaged count must not make us allocate all memory.
    if count > bytes.len() / width {
        return Err(Damaged);
    }
    let mut points = Vec::with_capacity(count);
    let mut step = unzigzag(take(&mut rest)?);
    let stride = if flags & EVEN != 0 {
        Some(take(&mut rest)?)
    } else {
        None
    };
    for place in 0..count {
        if place > 0 {
            let distance = match stride {
                Some(stride) => stride,
                None => take(&mut rest)?,
            };
            step = step.wrapping_add_unsigned(distance);
        }
        points.push(BlockPoint {
            step,
            value: 0.0,
            at: 0,
        });
    }
    let mut at = 0_i64;
    for point in &mut points {
        at = at.wrapping_add(unzigzag(take(&mut rest)?));
        point.at = at;
    }
    if rest.len() != count * width {
        return Err(Damaged);
    }
    if width == 4 {
        for (point, bytes) in points.iter_mut().zip(rest.as_chunks::<4>().0) {
            point.value = f32::from_le_bytes(*bytes).into();
        }
    } else {
        for (point, bytes) in points.iter_mut().zip(rest.as_chunks::<8>().0) {
            point.value = f64::from_le_bytes(*bytes);
        }
    }
    Ok(points)
}

/// The points of a block as a JSON list of [step, value, milliseconds]. NaN is null; infinities are numbers too large
/// for a double, which SQLite reads as what they are.
pub(super) fn json(bytes: &[u8]) -> Result<String, Damaged> {
    use std::fmt::Write as _;
    let mut text = String::from("[");
    for point in unpack(bytes)? {
        let comma = if text.len() > 1 { "," } else { "" };
        let (step, at) = (point.step, point.at);
        // Writing to a string does not fail.
        let _ = match point.value {
            value if value.is_nan() => write!(text, "{comma}[{step},null,{at}]"),
            value if value.is_finite() => write!(text, "{comma}[{step},{value:?},{at}]"),
            value if value > 0.0 => write!(text, "{comma}[{step},9e999,{at}]"),
            _ => write!(text, "{comma}[{step},-9e999,{at}]"),
        };
    }
    text.push(']');
    Ok(text)
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}

fn put(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take(rest: &mut &[u8]) -> Result<u64, Damaged> {
    // Most numbers are small.
    if let [byte, after @ ..] = *rest
        && *byte < 0x80
    {
        *rest = after;
        return Ok(u64::from(*byte));
    }
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, after) = rest.split_first().ok_or(Damaged)?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(Damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(step: i64, value: f64, at: i64) -> BlockPoint {
        BlockPoint { step, value, at }
    }

    /// Packs and unpacks, and returns the bytes per point.
    #[track_caller]
    fn check(points: &[BlockPoint]) -> f64 {
        let bytes = pack(points);
        let back = unpack(&bytes).unwrap();
        assert_eq!(format!("{points:?}"), format!("{back:?}"));
        let bits = |points: &[BlockPoint]| -> Vec<u64> {
            let numbers = points.iter().filter(|point| !point.value.is_nan());
            numbers.map(|point| point.value.to_bits()).collect()
        };
        assert_eq!(bits(points), bits(&back));
        for cut in 0..bytes.len() {
            assert!(unpack(&bytes[..cut]).is_err(), "cut to {cut}");
        }
        bytes.len() as f64 / points.len() as f64
    }

    #[test]
    fn points_come_back_bit_by_bit() {
        check(&[point(0, 0.0, 0)]);
        check(&[point(i64::MAX, -0.0, i64::MIN)]);
        check(&[
            point(-3, f64::NAN, 5),
            point(i64::MAX, f64::NEG_INFINITY, -5),
        ]);
        check(&[
            point(1, 0.1, 3),
            point(2, f64::MIN_POSITIVE, 2),
            point(9, f64::INFINITY, 1),
        ]);
        let step = |step: i64| point(step * 10, 1.0 / step as f64, step * 7);
        assert!(check(&(1..500).map(step).collect::<Vec<_>>()) < 9.1);
        let narrow = |step: i64| point(step, f64::from(1.0 / step as f32), step * 7);
        assert!(check(&(1..500).map(narrow).collect::<Vec<_>>()) < 5.1);
    }

    #[test]
    fn a_summary_leaves_nan_out() {
        let points = [point(1, f64::NAN, 1), point(2, 3.0, 2), point(5, -1.0, 9)];
        let summary = Summary::of(&points);
        assert_eq!((summary.first_step, summary.last_step), (1, 5));
        assert_eq!((summary.points, summary.numbers), (3, 2));
        assert_eq!(
            (summary.sum, summary.min, summary.max),
            (2.0, Some(-1.0), Some(3.0))
        );
    }

    #[test]
    fn nonsense_is_no_block() {
        assert!(unpack(&[]).is_err());
        assert!(unpack(&[0, 0xff, 0xff, 0xff, 0xff, 0x7f]).is_err());
        assert!(unpack(&[0xff; 64]).is_err());
    }
}
