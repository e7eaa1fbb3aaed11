//! Static files of the pages, embedded in the binary.

use super::reply::Reply;

const JS: &str = "text/javascript; charset=utf-8";

/// The asset with a name.
pub fn answer(name: &str) -> Option<Reply> {
    let (kind, content) = match name {
        "style.css" => ("text/css; charset=utf-8", include_str!("assets/style.css")),
        "theme.js" => (JS, include_str!("assets/theme.js")),
        "app.js" => (JS, include_str!("assets/app.js")),
        "chart.js" => (JS, include_str!("assets/chart.js")),
        "pictures.js" => (JS, include_str!("assets/pictures.js")),
        "icon.svg" => ("image/svg+xml", include_str!("assets/icon.svg")),
        _ => return None,
    };
    Some(Reply::new(kind, content))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The colours of a theme, by name.
    fn theme(block: &str) -> Vec<(String, [f64; 3])> {
        let declarations = block
            .split(';')
            .filter_map(|one| one.trim().split_once(':'));
        let colors = declarations.filter_map(|(name, value)| {
            let digits = value
                .trim()
                .strip_prefix('#')
                .filter(|digits| digits.len() == 6)?;
            let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).ok();
            let channel = |at: usize| {
                let part = f64::from(byte(at)?) / 255.0;
                Some(if part <= 0.03928 {
                    part / 12.92
                } else {
                    ((part + 0.055) / 1.055).powf(2.4)
                })
            };
            Some((
                name.trim().to_owned(),
                [channel(0)?, channel(2)?, channel(4)?],
            ))
        });
        colors.collect()
    }

    /// As WCAG 2 defines it.
    fn contrast(one: [f64; 3], other: [f64; 3]) -> f64 {
        let luminance = |[r, g, b]: [f64; 3]| 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
        let (one, other) = (luminance(one), luminance(other));
        one.max(other) / one.min(other)
    }

    #[test]
    fn texts_can_be_read_in_both_themes() {
        let css = include_str!("assets/style.css");
        let light = css
            .split(":root {")
            .nth(1)
            .and_then(|rest| rest.split('}').next())
            .unwrap();
        let dark = css
            .split(":root[data-theme=\"dark\"] {")
            .nth(1)
            .and_then(|rest| rest.split('}').next())
            .unwrap();
        let preferred = css
            .split(":root:not([data-theme=\"light\"]) {")
            .nth(1)
            .and_then(|rest| rest.split('}').next())
            .unwrap();
        assert_eq!(
            theme(dark),
            theme(preferred),
            "dark by choice and by preference"
        );
        for (name, block) in [("light", light), ("dark", dark)] {
            let colors = theme(block);
            let of = |wanted: &str| {
                colors
                    .iter()
                    .find(|(known, _)| known == wanted)
                    .unwrap_or_else(|| panic!("{wanted}"))
                    .1
            };
            for back in ["--back", "--face", "--sunk"] {
                for text in [
                    "--ink", "--soft", "--accent", "--good", "--bad", "--odd", "--now", "--old",
                    "--none",
                ] {
                    let ratio = contrast(of(text), of(back));
                    assert!(ratio >= 4.5, "{name}: {text} on {back} has {ratio:.2}");
                }
            }
            for (text, back) in [
                ("--on-accent", "--accent"),
                ("--ink", "--accent-face"),
                ("--ink", "--bad-face"),
                ("--ink", "--mark-face"),
                ("--ink", "--pin-face"),
                ("--soft", "--pin-face"),
                ("--odd", "--pin-face"),
                ("--bad", "--bad-face"),
                ("--soft", "--mark-face"),
                ("--soft", "--bad-face"),
            ] {
                let ratio = contrast(of(text), of(back));
                assert!(ratio >= 4.5, "{name}: {text} on {back} has {ratio:.2}");
            }
            let curves = (0..8).map(|number| format!("--c{number}"));
            for line in curves.chain(["--first".into(), "--last".into()]) {
                let ratio = contrast(of(&line), of("--face"));
                assert!(ratio >= 3.0, "{name}: {line} has {ratio:.2}");
            }
        }
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        for name in [
            "style.css",
            "theme.js",
            "app.js",
            "chart.js",
            "pictures.js",
            "icon.svg",
        ] {
            let text = answer(name)
                .unwrap()
                .text()
                .replace("http://www.w3.org/", "");
            assert!(
                !text.contains("://") && !text.contains("eval(") && !text.contains("innerHTML"),
                "{name}"
            );
        }
        assert!(answer("../page.rs").is_none());
    }
}
