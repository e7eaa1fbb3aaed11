//! Curves as a picture: braille dots for a terminal, SVG for everything else.
//!
//! In: curves, each a list of samples with their least, mean and greatest value. Out: text. The mean is a line, the range
//! around it a band. Non-finite values leave a gap. Deliberately absent: the source of curves.

use std::fmt::Write as _;

use crate::draft::OutputKind;
use crate::table::number;
use crate::terminal;

/// The beginning of a drawing's first tag. It names retort, so that a drawing may be replaced by another.
pub const SVG: &str = "<svg xmlns=\"http://www.w3.org/2000/svg\" data-generator=\"retort\"";

/// A drawing as a file.
pub const KIND: OutputKind = OutputKind {
    name: "a plot of retort",
    head: SVG,
};

/// Curves over one axis.
#[derive(Debug, Clone, Default)]
pub struct Chart {
    /// The quantity on the horizontal axis: `step`, `seconds`.
    pub axis: String,
    /// Whether the vertical axis is logarithmic; then non-positive values leave gaps.
    pub log: bool,
    /// Whether the horizontal axis is logarithmic; then non-positive positions are left out.
    pub log_x: bool,
    /// The curves.
    pub curves: Vec<Curve>,
}

/// A curve.
#[derive(Debug, Clone, Default)]
pub struct Curve {
    /// Its name.
    pub label: String,
    /// Its samples, by position.
    pub samples: Vec<ColumnSummary>,
    /// The smoothing factor of a moving average drawn over them; 0 draws none. For SVG.
    pub smoothing: f64,
}

impl Curve {
    /// An exponential average of the means, bias-corrected; non-finite values are left out.
    fn smoothed(&self) -> Option<Vec<f64>> {
        let weight = self.smoothing.min(0.99);
        let (mut sum, mut total) = (0.0, 0.0);
        let average = self.samples.iter().map(|sample| {
            if !sample.mean.is_finite() {
                return f64::NAN;
            }
            sum = weight * sum + (1.0 - weight) * sample.mean;
            total = weight * total + (1.0 - weight);
            sum / total
        });
        (weight > 0.0).then(|| average.collect())
    }
}

/// Whether a series is among the most important ones.
pub fn is_wanted(name: &str) -> bool {
    let last = name.rsplit('/').next().unwrap_or(name);
    ["loss", "error", "accuracy", "entropy"]
        .iter()
        .any(|word| last.contains(word))
}

/// The values at one position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ColumnSummary {
    /// The place.
    pub x: f64,
    /// The least value.
    pub min: f64,
    /// The mean.
    pub mean: f64,
    /// The greatest value.
    pub max: f64,
}

/// The drawn range.
#[derive(Debug, Clone, Copy)]
struct PlotRange {
    x: (f64, f64),
    y: (f64, f64),
}

impl PlotRange {
    /// The x coordinate in an SVG.
    fn svg_x(self, value: f64) -> f64 {
        LEFT + (value - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - LEFT - RIGHT)
    }

    /// The y coordinate in an SVG.
    fn svg_y(self, value: f64) -> f64 {
        HEIGHT - BOTTOM - (value - self.y.0) / (self.y.1 - self.y.0) * (HEIGHT - TOP - BOTTOM)
    }

    /// A point in the syntax of SVG paths.
    fn svg(self, x: f64, y: f64) -> String {
        format!("{:.1} {:.1}", self.svg_x(x), self.svg_y(y))
    }

    /// The means of a piece of a curve, as a path.
    fn svg_means(self, run: &[ColumnSummary]) -> String {
        let points = run.iter().map(|sample| self.svg(sample.x, sample.mean));
        points.collect::<Vec<_>>().join("L")
    }
}

/// The size of an SVG without its legend, the margins around the plot, and the height of a legend line.
const WIDTH: f64 = 880.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 78.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 52.0;
const LINE: f64 = 20.0;

/// Terminal colours (SGR) and their SVG equivalents, distinguishable for colour-blind people.
const COLORS: [(&str, &str); 6] = [
    ("34", "#0072b2"),
    ("33", "#d55e00"),
    ("32", "#009e73"),
    ("35", "#cc79a7"),
    ("36", "#56b4e9"),
    ("31", "#e69f00"),
];

impl Chart {
    /// The chart for a terminal with this many columns and rows, and names of curves below. None if there is nothing to draw.
    pub fn terminal(&self, columns: usize, rows: usize, color: bool) -> String {
        self.drawn(columns, rows, color, Self::draw)
    }

    /// The same with a dot for each sample, and no lines between them.
    pub fn dots(&self, columns: usize, rows: usize, color: bool) -> String {
        self.drawn(columns, rows, color, Self::draw_dots)
    }

    fn drawn(
        &self,
        columns: usize,
        rows: usize,
        color: bool,
        draw: fn(&Self, &Curve, usize, PlotRange, &mut Canvas),
    ) -> String {
        let Some(range) = self.plot_range() else {
            return String::new();
        };
        let height = rows.max(4);
        let label = |row: usize| {
            let part = 1.0 - row as f64 / (height - 1) as f64;
            number(self.value(range.y.0 + part * (range.y.1 - range.y.0)))
        };
        let labelled = [0, height / 2, height - 1];
        let margin = labelled
            .iter()
            .map(|&row| label(row).chars().count())
            .max()
            .unwrap_or(0);
        let width = columns.saturating_sub(margin + 2).max(10);
        let mut canvas = Canvas::new(width, height);
        for (number, curve) in self.curves.iter().enumerate() {
            draw(self, curve, number, range, &mut canvas);
        }
        let mut text = String::new();
        for row in 0..height {
            let label = if labelled.contains(&row) {
                label(row)
            } else {
                String::new()
            };
            let side = if label.is_empty() { '│' } else { '┤' };
            let _ = writeln!(text, "{label:>margin$} {side}{}", canvas.line(row, color));
        }
        let (first, last) = (number(self.place(range.x.0)), number(self.place(range.x.1)));
        let _ = writeln!(text, "{:margin$} └{}", "", "─".repeat(width));
        let between = width.saturating_sub(first.chars().count());
        let _ = writeln!(text, "{:margin$}  {first}{last:>between$}", "");
        let _ = writeln!(text, "{:margin$}  {:^width$}", "", self.axis);
        for (number, curve) in self.curves.iter().enumerate() {
            let mark = paint("━━", number, color);
            let _ = writeln!(
                text,
                "{:margin$}  {mark} {}",
                "",
                terminal::clean_line(&curve.label)
            );
        }
        text
    }

    /// The chart as an SVG document.
    pub fn svg(&self) -> String {
        let legend = LINE * self.curves.len() as f64;
        let mut svg = format!(
            "{SVG} viewBox=\"0 0 {WIDTH} {}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
            HEIGHT + legend
        );
        let Some(range) = self.plot_range() else {
            return svg + "</svg>\n";
        };
        self.svg_axes(range, &mut svg);
        for (place, curve) in self.curves.iter().enumerate() {
            let color = COLORS[place % COLORS.len()].1;
            self.svg_curve(curve, color, range, &mut svg);
            self.svg_average(curve, color, range, &mut svg);
            let at = HEIGHT + LINE * place as f64;
            let _ = writeln!(
                svg,
                "<path d=\"M{LEFT} {:.1}h24\" stroke=\"{color}\" stroke-width=\"3\"/><text x=\"{:.1}\" \
                 y=\"{:.1}\">{}</text>",
                at - 4.0,
                LEFT + 32.0,
                at,
                escaped(&curve.label)
            );
        }
        svg + "</svg>\n"
    }

    /// The ticks of both axes, and the label of the horizontal one.
    fn svg_axes(&self, range: PlotRange, svg: &mut String) {
        for tick in marks(range.y, 6, self.log) {
            let (at, text) = (range.svg_y(tick), number(self.value(tick)));
            let _ = writeln!(
                svg,
                "<path d=\"M{LEFT} {at:.1}H{:.1}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" \
                 text-anchor=\"end\">{text}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                at + 4.0
            );
        }
        for tick in marks(range.x, 8, self.log_x) {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                range.svg_x(tick),
                HEIGHT - BOTTOM + 18.0,
                number(self.place(tick))
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 14.0,
            escaped(&self.axis)
        );
    }

    /// A curve: the band between its least and greatest values, and its means in it.
    fn svg_curve(&self, curve: &Curve, color: &str, range: PlotRange, svg: &mut String) {
        for run in self.runs(curve) {
            let there = run.iter().map(|sample| range.svg(sample.x, sample.max));
            let back = run
                .iter()
                .rev()
                .map(|sample| range.svg(sample.x, sample.min));
            let band: Vec<String> = there.chain(back).collect();
            let _ = writeln!(
                svg,
                "<path d=\"M{}Z\" fill=\"{color}\" fill-opacity=\"0.2\"/>\
                 <path d=\"M{}\" fill=\"none\" stroke=\"{color}\" {} stroke-linecap=\"round\"/>",
                band.join("L"),
                range.svg_means(&run),
                match curve.smoothing > 0.0 {
                    true => "stroke-width=\"1\" stroke-opacity=\"0.35\"",
                    false => "stroke-width=\"1.5\"",
                }
            );
        }
    }

    /// The moving average of a curve, if it has one.
    fn svg_average(&self, curve: &Curve, color: &str, range: PlotRange, svg: &mut String) {
        let Some(means) = curve.smoothed() else {
            return;
        };
        let samples = curve.samples.iter().zip(means);
        let average = Curve {
            samples: samples
                .map(|(sample, mean)| ColumnSummary {
                    x: sample.x,
                    min: mean,
                    mean,
                    max: mean,
                })
                .collect(),
            ..Curve::default()
        };
        for run in self.runs(&average) {
            let _ = writeln!(
                svg,
                "<path class=\"average\" d=\"M{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.8\" \
                 stroke-linecap=\"round\"/>",
                range.svg_means(&run)
            );
        }
    }

    fn draw(&self, curve: &Curve, color: usize, range: PlotRange, canvas: &mut Canvas) {
        let (right, bottom) = (canvas.width * 2 - 1, canvas.height * 4 - 1);
        let x = |value: f64| (value - range.x.0) / (range.x.1 - range.x.0) * right as f64;
        let y = |value: f64| (range.y.1 - value) / (range.y.1 - range.y.0) * bottom as f64;
        for run in self.runs(curve) {
            for sample in &run {
                let at = x(sample.x);
                canvas.stroke((at, y(sample.max)), (at, y(sample.min)), color);
            }
            for pair in run.windows(2) {
                let ends = [pair[0], pair[1]].map(|sample| (x(sample.x), y(sample.mean)));
                canvas.stroke(ends[0], ends[1], color);
            }
        }
    }

    /// Each sample as a square of four dots.
    fn draw_dots(&self, curve: &Curve, color: usize, range: PlotRange, canvas: &mut Canvas) {
        let (right, bottom) = (canvas.width * 2 - 2, canvas.height * 4 - 2);
        for sample in self.runs(curve).into_iter().flatten() {
            let x = (sample.x - range.x.0) / (range.x.1 - range.x.0) * right as f64;
            let y = (range.y.1 - sample.mean) / (range.y.1 - range.y.0) * bottom as f64;
            for (dx, dy) in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)] {
                canvas.dot(x.round() + dx, y.round() + dy, color);
            }
        }
    }

    /// A curve's drawn pieces, without gaps, on the axis' scale.
    fn runs(&self, curve: &Curve) -> Vec<Vec<ColumnSummary>> {
        let scaled = curve.samples.iter().map(|sample| ColumnSummary {
            x: if self.log_x {
                sample.x.log10()
            } else {
                sample.x
            },
            min: self.scaled(sample.min),
            mean: self.scaled(sample.mean),
            max: self.scaled(sample.max),
        });
        let mut runs = vec![Vec::new()];
        for sample in scaled {
            let whole = [sample.x, sample.min, sample.mean, sample.max];
            if whole.iter().all(|value| value.is_finite()) {
                if let Some(run) = runs.last_mut() {
                    run.push(sample);
                }
            } else {
                runs.push(Vec::new());
            }
        }
        runs.retain(|run| !run.is_empty());
        runs
    }

    fn plot_range(&self) -> Option<PlotRange> {
        let samples: Vec<ColumnSummary> = self
            .curves
            .iter()
            .flat_map(|curve| self.runs(curve))
            .flatten()
            .collect();
        let range = |low: &dyn Fn(&ColumnSummary) -> f64, high: &dyn Fn(&ColumnSummary) -> f64| {
            let least = samples.iter().map(low).fold(f64::INFINITY, f64::min);
            let most = samples.iter().map(high).fold(f64::NEG_INFINITY, f64::max);
            // A single value still needs a range.
            let widened = if most > least {
                0.0
            } else {
                (least.abs() * 0.1).max(0.5)
            };
            (least - widened, most + widened)
        };
        (!samples.is_empty()).then(|| PlotRange {
            x: range(&|sample| sample.x, &|sample| sample.x),
            y: range(&|sample| sample.min, &|sample| sample.max),
        })
    }

    /// The value at a position of the axis.
    fn place(&self, scaled: f64) -> f64 {
        if self.log_x {
            10_f64.powf(scaled)
        } else {
            scaled
        }
    }

    fn scaled(&self, value: f64) -> f64 {
        if self.log { value.log10() } else { value }
    }

    fn value(&self, scaled: f64) -> f64 {
        if self.log {
            10_f64.powf(scaled)
        } else {
            scaled
        }
    }
}

/// Braille characters: 2 x 4 dots each, in the colour of what was drawn last.
struct Canvas {
    width: usize,
    height: usize,
    cells: Vec<(u8, usize)>,
}

impl Canvas {
    fn new(width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            cells: vec![(0, 0); width * height],
        }
    }

    /// A straight line between two positions, in dots.
    fn stroke(&mut self, from: (f64, f64), to: (f64, f64), color: usize) {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let count = dx.abs().max(dy.abs()).ceil().max(1.0);
        for step in 0..=count as usize {
            let part = step as f64 / count;
            self.dot(from.0 + part * dx, from.1 + part * dy, color);
        }
    }

    fn dot(&mut self, x: f64, y: f64, color: usize) {
        const BITS: [[u8; 2]; 4] = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]];
        let (x, y) = (x.round().max(0.0) as usize, y.round().max(0.0) as usize);
        if x < self.width * 2 && y < self.height * 4 {
            let cell = &mut self.cells[y / 4 * self.width + x / 2];
            *cell = (cell.0 | BITS[y % 4][x % 2], color);
        }
    }

    fn line(&self, row: usize, color: bool) -> String {
        let cells = &self.cells[row * self.width..(row + 1) * self.width];
        let mut text = String::new();
        for &(bits, curve) in cells {
            match bits {
                0 => text.push(' '),
                bits => {
                    let braille = char::from_u32(0x2800 + u32::from(bits)).unwrap_or(' ');
                    text += &paint(&braille.to_string(), curve, color);
                }
            }
        }
        text.trim_end().to_owned()
    }
}

fn paint(text: &str, curve: usize, color: bool) -> String {
    terminal::paint(text, COLORS[curve % COLORS.len()].0, color)
}

/// Positions of an axis's ticks: round numbers, or their logarithms on a logarithmic axis.
fn marks(range: (f64, f64), count: usize, log: bool) -> Vec<f64> {
    if !log {
        return ticks(range, count);
    }
    let (low, high) = range;
    let inside = |tick: &f64| (low - 1e-9..=high + 1e-9).contains(tick);
    let of = |factors: &[f64], every: usize| -> Vec<f64> {
        // Powers of ten that numbers have.
        let powers =
            (low.floor().max(-330.0) as i32..=high.ceil().min(330.0) as i32).step_by(every);
        let all = powers.flat_map(|power| {
            factors
                .iter()
                .map(move |factor| f64::from(power) + factor.log10())
        });
        all.filter(inside).collect()
    };
    let every = ((high - low) / count as f64).ceil().clamp(1.0, 1000.0) as usize;
    match (of(&[1.0], every), of(&[1.0, 2.0, 5.0], 1)) {
        (powers, _) if powers.len() > 2 => powers,
        (_, between) if between.len() > 2 => between,
        _ => {
            let numbers = ticks((10_f64.powf(low), 10_f64.powf(high)), count);
            numbers.into_iter().map(f64::log10).filter(inside).collect()
        }
    }
}

/// About this many round numbers within a range.
fn ticks((low, high): (f64, f64), count: usize) -> Vec<f64> {
    let rough = (high - low) / count as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|factor| factor * power)
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(rough);
    if step.is_nan() || step <= 0.0 || step.is_infinite() {
        return vec![low];
    }
    let first = (low / step).ceil();
    (0..=count * 2)
        .map(|number| (first + number as f64) * step)
        .take_while(|tick| *tick <= high + step * 1e-9)
        .map(|tick| if tick.abs() < step * 1e-9 { 0.0 } else { tick })
        .collect()
}

/// A text for SVG, within or outside of tags.
pub(crate) fn escaped(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect::<String>()
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(values: &[f64], log: bool) -> Chart {
        let samples = (0..).zip(values).map(|(x, &value)| ColumnSummary {
            x: f64::from(x),
            min: value,
            mean: value,
            max: value,
        });
        Chart {
            axis: "step".into(),
            log,
            log_x: false,
            curves: vec![Curve {
                label: "a <loss>".into(),
                samples: samples.collect(),
                ..Curve::default()
            }],
        }
    }

    #[test]
    fn a_falling_line_falls() {
        let text = chart(&[3.0, 2.0, 1.0, 0.0], false).terminal(24, 4, false);
        let rows: Vec<&str> = text.lines().take(4).collect();
        let first_dot = |row: &str| {
            row.chars()
                .position(|c| ('\u{2801}'..='\u{28ff}').contains(&c))
        };
        let places: Vec<_> = rows.iter().map(|row| first_dot(row)).collect();
        assert!(places.iter().all(Option::is_some), "{text}");
        assert!(places.is_sorted() && places[0] < places[3], "{text}");
        assert!(
            rows[0].trim_start().starts_with('3') && rows[3].trim_start().starts_with('0'),
            "{text}"
        );
        assert!(text.contains("a <loss>") && !text.contains('\x1b'));
    }

    #[test]
    fn what_is_not_finite_leaves_a_gap() {
        let values = [1.0, 2.0, f64::NAN, 4.0, f64::INFINITY, 6.0];
        let gaps = chart(&values, false);
        assert_eq!(gaps.runs(&gaps.curves[0]).len(), 3);
        let negative = chart(&[1.0, -1.0, 10.0], true);
        assert_eq!(negative.runs(&negative.curves[0]).len(), 2);
        assert_eq!(chart(&[f64::NAN], false).terminal(40, 5, false), "");
        assert!(!chart(&[5.0], false).terminal(40, 5, true).is_empty());
    }

    #[test]
    fn the_svg_holds_the_curve_and_no_markup_of_names() {
        let svg = chart(&[3.0, 2.0, 4.0], false).svg();
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
        assert!(
            svg.contains("a &lt;loss&gt;") && !svg.contains("NaN"),
            "{svg}"
        );
    }

    #[test]
    fn an_average_is_drawn_over_what_it_is_of() {
        let mut chart = chart(&[1.0, 3.0, f64::NAN, 3.0], false);
        assert!(!chart.svg().contains("average"));
        chart.curves[0].smoothing = 0.5;
        let means = chart.curves[0].smoothed().unwrap();
        // (0.25 * 1 + 0.5 * 3) / 0.75, and a gap at the missing value.
        assert!((means[0] - 1.0).abs() < 1e-12 && (means[1] - 7.0 / 3.0).abs() < 1e-12);
        assert!(means[2].is_nan() && means[3] < 3.0);
        let svg = chart.svg();
        assert_eq!(svg.matches("class=\"average\"").count(), 2);
        assert!(svg.contains("stroke-opacity=\"0.35\""), "{svg}");
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks((0.0, 10.0), 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks((-0.03, 0.11), 4), [0.0, 0.05, 0.1]);
        assert_eq!(ticks((5.0, 5.0), 4), [5.0]);
        let check = |low: f64, high: f64, expected: &[f64]| {
            let marks = marks((low.log10(), high.log10()), 6, true);
            let numbers: Vec<f64> = marks
                .iter()
                .map(|mark| (10_f64.powf(*mark) * 1e6).round() / 1e6)
                .collect();
            assert_eq!(numbers, expected);
        };
        check(1.0, 3000.0, &[1.0, 10.0, 100.0, 1000.0]);
        check(0.015, 0.22, &[0.02, 0.05, 0.1, 0.2]);
        check(1.58, 3.3, &[2.0, 2.5, 3.0]);
        check(0.0001, 10_000.0, &[0.0001, 0.01, 1.0, 100.0, 10_000.0]);
    }
}
