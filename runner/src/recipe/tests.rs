//! Recipes as written: references, settings, mistakes.

use serde_json::json;

use super::*;

fn read(text: &str, set: &[&str]) -> Recipe {
    let set: Vec<String> = set.iter().map(|change| (*change).to_owned()).collect();
    parse(Path::new("r.yaml"), PathBuf::new(), text.to_owned(), &set).unwrap()
}

const HEAD: &str = "version: 1\nparams: {w: 96, deep: {x: [1, 2]}, again: '${params.w}'}\npaths: {data: d}\nstages:\n";

#[test]
fn references_to_params_are_replaced() {
    let check = |written: &str, expected: Value| {
        let recipe = read(&format!("{HEAD}  s: {{kind: k, o: {written}}}\n"), &[]);
        assert_eq!(recipe.findings, []);
        assert_eq!(recipe.stages[0].options["o"], expected, "{written}");
    };
    check("'${params.w}'", json!(96));
    check("'${params.again}'", json!(96));
    check("'${ params.deep }'", json!({"x": [1, 2]}));
    check("'${params.deep.x.1}'", json!(2));
    check("'${paths.data}/a${params.w}.csv'", json!("d/a96.csv"));
    check("'$${params.w} $x'", json!("${params.w} $x"));
}

#[test]
fn wrong_references_are_findings() {
    let check = |written: &str, part: &str| {
        let recipe = read(&format!("{HEAD}  s: {{kind: k, o: {written}}}\n"), &[]);
        let [finding] = recipe.findings.as_slice() else {
            panic!("{:?}", recipe.findings)
        };
        let said = format!(
            "{} / {}",
            finding.message,
            finding.hint.clone().unwrap_or_default()
        );
        assert!(said.contains(part), "{said}");
        assert_eq!(finding.position.map(|at| at.line), Some(5));
    };
    check("'${params.v}'", "did you mean `w`?");
    check("'${param.w}'", "only ${params.name}");
    check("'${params.w'", "no `}`");
    check("'a${params.deep}'", "cannot be part of a text");
}

#[test]
fn params_in_a_circle_are_named() {
    let recipe = read(
        "version: 1\nparams: {a: '${params.b}', b: '${params.a}'}\nstages: {s: {kind: k}}\n",
        &[],
    );
    assert!(
        recipe.findings[0]
            .message
            .contains("params.b -> params.a -> params.b"),
        "{:?}",
        recipe.findings
    );
}

#[test]
fn set_changes_values() {
    let text = format!("{HEAD}  s: {{kind: k, list: [1, 2], o: {{p: 1}}}}\n");
    let check = |set: &str, pointer: &str, expected: Value| {
        let recipe = read(&text, &[set]);
        assert_eq!(recipe.findings, [], "{set}");
        assert_eq!(
            Value::Object(recipe.stages[0].options.clone()).pointer(pointer),
            Some(&expected),
            "{set}"
        );
    };
    check("s.list.1=5", "/list/1", json!(5));
    check("stages.s.o.p=[a, 1.5]", "/o/p", json!(["a", 1.5]));
    check("s.new.deep=true", "/new/deep", json!(true));
    check("s.o=${params.w}", "/o", json!(96));
    let recipe = read(&text, &["seed=3", "s.seed=4"]);
    assert_eq!((recipe.seed, recipe.stages[0].seed), (Some(3), Some(4)));
    assert_eq!(recipe.source.written("/stages/s/seed"), ValueSource::Set);
    assert_eq!(recipe.source.written("/stages/s/o"), ValueSource::Line(5));
    // A mistake inside a param is shown at the param.
    let recipe = read(
        &format!("{HEAD}  s: {{kind: k, o: '${{params.deep}}'}}\n"),
        &[],
    );
    let place = recipe.source.locate("/stages/s/o/x/1", EntryPart::Value);
    assert_eq!(
        place,
        Some(Position {
            line: 2,
            column: 31
        })
    );
}

#[test]
fn wrong_settings_are_findings() {
    let check = |set: &str, part: &str| {
        let recipe = read(
            &format!("{HEAD}  teacher: {{kind: k, list: [1]}}\n"),
            &[set],
        );
        let [finding] = recipe.findings.as_slice() else {
            panic!("{set}: {:?}", recipe.findings)
        };
        let said = format!(
            "{} / {}",
            finding.message,
            finding.hint.clone().unwrap_or_default()
        );
        assert!(said.contains(part), "{said}");
    };
    check("seed", "`=` is missing");
    check("seed=[", "not YAML");
    check("seed=x", "expected a whole number");
    check("seed=", "got nothing / write a value after the `=`");
    for nothing in ["", "~", "null"] {
        check(
            &format!("description={nothing}"),
            "got nothing / write a value after the `=`; an empty text is written --set 'description=\"\"'",
        );
    }
    check("taecher.x=1", "did you mean `teacher`?");
    check("stages.taecher.x=1", "did you mean `teacher`?");
    check("teacher.list.7=1", "not an item");
    check("teacher.kind.x=1", "`x` cannot be set");
    check("a..b=1", "not a path");
}

#[test]
fn mistakes_in_the_runners_part() {
    let check = |text: &str, expected: &[(usize, usize, &str)]| {
        crate::diagnostic::expect(&read(text, &[]).findings, expected);
    };
    check(
        "version: 2\nstages: {s: {kind: k}}\n",
        &[(1, 10, "newer retort")],
    );
    check(
        "stages: {s: {kind: k}}\n",
        &[(1, 1, "begin the recipe with")],
    );
    check("version: 1\nstages: {}\n", &[(2, 9, "is empty")]);
    check(
        "verison: 1\nstages: {s: {kind: k}}\n",
        &[(1, 1, "did you mean `version`?")],
    );
    check(
        "version: 1\nseed: '3'\ndevice: gpu\nstages:\n  S: {kind: k}\n  t: {kin: k}\n  u: 3\n",
        &[
            (2, 7, "remove the quotes: 3"),
            (3, 9, "expected `auto`, `cpu`"),
            (5, 3, "lower-case"),
            (6, 3, "the key `kind` is missing"),
            (7, 6, "expected a mapping, got 3"),
        ],
    );
}

/// Anything anywhere in a recipe gives a printable answer, never a panic.
#[test]
fn any_insertion_is_answered() {
    let odd = [
        "\u{a0}",
        "\u{3000}",
        "\u{200b}",
        "\u{301}",
        "漢",
        "🙂",
        "\u{feff}",
        "\u{2028}",
        "\u{85}",
        "\u{9b}",
        "\r",
        "\t",
        "\"",
        "'",
        "[",
        "{",
        ": ",
        "- ",
        "&a ",
        "*a ",
        "!t ",
        "${",
        "%",
        "#",
        "|\n",
        "\0",
        "é: ",
        "\u{10ffff}",
    ];
    let text = "version: 1\nbackend: fake\nparams: {é: '漢${params.w}', w: 1.50}\nstages:\n  s:\n    kind: everything\n    data: 'd'\n    steps: [\"ü\", 🙂]\n";
    let places: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    // A fixed pseudo-random sequence: every position with several characters, one and two at a time.
    let mut state = 1_u64;
    let mut next = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % below
    };
    for &at in places.iter().cycle().take(6 * places.len()) {
        let mut changed = text.to_owned();
        changed.insert_str(at, odd[next(odd.len())]);
        if next(2) == 0 {
            let at = places[next(places.len())];
            if changed.is_char_boundary(at) {
                changed.insert_str(at, odd[next(odd.len())]);
            }
        }
        let shown = match crate::plan::fake::plan(&changed, &["s.flag=\u{a0}\u{3000}"]) {
            Ok(plan) => plan
                .warnings
                .iter()
                .map(|f| f.render(&plan.path, &plan.text, true))
                .collect(),
            Err(report) => report.render(true),
        };
        let safe = crate::terminal::show(&shown);
        assert!(
            !safe.contains(['\u{9b}', '\u{2028}', '\u{200b}', '\0', '\r']),
            "{safe:?}"
        );
        for line in safe.lines().filter(|line| line.contains('^')) {
            assert!(line.trim_end().ends_with(['^', 'm']), "{safe}");
        }
    }
}
