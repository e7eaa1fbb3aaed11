//! A sweep as a picture: parallel coordinates, and the objective over each parameter, as one SVG document.
//!
//! In: an axis for each parameter, a line for each point. Colours go from the best value (blue) to the worst (orange).

use std::collections::BTreeSet;
use std::fmt::Write as _;

use crate::chart::escaped;
use crate::sweep::{Goal, Objective, Parameter};
use crate::table::number;

/// A parameter, with the place of each point on its axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    /// The parameter.
    pub path: String,
    /// Where each point is: its number, or the number of its text among all.
    pub places: Vec<f64>,
    /// The texts, where values are no numbers.
    pub texts: Vec<String>,
    /// Whether the numbers are shown by their logarithm.
    pub log: bool,
}

/// A point with a value.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// What it is called.
    pub label: String,
    /// The objective.
    pub value: f64,
}

/// The value in a setting `path=value`.
pub fn value_of(setting: &str) -> &str {
    setting.split_once('=').map_or(setting, |(_, value)| value)
}

/// Axes of a sweep's parameters and lines of its points, each with its number, its settings and the objective.
pub fn of_points<'a>(
    parameters: &[Parameter],
    points: impl Iterator<Item = (u32, &'a [String], f64)> + Clone,
) -> (Vec<Axis>, Vec<Line>) {
    let axis = |(place, parameter): (usize, &Parameter)| {
        let values = points.clone().map(|(_, settings, _)| {
            value_of(settings.get(place).map_or("", String::as_str)).to_owned()
        });
        Axis::of(parameter.path.clone(), values.collect())
    };
    let line = |(number, _, value): (u32, &[String], f64)| Line {
        label: format!("point {number}"),
        value,
    };
    let axes = parameters.iter().enumerate().map(axis).collect();
    (axes, points.clone().map(line).collect())
}

impl Axis {
    /// The axis of these values. Numbers that span more than two powers of ten go by their logarithm.
    pub fn of(path: String, values: Vec<String>) -> Self {
        let numbers: Option<Vec<f64>> = values
            .iter()
            .map(|value| value.parse().ok().filter(|number: &f64| number.is_finite()))
            .collect();
        if let Some(numbers) = numbers {
            let least = numbers.iter().copied().fold(f64::INFINITY, f64::min);
            let most = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log = least > 0.0 && most / least >= 99.0;
            return Self {
                path,
                places: match log {
                    true => numbers.iter().map(|number| number.log10()).collect(),
                    false => numbers,
                },
                texts: Vec::new(),
                log,
            };
        }
        let texts: BTreeSet<&String> = values.iter().collect();
        let texts: Vec<String> = texts.into_iter().cloned().collect();
        let place = |value: &String| texts.iter().position(|text| text == value);
        Self {
            path,
            places: values
                .iter()
                .map(|value| place(value).unwrap_or_default() as f64)
                .collect(),
            texts,
            log: false,
        }
    }

    /// What the axis is, in a line.
    pub fn caption(&self) -> String {
        if self.log {
            return format!("{} (log10)", self.path);
        }
        if self.texts.is_empty() {
            return self.path.clone();
        }
        let names = self.texts.iter().enumerate();
        let names: Vec<String> = names
            .map(|(place, text)| format!("{place}: {}", brief(text)))
            .collect();
        format!("{} ({})", self.path, names.join(", "))
    }

    fn ends(&self) -> (f64, f64) {
        ends(self.places.iter().copied())
    }

    /// What stands at a place.
    fn text(&self, place: f64) -> String {
        match (self.texts.is_empty(), self.log) {
            (false, _) => self
                .texts
                .get(place.round() as usize)
                .map_or_else(String::new, |text| brief(text)),
            (true, true) => number(10_f64.powf(place)),
            (true, false) => number(place),
        }
    }
}

/// The least and the greatest; apart, so that there is something between them.
fn ends(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (least, most) = values.fold(
        (f64::INFINITY, f64::NEG_INFINITY),
        |(least, most), value| (least.min(value), most.max(value)),
    );
    match most > least {
        true => (least, most),
        false => (least - 0.5, most + 0.5),
    }
}

/// A text that may be long.
fn brief(text: &str) -> String {
    match text.char_indices().nth(18) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

const W: f64 = 980.0;
const TOP: f64 = 56.0;
const HEIGHT: f64 = 300.0;
const SIDE: f64 = 90.0;

/// The picture.
pub fn svg(axes: &[Axis], lines: &[Line], objective: &Objective) -> String {
    let slice_rows = axes.len().div_ceil(2) as f64;
    let height = TOP + HEIGHT + 60.0 + slice_rows * 260.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {W} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let values = ends(lines.iter().map(|line| line.value));
    parallel(axes, lines, objective, values, &mut svg);
    for (place, axis) in axes.iter().enumerate() {
        let left = if place % 2 == 0 { 0.0 } else { W / 2.0 };
        let top = TOP + HEIGHT + 60.0 + (place / 2) as f64 * 260.0;
        slice(axis, lines, objective, (left, top), &mut svg);
    }
    svg + "</svg>\n"
}

/// How good a value is: 0 is the best, 1 the worst.
fn rank(value: f64, (least, most): (f64, f64), goal: Goal) -> f64 {
    let part = (value - least) / (most - least);
    match goal {
        Goal::Min => part,
        Goal::Max => 1.0 - part,
    }
}

/// From blue to orange.
fn color(rank: f64) -> String {
    let mix = |from: f64, to: f64| (from + (to - from) * rank.clamp(0.0, 1.0)).round();
    format!(
        "rgb({},{},{})",
        mix(0.0, 230.0),
        mix(90.0, 140.0),
        mix(178.0, 0.0)
    )
}

fn parallel(
    axes: &[Axis],
    lines: &[Line],
    objective: &Objective,
    values: (f64, f64),
    svg: &mut String,
) {
    let step = (W - 2.0 * SIDE) / axes.len().max(1) as f64;
    let x = |place: usize| SIDE + step * place as f64;
    let y = |value: f64, (least, most): (f64, f64)| {
        TOP + HEIGHT - (value - least) / (most - least) * HEIGHT
    };
    // The best last, above the others.
    for (place, line) in lines.iter().enumerate().rev() {
        let rank = rank(line.value, values, objective.goal);
        let mut points: Vec<String> = axes
            .iter()
            .enumerate()
            .map(|(at, axis)| format!("{:.1} {:.1}", x(at), y(axis.places[place], axis.ends())))
            .collect();
        points.push(format!("{:.1} {:.1}", x(axes.len()), y(line.value, values)));
        let _ = writeln!(
            svg,
            "<path d=\"M{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"{}\" stroke-opacity=\"0.8\"><title>{}: {}</title></path>",
            points.join("L"),
            color(rank),
            if place == 0 { 3 } else { 1 },
            escaped(&line.label),
            number(line.value)
        );
    }
    let mut vertical = |at: f64, name: &str, low: String, high: String| {
        let _ = writeln!(
            svg,
            "<path d=\"M{at:.1} {TOP}v{HEIGHT}\" stroke=\"#444\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-weight=\"bold\">{}</text>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            TOP - 24.0,
            escaped(name),
            TOP - 8.0,
            escaped(&high),
            TOP + HEIGHT + 16.0,
            escaped(&low)
        );
    };
    for (place, axis) in axes.iter().enumerate() {
        let (least, most) = axis.ends();
        vertical(
            x(place),
            last_steps(&axis.path),
            axis.text(least),
            axis.text(most),
        );
    }
    vertical(
        x(axes.len()),
        last_steps(&objective.metric),
        number(values.0),
        number(values.1),
    );
}

/// The end of a path, which says the most.
fn last_steps(path: &str) -> &str {
    match path.char_indices().nth_back(23) {
        Some((start, _)) => path[start..]
            .find(['.', '/'])
            .map_or(&path[start..], |at| &path[start + at + 1..]),
        None => path,
    }
}

fn slice(
    axis: &Axis,
    lines: &[Line],
    objective: &Objective,
    (left, top): (f64, f64),
    svg: &mut String,
) {
    let (width, height) = (W / 2.0 - SIDE - 40.0, 190.0);
    let left = left + SIDE;
    let (low, high) = axis.ends();
    let values = ends(lines.iter().map(|line| line.value));
    let x = |place: f64| left + (place - low) / (high - low) * width;
    let y = |value: f64| top + height - (value - values.0) / (values.1 - values.0) * height;
    let _ = writeln!(
        svg,
        "<path d=\"M{left} {top}v{height}h{width}\" fill=\"none\" stroke=\"#444\"/>\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-weight=\"bold\">{}</text>\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
         <text x=\"{left:.1}\" y=\"{:.1}\">{}</text>\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
        left + width / 2.0,
        top + height + 36.0,
        escaped(&axis.path),
        left - 6.0,
        top + 10.0,
        number(values.1),
        left - 6.0,
        top + height,
        number(values.0),
        top + height + 16.0,
        escaped(&axis.text(low)),
        left + width,
        top + height + 16.0,
        escaped(&axis.text(high)),
    );
    for (&place, line) in axis.places.iter().zip(lines).rev() {
        let _ = writeln!(
            svg,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"{}\" fill-opacity=\"0.8\"><title>{}: {}</title></circle>",
            x(place),
            y(line.value),
            color(rank(line.value, values, objective.goal)),
            escaped(&line.label),
            number(line.value)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_of_numbers_or_texts() {
        let axis = |values: &[&str]| {
            Axis::of(
                "p".into(),
                values.iter().map(|value| (*value).into()).collect(),
            )
        };
        assert_eq!(axis(&["1", "2.5"]).places, [1.0, 2.5]);
        assert_eq!(axis(&["1e-4", "1e-2"]).places, [-4.0, -2.0]);
        let texts = axis(&["b", "a", "b"]);
        assert_eq!(texts.places, [1.0, 0.0, 1.0]);
        assert_eq!(texts.caption(), "p (0: a, 1: b)");
    }

    #[test]
    fn the_svg_has_a_line_for_each_point_and_no_markup_of_names() {
        let axes = [
            Axis::of("a<b".into(), vec!["<i>".into(), "x".into()]),
            Axis::of("s".into(), vec!["1".into(), "1".into()]),
        ];
        let line = |value: f64| Line {
            label: "p".into(),
            value,
        };
        let objective = Objective {
            metric: "fd&<".into(),
            goal: Goal::Max,
        };
        let svg = svg(&axes, &[line(2.0), line(1.0)], &objective);
        assert_eq!(svg.matches("<circle").count(), 4);
        assert_eq!(svg.matches("fill=\"none\" stroke=\"rgb").count(), 2);
        assert!(!svg.contains("<i>") && !svg.contains("a<b") && svg.contains("fd&amp;&lt;"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
