//! Points drawn at random: a pure function of seed, point and parameter.

use std::collections::HashSet;

use super::{Parameter, Values};

/// Draws that give nothing new, after which no more are made.
const IN_VAIN: u64 = 100_000;

/// So many points, each once. Fewer, where there are hardly any more to be found.
pub(super) fn points(parameters: &[Parameter], count: u32, seed: u64) -> Vec<Vec<String>> {
    let mut found: Vec<Vec<String>> = Vec::new();
    let mut seen = HashSet::new();
    let mut new = 0;
    for number in 0..u64::from(count) * 1000 {
        if number - new > IN_VAIN {
            break;
        }
        let point: Vec<String> = (0_u64..)
            .zip(parameters)
            .map(|(place, Parameter { path, values })| {
                format!("{path}={}", draw(values, part(seed, number, place)))
            })
            .collect();
        if seen.insert(point.clone()) {
            found.push(point);
            new = number;
        }
        if found.len() == count as usize {
            break;
        }
    }
    found
}

/// The value at this part of all values.
fn draw(values: &Values, part: f64) -> String {
    match values {
        Values::Choice(items) => values.at((part * items.len() as f64) as u64),
        Values::Whole { min, max, log } => {
            let (low, high) = (*min as f64, *max as f64 + 1.0);
            let value = between(low, high, *log, part).floor();
            (value as i64).clamp(*min, *max).to_string()
        }
        Values::Real { min, max, log, .. } => plain(between(*min, *max, *log, part)),
    }
}

/// A number from 0 to 1, without 1.
fn part(seed: u64, number: u64, place: u64) -> f64 {
    let mut hasher = blake3::Hasher::new_derive_key("retort sweep: a point");
    for value in [seed, number, place] {
        hasher.update(&value.to_le_bytes());
    }
    let mut bytes = [0; 8];
    hasher.finalize_xof().fill(&mut bytes);
    // 53 bits: as many as a double has.
    (u64::from_le_bytes(bytes) >> 11) as f64 / (1_u64 << 53) as f64
}

/// A number between two, at this part of the way.
pub(super) fn between(min: f64, max: f64, log: bool, part: f64) -> f64 {
    match log {
        false => min + part * (max - min),
        true => (min.ln() + part * (max.ln() - min.ln())).exp(),
    }
    .clamp(min, max)
}

/// A number with six digits, as people write it.
pub(super) fn plain(value: f64) -> String {
    let value: f64 = format!("{value:.5e}").parse().unwrap_or(value);
    match value.abs() {
        0.0 | 1e-4..1e7 => value.to_string(),
        _ => format!("{value:e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(texts: &[&str]) -> Vec<Parameter> {
        texts
            .iter()
            .map(|text| Parameter::parse(text).unwrap())
            .collect()
    }

    #[test]
    fn a_seed_draws_the_same_points_and_another_seed_others() {
        let space = parameters(&["a=log:1e-4..1e-2", "b=x,y,z", "seed=1..1000"]);
        let first = points(&space, 20, 1);
        assert_eq!(first.len(), 20);
        assert_eq!(first, points(&space, 20, 1));
        assert_ne!(first, points(&space, 20, 2));
        // More points begin with the same.
        assert_eq!(first[..], points(&space, 30, 1)[..20]);
    }

    #[test]
    fn values_are_within_their_range_and_spread_over_it() {
        let space = parameters(&["a=log:1e-4..1e-2", "b=-3..3"]);
        let drawn = points(&space, 400, 7);
        let value = |point: &Vec<String>, place: usize| -> f64 {
            point[place].split_once('=').unwrap().1.parse().unwrap()
        };
        let below = drawn.iter().filter(|point| value(point, 0) < 1e-3).count();
        assert!((150..250).contains(&below), "{below}");
        for point in &drawn {
            assert!((1e-4..=1e-2).contains(&value(point, 0)), "{point:?}");
            assert!((-3.0..=3.0).contains(&value(point, 1)), "{point:?}");
        }
        for whole in -3..=3 {
            assert!(
                drawn
                    .iter()
                    .any(|point| value(point, 1) == f64::from(whole))
            );
        }
    }

    #[test]
    fn each_point_is_drawn_once() {
        let space = parameters(&["a=1..20"]);
        let drawn = points(&space, 19, 3);
        assert_eq!(drawn.len(), 19);
        assert_eq!(drawn.iter().collect::<HashSet<_>>().len(), 19);
    }
}
