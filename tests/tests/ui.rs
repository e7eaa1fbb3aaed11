//! `retort ui`: what the server answers and refuses, over plain HTTP; and every page in a real browser.
//!
//! Screenshots are saved under `target/ui-screenshots`; their paths are printed.

#[path = "ui/browser.rs"]
mod browser;
#[path = "ui/fixture.rs"]
mod fixture;
#[path = "runner/lab.rs"]
#[allow(dead_code, reason = "the tests of the runner use all of it")]
mod lab;
#[path = "ui/serving.rs"]
mod serving;
#[path = "ui/staying.rs"]
mod staying;

use browser::Browser;
use fixture::{FixtureRuns, HOSTILE};
use lab::{Lab, block_on};
use serving::Server;

/// A store, its server and a browser; None without a browser.
fn open() -> Option<(Lab, FixtureRuns, Server, Browser)> {
    let browser = Browser::start()?;
    let lab = Lab::new(&[]);
    let made = block_on(fixture::make(&lab.store_dir()));
    let server = Server::start(&lab, &[]);
    Some((lab, made, server, browser))
}

#[test]
fn every_page_wide_narrow_light_and_dark() {
    let Some((_lab, made, server, browser)) = open() else {
        return;
    };
    let (first, second) = (&made.first, &made.second);
    let both = format!("run={first}&run={second}");
    let pages = [
        (
            "runs",
            "/?show=metrics.student.loss.last&show=params.student.train.steps".to_owned(),
            "digits",
        ),
        ("groups", "/?group=tag".to_owned(), "baseline"),
        ("run", format!("/run/{first}"), "Stages"),
        (
            "run-metrics",
            format!("/run/{first}/metrics"),
            "images_per_second",
        ),
        (
            "run-params",
            format!("/run/{first}/params"),
            "stages.student.train.steps",
        ),
        (
            "run-why",
            format!("/run/{second}/why"),
            "Why each stage ran",
        ),
        (
            "run-log",
            format!("/run/{first}/log"),
            "the learning rate is high",
        ),
        (
            "run-artifacts",
            format!("/run/{first}/artifacts"),
            "Lineage",
        ),
        (
            "run-environment",
            format!("/run/{first}/environment"),
            "Where it ran",
        ),
        (
            "artifact",
            format!("/artifact/{}", made.samples),
            "manifest.json",
        ),
        (
            "curves",
            format!("/curves?{both}&series=student/loss"),
            "student/loss",
        ),
        (
            "pictures",
            format!("/pictures?run={first}"),
            "The same noise, side by side",
        ),
        (
            "compare",
            format!("/compare?{both}"),
            "stages.student.train.steps",
        ),
        ("nothing", "/run/nothing".to_owned(), "Not here"),
    ];
    for (width, dark, name) in [
        (1280, false, "light"),
        (1280, true, "dark"),
        (390, false, "narrow"),
        (390, true, "narrow-dark"),
    ] {
        browser.resize(width, 900);
        browser.dark(dark);
        for (page, address, text) in &pages {
            browser.open(&server.at(address));
            browser.wait_for_text(text);
            browser.wait_until("[...document.querySelectorAll('.plot')].slice(0, 1).every(plot => plot.querySelector('svg'))");
            if *page == "nothing" {
                browser.forgive();
            }
            browser.expect_sound();
            browser.expect_accessible();
            browser.keep(&format!("{page}-{name}"));
        }
    }
}

#[test]
fn tables_are_read_without_scripts() {
    let Some((_lab, made, server, browser)) = open() else {
        return;
    };
    browser.scripts(false);
    browser.open(&server.at("/?show=metrics.student.loss.last"));
    // Test scripts do not run either, so the elements are queried instead.
    assert_eq!(browser.count("table.runs tbody tr"), 3);
    assert_eq!(browser.count(".picked button"), 3);
    browser.open(&server.at(&format!("/run/{}", made.first)));
    assert_eq!(browser.count("svg.graph .node"), 8);
    assert!(browser.count(".gantt .lane") >= 8);
    browser.open(&server.at(&format!("/compare?run={}&run={}", made.first, made.second)));
    assert!(browser.count("td.best") >= 1);
    browser.open(&server.at(&format!("/curves?run={}&series=student/loss", made.first)));
    assert_eq!(browser.count("figure.chart"), 1);
}

#[test]
fn a_filter_an_order_and_a_selection_are_in_the_address() {
    let Some((_lab, made, server, browser)) = open() else {
        return;
    };
    browser.open(&server.at("/"));
    browser.enter("#where", "recipe = digits");
    browser.click(".filter button[type=submit]");
    browser.wait_until("document.querySelectorAll('table.runs tbody tr').length === 2");
    assert!(
        browser.address().contains("where=recipe+%3D+digits"),
        "{}",
        browser.address()
    );

    // An error points at its position, and the filter can be corrected.
    browser.enter("#where", "recipes = digits");
    browser.click(".filter button[type=submit]");
    browser.wait_for_text("there is no field `recipes`");
    browser.wait_for_text("did you mean `recipe`?");
    browser.wait_for_text("^^^^^^^");
    browser.keep("filter-error");
    browser.forgive();
    browser.back();
    browser.wait_until("document.querySelectorAll('table.runs tbody tr').length === 2");

    browser.enter("#show", "metrics.student.loss.last");
    browser.click(".bar button[type=submit]");
    browser.wait_until("document.querySelectorAll('table.runs thead th').length === 9");
    browser.click("table.runs thead th:nth-child(7) a");
    browser.wait_until(
        "document.querySelector('th[aria-sort=ascending]')?.textContent.includes('loss')",
    );
    let order = browser.script(
        "return [...document.querySelectorAll('tr[data-run]')].map(row => row.dataset.run)",
    );
    assert_eq!(order, serde_json::json!([made.second.0, made.first.0]));
    browser.back();
    browser.wait_until("!document.querySelector('th[aria-sort=ascending]')");

    for run in [&made.first, &made.second] {
        browser.click(&format!("tr[data-run='{run}'] input"));
    }
    browser.wait_for_text("of 2 selected runs");
    browser.keep("selection");
    browser.click(".picked button.primary");
    browser.wait_for_text("What differs");
    browser.expect_sound();
    // The second run has the best loss.
    let best = browser.script("return document.querySelector('td.best')?.cellIndex");
    let columns = browser.script(
        "return [...document.querySelectorAll('thead th a.mono')].map(link => link.textContent)",
    );
    let best = usize::try_from(best.as_u64().unwrap()).unwrap();
    assert_eq!(
        columns[best - 1],
        made.second.0.as_str(),
        "{columns} {best}"
    );
    browser.back();
    browser.wait_for("table.runs");
}

#[test]
fn keys_lead_everywhere_and_a_baseline_stays() {
    let Some((_lab, made, server, browser)) = open() else {
        return;
    };
    browser.open(&server.at("/?show=metrics.student.loss.last"));
    browser.wait_for("table.runs");
    browser.wait_until("document.documentElement.classList.contains('js')");
    browser.keys("?");
    browser.wait_until("document.querySelector('#help').open");
    browser.keep("keys");
    // With Tab, the focus is visible, and the first stop skips to the content.
    browser.keys("\u{e00c}");
    browser.wait_until("!document.querySelector('#help').open");
    browser.open(&server.at("/?show=metrics.student.loss.last"));
    browser.wait_for("table.runs");
    for number in 0..24 {
        browser.keys("\u{e004}");
        let seen = browser.script(
            "const one = document.activeElement; const style = getComputedStyle(one); const place = one.getBoundingClientRect(); \
             return [one.className, style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2, \
             place.width > 3 && place.bottom > 0 && place.top < innerHeight]",
        );
        assert_eq!(
            (&seen[1], &seen[2]),
            (&true.into(), &true.into()),
            "{seen} after {number} tabs"
        );
        assert_eq!(seen[0] == "skip", number == 0, "{seen}");
    }
    browser.keys("?");
    browser.wait_until("document.querySelector('#help').open");
    browser.keys("\u{e00c}");
    browser.wait_until("!document.querySelector('#help').open");
    browser.keys("/");
    browser.wait_until("document.activeElement.id === 'where'");
    browser.keys("\u{e00c}");
    browser.wait_until("document.activeElement.id !== 'where'");
    // The newest run is the hostile one; the second of digits follows.
    browser.keys("jj");
    browser.wait_until(&format!(
        "document.querySelector('tr.at')?.dataset.run === '{}'",
        made.second
    ));
    browser.keys("x");
    browser.wait_for_text("of 1 selected run");
    browser.keys("jp");
    browser.wait_until(&format!(
        "document.querySelector('tr.pinned')?.dataset.run === '{}'",
        made.first
    ));
    browser.wait_until("document.querySelector('.delta')");
    browser.keep("baseline");
    browser.open(&server.at("/"));
    browser.wait_until(&format!(
        "location.search.includes('baseline={}')",
        made.first
    ));
    browser.wait_for("tr.pinned");
    browser.keys("jj");
    browser.keys("o");
    browser.wait_for_text("Stages");
    browser.keys("gc");
    browser.wait_for("figure.chart svg");
    browser.keys("gr");
    browser.wait_for("table.runs");
    browser.keys("t");
    browser.wait_until("document.documentElement.dataset.theme === 'dark'");
    browser.open(&server.at("/curves"));
    browser.wait_until("document.documentElement.dataset.theme === 'dark'");
    browser.expect_sound();
}

#[test]
fn curves_are_zoomed_smoothed_and_taken_along() {
    let Some((_lab, made, server, browser)) = open() else {
        return;
    };
    browser.open(&server.at(&format!(
        "/curves?run={}&run={}&series=student/loss",
        made.first, made.second
    )));
    browser.wait_for("figure.chart svg .line");
    let steps = "Math.max(...[...document.querySelectorAll('.plot text')].map(text => Number(text.textContent)).filter(Number.isFinite))";
    let whole = browser.script(&format!("return {steps}")).as_f64().unwrap();
    browser.drag(".plot svg", -100, 20);
    browser.wait_until("location.search.includes('from=')");
    browser.wait_until(&format!("{steps} < {whole}"));
    browser.keep("curves-zoomed");
    browser.back();
    browser.wait_until("!location.search.includes('from=')");
    browser.wait_until(&format!("{steps} === {whole}"));
    browser.click("[data-knob=logy]");
    browser.wait_until("location.search.includes('logy=1')");
    browser.click("[data-knob=axis][data-value=time]");
    browser.wait_until("location.search.includes('axis=time')");
    browser.script("const knob = document.querySelector('[data-knob=smooth]'); knob.value = 0.9; knob.dispatchEvent(new Event('input', {bubbles: true}))");
    browser.wait_until("document.querySelectorAll('.plot .raw').length === 2");
    browser.drag(".plot svg", 0, 3);
    browser.wait_until("!document.querySelector('.tip').hidden && document.querySelectorAll('.tip .num').length === 2");
    browser.keep("curves-read");
    let saved = browser.script("return [...document.querySelectorAll('[data-save]')].map(link => link.getAttribute('href'))");
    assert!(
        saved[0].as_str().unwrap().contains("logy=1")
            && saved[0].as_str().unwrap().contains("axis=time")
            && saved[0].as_str().unwrap().contains("smooth=0.9"),
        "{saved}"
    );
    let (status, svg) = server.get(saved[0].as_str().unwrap());
    assert!(
        status == 200
            && svg.starts_with("<svg")
            && svg.contains(&made.second.0)
            && svg.matches("class=\"average\"").count() == 2,
        "{svg}"
    );
    let (status, csv) = server.get(saved[1].as_str().unwrap());
    assert!(
        status == 200 && csv.starts_with("run,stage,series,from_step"),
        "{csv}"
    );
    // The link reproduces it.
    browser.open(&browser.address());
    browser.wait_until("document.querySelector('[data-knob=logy]').checked && document.querySelectorAll('.plot .raw').length === 2");
    browser.expect_sound();
}

#[test]
fn axes_of_curves_go_by_logarithms() {
    let Some((_lab, made, server, browser)) = open() else {
        return;
    };
    browser.open(&server.at(&format!("/curves?run={}&series=student/loss", made.first)));
    browser.wait_for("figure.chart svg .line");
    // The curve's position at a share of its steps, from left and top, and the labels of the axes.
    let place = |share: f64| {
        let script = format!(
            "const line = document.querySelector('.plot .line'); const all = line.getTotalLength(); \
             const ends = [0, all].map(at => line.getPointAtLength(at).x); \
             const points = line.getAttribute('d').split(/[ML]/).slice(1).map(pair => pair.trim().split(' ').map(Number)); \
             const [x, y] = points[Math.round((points.length - 1) * {share})]; \
             return [(x - ends[0]) / (ends[1] - ends[0]), y]"
        );
        let found = browser.script(&script);
        (found[0].as_f64().unwrap(), found[1].as_f64().unwrap())
    };
    let texts = || {
        let texts = "return [...document.querySelectorAll('.plot svg > text')].map(text => text.textContent)";
        browser.script(texts).to_string()
    };
    let (middle, linear) = place(0.5);
    assert!((middle - 0.5).abs() < 0.02, "{middle}");
    browser.click("[data-knob=logy]");
    browser.wait_until("location.search.includes('logy=1')");
    let (same, log) = place(0.5);
    // The loss falls from 2.1 to 0.1: at half the steps, 0.33 is higher up on a logarithmic axis.
    assert!(
        (same - middle).abs() < 0.02 && log < linear - 20.0,
        "{linear} {log}"
    );
    browser.click("[data-knob=logx]");
    browser.wait_until("location.search.includes('logx=1')");
    let (right, _) = place(0.5);
    // Half of 3,000 steps is far to the right: log(1500) of log(3000).
    assert!(right > 0.85, "{right}");
    assert!(
        texts().contains("\"100\"") && texts().contains("\"1000\""),
        "{}",
        texts()
    );
    browser.keep("curves-logarithms");
    let saved =
        browser.script("return document.querySelector('[data-save=svg]').getAttribute('href')");
    let (status, svg) = server.get(saved.as_str().unwrap());
    assert!(
        status == 200 && svg.contains(">1000<") && svg.contains(">100<"),
        "{svg}"
    );
    browser.expect_sound();
    // The link reproduces it, and going back undoes only what the link contains.
    browser.open(&browser.address());
    browser.wait_for("figure.chart svg .line");
    browser.wait_until("document.querySelector('[data-knob=logx]').checked && document.querySelector('[data-knob=logy]').checked");
    assert!((place(0.5).0 - right).abs() < 0.02);
    browser.click("[data-knob=logx]");
    browser.click("[data-knob=logy]");
    browser.wait_until("!location.search.includes('log')");
    assert!((place(0.5).1 - linear).abs() < 1.0);
}

#[test]
fn the_best_point_of_a_sweep_is_one_that_has_come() {
    let Some(browser) = Browser::start() else {
        return;
    };
    let lab = Lab::new(&[]);
    let (id, runs) = block_on(fixture::sweep(&lab.store_dir()));
    // As on the command line.
    let best = lab.retort(&["sweep", "best", "--json"]).expect(0).json();
    assert_eq!(best[0]["run"], runs[2].0.as_str(), "{best}");
    let server = Server::start(&lab, &[]);
    for (width, dark, name) in [
        (1280, false, "light"),
        (1280, true, "dark"),
        (390, false, "narrow"),
    ] {
        browser.resize(width, 900);
        browser.dark(dark);
        browser.open(&server.at(&format!("/sweep/{id}")));
        browser.wait_for_text("2 succeeded");
        let starred = browser.script(
            "return [...document.querySelectorAll('tbody tr')].filter(row => row.querySelector('.star')).map(row => row.dataset.run)",
        );
        assert_eq!(starred, serde_json::json!([runs[2].0]));
        browser.wait_until("document.querySelectorAll('svg.swept').length === 2");
        // Drawn in the page's colours, and readable; wider parts scroll separately.
        let drawn = browser.script(
            "const color = (element, what) => getComputedStyle(element)[what]; \
             const texts = [...document.querySelectorAll('svg.swept text')]; \
             return [texts.every(text => color(text, 'fill') === color(document.body, 'color')), \
             Math.min(...texts.map(text => text.getBoundingClientRect().height)), \
             new Set([...document.querySelectorAll('svg.swept circle')].map(one => color(one, 'fill'))).size, \
             color(document.querySelector('figure.swept'), 'backgroundColor')]",
        );
        assert_eq!((&drawn[0], &drawn[2]), (&true.into(), &2.into()), "{drawn}");
        assert!(drawn[1].as_f64().unwrap() > 10.0, "{name}: {drawn}");
        let face = if dark {
            "rgb(26, 29, 33)"
        } else {
            "rgb(255, 255, 255)"
        };
        assert_eq!(drawn[3], face, "{name}");
        browser.expect_sound();
        browser.expect_accessible();
        browser.keep(&format!("sweep-{name}"));
    }
    browser.wait_for_text("to come");
    let (status, svg) = server.get(&format!("/sweep/{id}/plot.svg"));
    assert!(status == 200 && !svg.contains("point 2"), "{svg}");
    browser.open(&server.at("/?group=sweep"));
    browser.wait_for_text(&id.0);
    browser.expect_sound();
}

#[test]
fn names_stay_readable_on_a_narrow_page() {
    let Some((_lab, made, server, browser)) = open() else {
        return;
    };
    browser.resize(390, 900);
    let both = format!("run={}&run={}", made.first, made.second);
    for (address, cells) in [
        (
            format!("/compare?{both}"),
            "table.compare th[scope=row], table.aligned th[scope=row]",
        ),
        (format!("/run/{}/why", made.second), "td.why"),
        (format!("/run/{}/params", made.second), "th.mono, td.wrap"),
    ] {
        browser.open(&server.at(&address));
        browser.wait_for(cells.split(',').next().unwrap());
        // Letters in a column would be narrow and tall.
        let narrow = browser.script(&format!(
            "return [...document.querySelectorAll('{cells}')].filter(cell => cell.textContent.trim().length > 5) \
             .filter(cell => cell.clientWidth < 80).map(cell => cell.textContent)"
        ));
        assert_eq!(narrow, serde_json::json!([]), "{address}");
        browser.expect_sound();
    }
    // The open tab is visible, wherever it is in the row.
    browser.open(&server.at(&format!("/run/{}/environment", made.first)));
    browser.wait_until("document.documentElement.classList.contains('js')");
    browser.wait_until("(() => { const tab = document.querySelector('.tabs [aria-current]').getBoundingClientRect(); return tab.left >= 0 && tab.right <= innerWidth; })()");
}

#[test]
fn a_log_is_searched() {
    let Some((_lab, made, server, browser)) = open() else {
        return;
    };
    let lines = || {
        browser.script(
            "return [...document.querySelectorAll('.log li .text')].map(line => line.textContent)",
        )
    };
    let path = format!("/run/{}/log", made.first);
    browser.open(&server.at(&path));
    browser.wait_until("document.querySelectorAll('.log li').length === 4");
    // From the keyboard: a text, in upper or lower case.
    browser.keys("/");
    browser.wait_until("document.activeElement.id === 'text'");
    browser.enter("#text", "LEARNING Rate\u{e007}");
    browser.wait_until("document.querySelectorAll('.log li').length === 1");
    assert_eq!(lines(), serde_json::json!(["the learning rate is high"]));
    assert!(
        browser.address().contains("text=LEARNING+Rate"),
        "{}",
        browser.address()
    );
    // Going back shows the whole curve, and restores the address.
    let searched = browser.address();
    browser.back();
    browser.wait_until("document.querySelectorAll('.log li').length === 4");
    browser.open(&searched);
    browser.wait_until("document.querySelectorAll('.log li').length === 1 && document.querySelector('#text').value === 'LEARNING Rate'");
    browser.keep("log-search");
    browser.open(&server.at(&path));
    browser.wait_until("document.querySelectorAll('.log li').length === 4");
    // SQL's wildcards are plain text.
    browser.enter("#text", "%\u{e007}");
    browser.wait_for_text("No such lines");
    browser.expect_sound();
    browser.click(".filter a.button");
    browser.wait_until("document.querySelectorAll('.log li').length === 4");
    // By level, and by stage.
    browser.open(&server.at(&format!("{path}?level=warn&text=a")));
    browser.wait_until("document.querySelectorAll('.log li').length === 2");
    assert_eq!(
        lines(),
        serde_json::json!(["the learning rate is high", "one sample was not finite"])
    );
    for (stage, count) in [("student", 4), ("codes", 0)] {
        browser.open(&server.at(&path));
        browser.wait_for("#stage");
        browser.script(&format!(
            "document.querySelector('#stage').value = '{stage}'"
        ));
        browser.click(".filter button");
        browser.wait_until(&format!("location.search.includes('stage={stage}')"));
        assert_eq!(browser.count(".log li"), count, "{stage}");
    }
    browser.expect_sound();
}

#[test]
fn pictures_of_the_same_noise_stand_side_by_side() {
    let Some((_lab, made, server, browser)) = open() else {
        return;
    };
    browser.open(&server.at(&format!("/pictures?run={}&class=3", made.first)));
    browser.wait_for("table.samples");
    browser.wait_until("[...document.querySelectorAll('table.samples img')].slice(0, 8).every(image => image.complete && image.naturalWidth === 8)");
    let first = browser.script(
        "return [...document.querySelectorAll('table.samples tbody tr:first-child td img')].map(image => image.getAttribute('src').split('/').pop())",
    );
    // Class 3 begins with sample 3; the set with another seed has a different first sample of the class.
    assert_eq!(
        first,
        serde_json::json!(["3.png", "3.png", "3.png", "3.png"])
    );
    assert_eq!(browser.count("table.samples thead .odd"), 1);
    assert_eq!(browser.count("table.samples tbody tr"), 4);
    // Classes have the network's names.
    browser.wait_for_text("digit 3");
    let sharp = browser
        .script("return getComputedStyle(document.querySelector('img.pixels')).imageRendering");
    assert_eq!(sharp, "pixelated");
    browser.click("table.samples tbody tr:first-child a.zoom");
    browser.wait_until("document.querySelector('dialog.picture img')?.width >= 400");
    browser.keep("picture-close");
    browser.keys("\u{e00c}");
    browser.wait_until("!document.querySelector('dialog.picture')");
    // Snapshots during training, by step.
    browser.wait_until("document.querySelector('.strip output').textContent === '1000'");
    browser.script("const slider = document.querySelector('.strip input'); slider.value = 0; slider.dispatchEvent(new Event('input', {bubbles: true}))");
    browser.wait_until("document.querySelector('.strip output').textContent === '500'");
    browser.wait_until("new URL(location.href).searchParams.get('step') === '500'");
    // The address shows that step.
    let shared = browser.script("return location.href");
    browser.open(&server.at("/"));
    browser.open(shared.as_str().expect("an address"));
    browser.wait_until("document.querySelector('.strip output')?.textContent === '500'");
    browser.wait_until("document.querySelectorAll('.strip figure.shown').length === 1");
    // A tokenizer's reconstructions are labelled as such wherever they are shown.
    for address in [
        format!("/pictures?run={}", made.first),
        format!("/run/{}", made.first),
        format!("/compare?run={}&run={}", made.first, made.second),
    ] {
        browser.open(&server.at(&address));
        browser.wait_for_text("real above, reconstructed below");
        assert!(
            browser.count("img[src*='reconstructions.png']") >= 1,
            "{address}"
        );
        browser.expect_sound();
    }
    // Two runs.
    browser.open(&server.at(&format!("/pictures?run={}&run={}", made.first, made.second)));
    browser.wait_until("document.querySelectorAll('table.samples thead th').length === 9");
    browser.keep("pictures-of-two-runs");
    browser.expect_sound();
}

#[test]
fn hostile_names_are_texts() {
    let Some((_lab, made, server, browser)) = open() else {
        return;
    };
    let run = &made.hostile;
    for address in [
        "/".to_owned(),
        "/?group=tag".to_owned(),
        format!("/?where=recipe+~+%22{}%22", "<script>"),
        format!("/run/{run}"),
        format!("/run/{run}/metrics"),
        format!("/run/{run}/params"),
        format!("/run/{run}/why"),
        format!("/run/{run}/log"),
        format!("/run/{run}/artifacts"),
        format!("/run/{run}/environment"),
        format!("/curves?run={run}"),
        format!("/pictures?run={run}"),
        format!("/compare?run={run}&run={}", made.first),
    ] {
        browser.open(&server.at(&address));
        browser.wait_until("document.documentElement.classList.contains('js')");
        browser.expect_sound();
        let found = browser.script(
            "return [document.title.startsWith('owned'), document.querySelectorAll('main script, main img[onerror], main h1:not(:first-of-type)').length, \
             document.body.innerText.includes('\\u202e')]",
        );
        assert_eq!(found, serde_json::json!([false, 0, false]), "{address}");
    }
    browser.open(&server.at(&format!("/run/{run}")));
    browser.wait_for_text("<script>document.title");
    browser.keep("hostile");
    assert!(HOSTILE.contains('\u{202e}'));
}

#[test]
fn a_run_is_followed_while_it_goes_on() {
    let Some(browser) = Browser::start() else {
        return;
    };
    // A store, which starts the search from the beginning.
    let lab = Lab::new(&["first: {kind: do, act: succeed}"]);
    lab.run(&[]).expect(0);
    lab.recipe(&["a: {kind: do, act: work, amount: 36000}"]);
    let server = Server::start(&lab, &[]);
    browser.open(&server.at("/"));
    browser.wait_until("document.querySelectorAll('tr[data-run]').length === 1");
    let running = lab.start(&[]);
    browser.wait_until("document.querySelectorAll('tr[data-run]').length === 2");
    browser.wait_until("document.querySelector('tr[data-run] .pill.now')");
    browser.click("tr[data-run] td.id a");
    browser.wait_until("document.querySelector('.meter progress')?.value > 5");
    browser.wait_for_text("left");
    browser.keep("live");
    browser.click(".tabs a[href$='/metrics']");
    browser.wait_for("figure.chart svg .line");
    browser.click(".tabs a");
    browser.wait_for(".meter");
    running.signal(libc::SIGINT);
    browser.wait_until("document.querySelector('.run-head .pill.odd')");
    browser
        .wait_until("!document.querySelector('.meter') && document.title.includes('interrupted')");
    browser.expect_sound();
    running.end().expect(130);
}
