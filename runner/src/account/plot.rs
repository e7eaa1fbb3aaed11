//! A sweep as a picture: parallel coordinates, and the objective over each parameter, as one SVG document.
//!
//! In: an axis for each parameter, a line for each point. Colours go from the best value (blue) to the worst (orange). Out:
//! one document, or its parts for a page, whose style sheet colours their classes.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use crate::chart::{SVG, escaped};
use crate::sweep::{Goal, Objective, Parameter};
use crate::table::number;

/// A parameter, with each point's position on its axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    /// The parameter.
    pub path: String,
    /// Each point's position: its number, or the index of its text.
    pub places: Vec<f64>,
    /// The texts, if values are not numbers.
    pub texts: Vec<String>,
    /// Whether the axis is logarithmic.
    pub log: bool,
}

/// A point with a value.
#[derive(Debug, Clone, PartialEq)]
pub struct PlottedPoint {
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
) -> (Vec<Axis>, Vec<PlottedPoint>) {
    let axis = |(place, parameter): (usize, &Parameter)| {
        let values = points.clone().map(|(_, settings, _)| {
            value_of(settings.get(place).map_or("", String::as_str)).to_owned()
        });
        Axis::of(parameter.path.clone(), values.collect())
    };
    let line = |(number, _, value): (u32, &[String], f64)| PlottedPoint {
        label: format!("point {number}"),
        value,
    };
    let axes = parameters.iter().enumerate().map(axis).collect();
    (axes, points.clone().map(line).collect())
}

impl Axis {
    /// The axis of these values; logarithmic if they span more than two powers of ten.
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

    /// A description of the axis, in a line.
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

/// The minimum and maximum, widened if they are equal.
fn ends(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (least, most) = values.fold(
        (f64::INFINITY, f64::NEG_INFINITY),
        |(least, most), value| (least.min(value), most.max(value)),
    );
    match most > least {
        true => (least, most),
        false => {
            // A range around a single value, relative to its size.
            let more = if least == 0.0 { 0.5 } else { least.abs() * 0.1 };
            (least - more, most + more)
        }
    }
}

/// A text that may be long.
fn brief(text: &str) -> String {
    match text.char_indices().nth(18) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Width of the whole document; the parallel axes take all of it.
const W: f64 = 980.0;
/// Above and below the parallel axes, and the axes themselves.
const TOP: f64 = 56.0;
const BOTTOM: f64 = 34.0;
const HEIGHT: f64 = 300.0;
/// Margin beside the outermost axes: half of the longest name.
const SIDE: f64 = 90.0;
/// From one parallel axis to the next, on a page.
const STEP: f64 = 190.0;
/// A slice plot: its size, and the position of its axes.
const SLICE: (f64, f64) = (420.0, 250.0);
const PLOT: (f64, f64, f64, f64) = (70.0, 14.0, 330.0, 186.0);
/// Number of shades from the best value to the worst on a page.
const SHADES: usize = 8;

/// The picture.
pub fn svg(axes: &[Axis], lines: &[PlottedPoint], objective: &Objective) -> String {
    let slice_rows = axes.len().div_ceil(2) as f64;
    let below = TOP + HEIGHT + BOTTOM;
    let height = below + slice_rows * SLICE.1;
    let mut svg = format!(
        "{SVG} viewBox=\"0 0 {W} {height}\" {FONT}>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    draw_parallel(axes, lines, objective, W, &mut svg);
    for (place, axis) in axes.iter().enumerate() {
        let left = if place % 2 == 0 { 20.0 } else { W / 2.0 };
        let top = below + (place / 2) as f64 * SLICE.1;
        let _ = writeln!(svg, "<g transform=\"translate({left} {top})\">");
        draw_slice(axis, lines, objective, &mut svg);
        svg.push_str("</g>\n");
    }
    svg + "</svg>\n"
}

const FONT: &str = "font-family=\"sans-serif\" font-size=\"12\"";

/// The parallel coordinates alone, as an element of a page, as wide as they have to be.
pub fn parallel(axes: &[Axis], lines: &[PlottedPoint], objective: &Objective) -> String {
    let width = 2.0 * SIDE + STEP * axes.len().max(1) as f64;
    let what = format!(
        "Parallel coordinates: {} points over {}, from the best {} to the others. The table has the same numbers.",
        lines.len(),
        axes.iter()
            .map(|axis| axis.path.as_str())
            .collect::<Vec<_>>()
            .join(", "),
        objective.metric
    );
    element((width, TOP + HEIGHT + BOTTOM), &what, |svg| {
        draw_parallel(axes, lines, objective, width, svg);
    })
}

/// The objective over one parameter, as an element of a page.
pub fn slice(axis: &Axis, lines: &[PlottedPoint], objective: &Objective) -> String {
    let what = format!("{} over {}", objective.metric, axis.caption());
    element(SLICE, &what, |svg| draw_slice(axis, lines, objective, svg))
}

fn element((width, height): (f64, f64), what: &str, draw: impl FnOnce(&mut String)) -> String {
    let mut svg = format!(
        "<svg class=\"swept\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" role=\"img\" \
         aria-label=\"{}\" {FONT}>",
        escaped(what)
    );
    draw(&mut svg);
    svg + "</svg>"
}

/// The rank of a value: 0 is the best, 1 the worst.
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

/// The CSS class of a shade.
fn shade(rank: f64) -> String {
    let number = (rank.clamp(0.0, 1.0) * (SHADES - 1) as f64).round();
    format!("shade-{number}")
}

fn draw_parallel(
    axes: &[Axis],
    lines: &[PlottedPoint],
    objective: &Objective,
    width: f64,
    svg: &mut String,
) {
    let values = ends(lines.iter().map(|line| line.value));
    let step = (width - 2.0 * SIDE) / axes.len().max(1) as f64;
    let x = |place: usize| SIDE + step * place as f64;
    let y = |value: f64, (least, most): (f64, f64)| {
        TOP + HEIGHT - (value - least) / (most - least) * HEIGHT
    };
    // The best last, so that it is on top.
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
            "<path class=\"line {}\" d=\"M{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"{}\" stroke-opacity=\"0.8\"><title>{}: {}</title></path>",
            shade(rank),
            points.join("L"),
            color(rank),
            if place == 0 { 3.0 } else { 1.4 },
            escaped(&line.label),
            number(line.value)
        );
    }
    let mut vertical = |at: f64, name: &str, low: String, high: String| {
        let _ = writeln!(
            svg,
            "<path class=\"axis\" d=\"M{at:.1} {TOP}v{HEIGHT}\" stroke=\"#444\"/>\
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

/// The end of a path, its most informative part.
fn last_steps(path: &str) -> &str {
    match path.char_indices().nth_back(23) {
        Some((start, _)) => path[start..]
            .find(['.', '/'])
            .map_or(&path[start..], |at| &path[start + at + 1..]),
        None => path,
    }
}

fn draw_slice(axis: &Axis, lines: &[PlottedPoint], objective: &Objective, svg: &mut String) {
    let (left, top, width, height) = PLOT;
    let (low, high) = axis.ends();
    let values = ends(lines.iter().map(|line| line.value));
    let x = |place: f64| left + (place - low) / (high - low) * width;
    let y = |value: f64| top + height - (value - values.0) / (values.1 - values.0) * height;
    let _ = writeln!(
        svg,
        "<path class=\"axis\" d=\"M{left} {top}v{height}h{width}\" fill=\"none\" stroke=\"#444\"/>\
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
            "<circle class=\"{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"4.5\" fill=\"{}\" fill-opacity=\"0.8\"><title>{}: {}</title></circle>",
            shade(rank(line.value, values, objective.goal)),
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
        let line = |value: f64| PlottedPoint {
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

    #[test]
    fn parts_for_a_page_have_classes_and_no_background() {
        let axis = Axis::of("a<b".into(), vec!["1".into(), "2".into(), "3".into()]);
        let lines = [5.0, 6.0, 9.0].map(|value| PlottedPoint {
            label: "p".into(),
            value,
        });
        let objective = Objective {
            metric: "fd&<".into(),
            goal: Goal::Min,
        };
        for part in [
            parallel(std::slice::from_ref(&axis), &lines, &objective),
            slice(&axis, &lines, &objective),
        ] {
            assert!(!part.contains("white") && !part.contains("a<b"), "{part}");
            assert!(part.starts_with("<svg class=\"swept\"") && part.ends_with("</svg>"));
            for shade in ["shade-0", "shade-2", "shade-7"] {
                assert_eq!(part.matches(shade).count(), 1, "{part}");
            }
        }
    }

    #[test]
    fn one_value_alone_stands_in_the_middle_of_its_size() {
        assert_eq!(ends([200.0, 200.0].into_iter()), (180.0, 220.0));
        assert_eq!(ends([0.0].into_iter()), (-0.5, 0.5));
        assert_eq!(ends([-1.0, 3.0].into_iter()), (-1.0, 3.0));
    }
}
