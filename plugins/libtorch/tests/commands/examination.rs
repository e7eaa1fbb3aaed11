//! What `retort plugin test` finds.

use retort_tests::examination;

#[test]
fn libtorch_is_as_a_plugin_has_to_be() {
    let rows = examination::check("libtorch");
    // A GPU that cannot be used here says why, in each dtype.
    let of = |row: &&serde_json::Value| row["of"].as_str().unwrap_or_default().starts_with("cuda");
    let gpus: Vec<_> = rows.iter().filter(of).collect();
    assert!(gpus.len() >= 3, "{gpus:?}");
    for row in gpus {
        let why = row["detail"].as_str().unwrap_or_default();
        let skipped = row["verdict"] == "skipped" && why.len() > 20;
        assert!(skipped || row["verdict"] == "passed", "{row}");
    }
}
