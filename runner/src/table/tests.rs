//! Rows in every style.

use serde_json::json;

use super::*;

fn sample() -> Rows {
    let mut rows = Rows::new(&["name", "value", "when"]).titled("Title");
    rows.push([
        "a|b".into(),
        Cell::number(0.5),
        Cell::new("just now", "2026-01-01"),
    ]);
    rows.push(["c, \"d\"".into(), Cell::number(f64::NAN), Cell::none()]);
    rows
}

fn check(style: Style, expected: &str) {
    assert_eq!(sample().render(style), expected);
}

#[test]
fn a_table_has_an_end() {
    let mut rows = Rows::new(&["n"]);
    (0..10_002_u64).for_each(|number| rows.push([number.into()]));
    let table = Style::Table {
        width: None,
        color: false,
    };
    let text = rows.render(table);
    assert_eq!(text.lines().count(), 1 + 10_000 + 1);
    assert!(text.ends_with("\n9999\n... and 2 more; CSV and JSON have all 10002\n"));
    assert_eq!(rows.render(Style::Csv).lines().count(), 1 + 10_002);
}

#[test]
fn one_long_cell_does_not_lengthen_all_lines_without_bound() {
    let table = Style::Table {
        width: None,
        color: false,
    };
    let (long, high) = ("x".repeat(1 << 20), "y\n".repeat(1 << 18));
    let mut rows = Rows::new(&["name", "more"]);
    rows.push([long[..30_000].into(), "first".into()]);
    assert!(rows.render(table).contains(&long[..30_000]), "alone");
    rows.push([long.as_str().into(), "more".into()]);
    rows.push(["second".into(), high.as_str().into()]);
    (0..5000_u64).for_each(|number| rows.push([number.into(), "z".into()]));
    let text = rows.render(table);
    assert!(text.len() <= MOST_CHARACTERS, "{}", text.len());
    assert!(text.contains("xxx...  first") && text.contains("4999"));
    assert!(rows.render(Style::Csv).contains(&long), "programs get all");
}

#[test]
fn a_name_is_on_one_line() {
    let mut rows = Rows::new(&["name", "n"]);
    rows.push([Cell::name("a\nerror: x\t\x1b"), 1_u64.into()]);
    let table = Style::Table {
        width: None,
        color: false,
    };
    let expected = "name                 n\na\\nerror: x\\t\\u001b  1\n";
    assert_eq!(rows.render(table), expected);
    assert_eq!(rows.objects()[0]["name"], "a\nerror: x\t\x1b");
}

#[test]
fn people_get_texts_and_programs_get_data() {
    check(
        Style::Table {
            width: None,
            color: false,
        },
        "Title\nname    value  when\na|b       0.5  just now\nc, \"d\"    NaN\n",
    );
    check(
        Style::Markdown,
        "**Title**\n\n| name | value | when |\n| --- | ---: | --- |\n| a\\|b | 0.5 | just now |\n| c, \"d\" | NaN |  |\n",
    );
    check(
        Style::Csv,
        "name,value,when\na|b,0.5,2026-01-01\n\"c, \"\"d\"\"\",NaN,\n",
    );
    assert_eq!(
        sample().objects(),
        json!([{"name": "a|b", "value": 0.5, "when": "2026-01-01"},
                   {"name": "c, \"d\"", "value": "NaN", "when": null}])
    );
}

#[test]
fn rows_are_wrapped_and_coloured_when_asked() {
    let mut rows = Rows::new(&["name", "text"]);
    rows.push([
        Cell::from("state").style(CellStyle::Error),
        Cell::from("many words that do not fit into one line"),
    ]);
    let narrow = rows.render(Style::Table {
        width: Some(30),
        color: false,
    });
    assert!(
        narrow.lines().all(|line| line.chars().count() <= 30),
        "{narrow}"
    );
    assert!(!narrow.contains('\x1b'), "{narrow}");
    let colored = rows.render(Style::Table {
        width: Some(30),
        color: true,
    });
    assert!(crate::terminal::show(&colored).contains("\x1b[38;5;9m"));
}

#[test]
fn names_cannot_play_tricks_with_the_terminal() {
    let mut rows = Rows::new(&["name"]);
    rows.push(["\x1b[2Jgone\r\u{7}".into()]);
    for style in [
        Style::Table {
            width: Some(60),
            color: false,
        },
        Style::Markdown,
    ] {
        let text = rows.render(style);
        assert!(!text.contains(['\x1b', '\r', '\u{7}']), "{text:?}");
        assert!(text.contains("gone"), "{text:?}");
    }
}

#[test]
fn a_plugins_table_may_have_ragged_rows() {
    let table = retort_abi::Table {
        title: "Results".into(),
        columns: vec!["sampler".into(), "fd".into()],
        rows: vec![
            vec![json!("one"), json!(7.123_456_7), json!("too much")],
            vec![json!("two")],
        ],
    };
    assert_eq!(
        Rows::from(&table).render(Style::Table {
            width: None,
            color: false
        }),
        "Results\nsampler       fd\none      7.12346\ntwo\n"
    );
}

#[test]
fn numbers_are_brief() {
    let check = |value: f64, expected: &str| assert_eq!(number(value), expected);
    check(0.0, "0");
    check(12.0, "12");
    check(0.1 + 0.2, "0.3");
    check(1234.5678, "1234.57");
    check(0.001_234_567_8, "0.00123457");
    check(1.0e-9, "1.0000e-9");
    check(123_456_789.5, "123456790");
    check(f64::NEG_INFINITY, "-∞");
}

#[test]
fn sizes_and_durations_are_brief() {
    assert_eq!(
        [0, 999, 1500, 99_950_000, 2_000_000_000].map(bytes),
        ["0 B", "999 B", "1.5 kB", "100 MB", "2.0 GB"]
    );
    assert_eq!(
        [0.0, 0.26, 59.96, 65.0, 7800.0, 300_000.0].map(duration),
        ["0.0 s", "0.3 s", "1m 00s", "1m 05s", "2h 10m", "3d 11h"]
    );
    assert_eq!(
        [3.0, 45.0, 130.0, 3700.0, 90_000.0].map(ago),
        [
            "just now",
            "45 s ago",
            "2 min ago",
            "1 hour ago",
            "1 day ago"
        ]
    );
    assert_eq!(
        [-3.0, -59.0, -61.0, -90_000.0].map(ago),
        [
            "just now",
            "just now",
            "in 1 min (clock?)",
            "in 1 day (clock?)"
        ]
    );
}
