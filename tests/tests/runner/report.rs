//! Runs as one page: complete, self-contained, and safe with any names.

use crate::lab::Lab;

/// A page's text with its tags, without the content of pictures.
fn tags(page: &str) -> Vec<String> {
    page.split('<')
        .skip(1)
        .filter_map(|rest| rest.split([' ', '>', '\n']).next())
        .map(str::to_owned)
        .collect()
}

const HOSTILE: &str = "<script>alert(1)</script><img src=x onerror=alert(2)>";

#[test]
fn a_page_has_everything_of_its_runs() {
    let lab = Lab::new(&[
        "base: {kind: do, text: base}",
        "curve: {kind: do, act: flood, amount: 800, input: base}",
        "picture: {kind: do, act: paint, text: four columns, input: base}",
    ]);
    lab.run(&[]).expect(0);
    lab.run(&["--set", "curve.amount=400"]).expect(0);
    lab.retort(&["report", "latest", "-o", "one.html"])
        .expect(0)
        .saying(&["one.html is written"]);
    let read = |name: &str| std::fs::read_to_string(lab.dir.path().join(name)).unwrap();
    let page = read("one.html");
    for part in [
        "<!DOCTYPE html>",
        "prefers-color-scheme: dark",
        "data:image/png;base64,iVBORw0KGgo",
        "four columns",
        "curve/loss",
        "stages.curve.amount",
        "succeeded",
        "Environment",
    ] {
        assert!(page.contains(part), "{part} is missing");
    }
    assert_eq!(page.matches("<svg").count(), 8);
    // Results come first, then the most important curves.
    let place = |what: &str| page.find(what).unwrap();
    assert!(place("data:image/png") < place("<svg") && place("<svg") < place("Stages and metrics"));
    assert!(!tags(&page).contains(&"script".to_owned()));
    assert!(
        !page.contains("http://")
            || page.matches("http://").count()
                == page.matches("http://www.w3.org/2000/svg").count()
    );
    assert!(!page.contains("https://"));

    let both = lab
        .retort(&["report", "latest", "latest~1", "-o", "-"])
        .expect(0)
        .stdout;
    assert!(both.contains("What differs") && both.matches("<section").count() == 4);
    assert_eq!(
        both.matches("<svg").count(),
        8,
        "curves of one series share a chart"
    );
    lab.retort(&["report", "nobody"]).expect(4);
    lab.retort(&["report", "latest", "-o", "nowhere/x.html"])
        .expect(1)
        .saying(&["there is no folder nowhere"]);
    assert!(!lab.dir.path().join("nowhere").exists());
}

/// Each command that writes to a file of the user's replaces what it has written itself, and no other file.
#[test]
fn only_what_a_command_writes_is_replaced() {
    let lab = Lab::new(&[
        "curve: {kind: do, act: flood, amount: 800}",
        "picture: {kind: do, act: paint, text: four columns, input: curve}",
    ]);
    lab.run(&["--sweep", "curve.amount=400,800"]).expect(0);
    let at = |name: &str| lab.dir.path().join(name);
    std::fs::write(at("page.html"), "<!DOCTYPE html><html lang=\"en\">").unwrap();
    std::fs::write(
        at("drawing.svg"),
        "<svg xmlns=\"http://www.w3.org/2000/svg\">",
    )
    .unwrap();
    std::fs::write(at("photo.png"), b"\x89PNG\r\n\x1a\n").unwrap();
    std::fs::write(at("pytest.xml"), "<?xml version=\"1.0\"?>").unwrap();
    let report: &[&str] = &["report", "-o"];
    let plot: &[&str] = &["metrics", "plot", "latest", "loss", "--svg"];
    let sweep: &[&str] = &["sweep", "plot", "--objective", "curve/loss", "--svg"];
    let picture: &[&str] = &["show", "latest/picture", "--save"];
    let junit: &[&str] = &["plugin", "test", "faulty", "--junit"];
    for (command, other, again) in [
        (report, "page.html", Some("only a report of retort")),
        (plot, "drawing.svg", Some("only a plot of retort")),
        (sweep, "drawing.svg", Some("only a plot of retort")),
        (picture, "photo.png", None),
    ] {
        for name in ["r.yaml", other] {
            let before = std::fs::read(at(name)).unwrap();
            lab.retort(&[command, &[name]].concat())
                .expect(2)
                .saying(&[&format!("{name} is there already"), "name another file"])
                .saying(&[again.unwrap_or("only an empty file is replaced")]);
            assert_eq!(std::fs::read(at(name)).unwrap(), before, "{command:?}");
        }
        std::fs::write(at("new"), "").unwrap();
        lab.retort(&[command, &["new"]].concat()).expect(0);
        let expected = if again.is_some() { 0 } else { 2 };
        lab.retort(&[command, &["new"]].concat()).expect(expected);
    }
    for name in ["r.yaml", "pytest.xml"] {
        let said = lab.retort(&[junit, &[name][..]].concat()).expect(2);
        let said = said.saying(&["only a report of `plugin test` is replaced"]);
        assert!(
            said.stdout.is_empty(),
            "refused before any test: {}",
            said.stdout
        );
    }
}

#[test]
fn what_the_store_says_is_text() {
    let lab = Lab::new(&[
        "base: {kind: do, text: base}",
        &format!("picture: {{kind: do, act: paint, text: '{HOSTILE}', input: base}}"),
        &format!("table: {{kind: do, text: '{HOSTILE}', input: base}}"),
    ]);
    lab.run(&[]).expect(0);
    lab.retort(&["runs", "note", "latest", HOSTILE]).expect(0);
    lab.retort(&["runs", "tag", "latest", "\"><script>"])
        .expect(0);
    lab.retort(&["report", "-o", "r.html", "--title", "</title><script>"])
        .expect(0);
    let page = std::fs::read_to_string(lab.dir.path().join("r.html")).unwrap();
    let tags = tags(&page);
    assert!(
        !tags.iter().any(|tag| tag.eq_ignore_ascii_case("script")),
        "{tags:?}"
    );
    // The only picture; the table's preview is not a PNG, and a text says so.
    assert_eq!(tags.iter().filter(|tag| *tag == "img").count(), 1);
    assert!(page.contains("This picture is no PNG file."));
    assert!(page.contains("&lt;script&gt;alert(1)"));
    assert!(page.contains("default-src 'none'"));
}
