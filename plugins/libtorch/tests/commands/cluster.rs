//! A training whose workers are on two nodes of a real Slurm, with libtorch's own collective between them.

use retort_tests::digits::Digits;

use self::lab::Lab;
use self::site::Site;

/// What the cluster's set-up needs of a laboratory.
pub mod lab {
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    pub struct Lab {
        pub dir: tempfile::TempDir,
    }

    impl Lab {
        pub fn command(&self, arguments: &[&str]) -> Command {
            let mut command = Command::new(crate::binary());
            command
                .args(arguments)
                .arg("--store")
                .arg(self.dir.path().join("store"))
                .current_dir(self.dir.path())
                .env_remove("RETORT_PLUGIN_PATH")
                .stdin(Stdio::null());
            command
        }
    }

    pub struct CommandOutput {
        pub code: Option<i32>,
        pub stdout: String,
        pub stderr: String,
    }

    impl CommandOutput {
        #[track_caller]
        pub fn good(self) -> String {
            assert_eq!(self.code, Some(0), "{}", self.stderr);
            self.stdout
        }
    }

    pub struct Running;

    impl Running {
        pub fn new(_: Child) -> Self {
            Self
        }
    }

    pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(began.elapsed() < Duration::from_secs(300), "no {what}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

#[path = "../../../../tests/tests/runner/cluster/site.rs"]
#[allow(dead_code)]
mod site;

const STAGES: &str = "
  pairs: {kind: trajectories, teacher: teacher, count: 200}
  student:
    kind: distill
    teacher: teacher
    trajectories: pairs
    timesteps: [0, 6]
    workers: 2
    train: {steps: 30, batch: 16, zero_stage: 1}
";

#[test]
fn two_nodes_train_as_one_machine_does() {
    let Some(site) = Site::start(300) else { return };
    let lab = Lab {
        dir: tempfile::tempdir().expect("a directory"),
    };
    let small = Digits {
        backend: "libtorch",
        top: "seed: 5\ndevice: cpu\nthreads: 1",
        codes: "train: {steps: 10, batch: 32}",
        teacher: "width: 32, depth: 2, heads: 2, train: {steps: 10, batch: 32}",
    };
    let text = small.recipe(STAGES);
    std::fs::write(lab.dir.path().join("r.yaml"), text).expect("a recipe");
    let hash = || {
        let rows = site
            .retort(&lab, &["artifacts", "list", "latest", "--json"])
            .good();
        let rows: serde_json::Value = serde_json::from_str(&rows).expect("JSON");
        let mut rows = rows.as_array().expect("artifacts").iter();
        let row = rows
            .find(|row| row["stage"] == "student")
            .expect("the student");
        row["hash"].as_str().expect("a hash").to_owned()
    };
    site.retort(&lab, &["run", "r.yaml"]).good();
    let here = hash();
    site.run(&lab, &["--until", "student", "--force=student"])
        .good();
    assert_eq!(hash(), here, "not one bit");
    let lives = "select distinct node from v_job_lives where element is not null order by node";
    let lives = site.retort(&lab, &["query", "--json", lives]).good();
    let lives: serde_json::Value = serde_json::from_str(&lives).expect("JSON");
    let nodes: Vec<_> = lives
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| &row["node"])
        .collect();
    assert_eq!(nodes, ["n1", "n2"]);
}
