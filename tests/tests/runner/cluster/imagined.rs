//! 1.2 million pairs in 1,200 elements on 64 simulated nodes: Slurm's programs are scripts, and a thread plays the nodes and
//! writes like workers. The runner is the real one, and experiences the events of a cluster of this size. By default a
//! hundredth of it runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use retort::artifact;
use retort::cluster::spool::{self, JobSpec, SpoolEvent, StartEnd, Writer};
use retort::frame::{Answer, Call, FromWorker, Points, Progress};
use retort::store::{ArtifactRecord, Usage};
use retort::worker::death::ExitStatus;
use retort_abi::StageResult;

use retort_tests::memory;
use retort_tests::process::ProcessStat;
use retort_tests::program::script;

use crate::lab::{CommandOutput, Lab, Running, binary, compile, wait_for};

/// Elements that a node runs at a time.
const PLACES: usize = 16;
/// Shards of an element.
const SHARDS: usize = 10;

/// How large a cluster is.
#[derive(Clone, Copy)]
struct Scale {
    elements: usize,
    nodes: usize,
    /// Pairs of a shard.
    shard: usize,
    /// The time for a shard.
    pace: Duration,
    /// One of this many elements fails once, in one of three ways: which, when and how is random.
    one_in: usize,
    /// How long the runner is observed with all nodes busy.
    window: Duration,
}

impl Scale {
    fn pairs(&self) -> usize {
        self.elements * SHARDS * self.shard
    }
}

/// A running element.
struct Element {
    job: usize,
    index: Option<usize>,
    /// Its number among all parts; None for the undivided stage.
    part: Option<usize>,
    state: &'static str,
    node: Option<usize>,
    writer: Option<Writer>,
    next: Instant,
    done: usize,
    starts: usize,
}

/// The fate of a cluster, by its seed.
#[derive(Clone, Copy)]
struct Fate(u64);

impl Fate {
    /// The `n`th random number about `what`, below `most`.
    fn draw(self, what: u64, n: usize, most: usize) -> usize {
        // SplitMix64.
        let mut x = (self.0 ^ what << 48 ^ n as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((x ^ x >> 31) % most as u64).unwrap()
    }

    /// After how many of its shards a part fails, and in which of three ways; None if it does not.
    fn of(self, part: usize, one_in: usize) -> Option<(usize, usize)> {
        (self.draw(0, part, one_in) == 0)
            .then(|| (1 + self.draw(1, part, SHARDS - 1), self.draw(2, part, 3)))
    }
}

struct Cluster {
    scale: Scale,
    fate: Fate,
    dir: PathBuf,
    specs: Vec<(PathBuf, JobSpec)>,
    elements: Vec<Element>,
    lost: BTreeSet<usize>,
    /// Elements that have already failed once.
    failed: BTreeSet<usize>,
    /// How starts ended in the simulation.
    ends: BTreeMap<&'static str, usize>,
    /// Parts that two elements worked on at the same time.
    twice: BTreeSet<usize>,
}

/// The shared state of test and nodes.
#[derive(Default)]
struct Shared {
    running: AtomicUsize,
    lose_a_node: AtomicBool,
    over: AtomicBool,
    ends: Mutex<BTreeMap<&'static str, usize>>,
    /// Parts that two elements worked on at the same time.
    twice: Mutex<BTreeSet<usize>>,
}

/// Slurm's programs, as far as a runner uses them.
pub(super) fn programs(dir: &Path) {
    let scripts = [
        (
            "sbatch",
            "n=1; while ! mkdir \"$SIM/jobs/$n\" 2>/dev/null; do n=$((n+1)); done
             printf '%s\\n' \"$@\" > \"$SIM/jobs/$n/draft\"; mv \"$SIM/jobs/$n/draft\" \"$SIM/jobs/$n/args\"; echo $n",
        ),
        ("squeue", "case \"$*\" in *--name=*) ;; *) cat \"$SIM/queue\";; esac"),
        ("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1"),
        ("scancel", "exit 0"),
        ("scontrol", "echo 'MaxArraySize = 1001'"),
    ];
    fs::create_dir(dir.join("bin")).unwrap();
    fs::create_dir(dir.join("jobs")).unwrap();
    fs::write(dir.join("queue"), "").unwrap();
    for (name, text) in scripts {
        let path = dir.join("bin").join(name);
        script(&path, &format!("#!/bin/sh\n{text}\n"));
    }
}

impl Cluster {
    fn take_jobs(&mut self) {
        loop {
            let job = self.specs.len() + 1;
            let Ok(arguments) = fs::read_to_string(self.dir.join(format!("jobs/{job}/args")))
            else {
                return;
            };
            let value = |name: &str| arguments.lines().find_map(|line| line.strip_prefix(name));
            let spool = PathBuf::from(value("--chdir=").unwrap());
            let spec = spool::read_job_spec(&spool).unwrap();
            let array = value("--array=").is_some();
            for (index, part) in spec.elements.iter().enumerate() {
                self.elements.push(Element {
                    job,
                    index: array.then_some(index),
                    part: part.map(|part| part.index),
                    state: "PENDING",
                    node: None,
                    writer: None,
                    next: Instant::now(),
                    done: 0,
                    starts: 0,
                });
            }
            self.specs.push((spool, spec));
        }
    }

    fn start_what_has_room(&mut self) {
        let mut used = vec![0; self.scale.nodes];
        for node in self.elements.iter().filter_map(|element| element.node) {
            used[node] += 1;
        }
        let mut places = (0..self.scale.nodes)
            .filter(|node| !self.lost.contains(node))
            .flat_map(|node| std::iter::repeat_n(node, PLACES - used[node]))
            .collect::<Vec<_>>();
        for (number, element) in self.elements.iter_mut().enumerate() {
            if element.state != "PENDING" || element.next > Instant::now() {
                continue;
            }
            let Some(node) = places.pop() else { return };
            let (spool, _) = &self.specs[element.job - 1];
            let mut writer =
                Writer::open(&spool::element_dir(spool, element.index.unwrap_or(0))).unwrap();
            writer.push(SpoolEvent::Began {
                job: format!("{}", element.job),
                node: format!("node{node}"),
                pid: 1,
            });
            writer.flush().unwrap();
            (element.state, element.node, element.writer) = ("RUNNING", Some(node), Some(writer));
            element.starts += 1;
            // Not all at the same time.
            element.next =
                Instant::now() + self.scale.pace * u32::try_from(number % 50).unwrap() / 50;
        }
    }

    /// Two elements must never run the same part at once, which their equal files would hide.
    fn look_for_parts_at_work_twice(&mut self) {
        let mut at_work = BTreeSet::new();
        for element in self
            .elements
            .iter()
            .filter(|element| element.state == "RUNNING")
        {
            // The undivided stage is not a part, and comes once.
            let part = element.part.unwrap_or(usize::MAX);
            if !at_work.insert(part) {
                self.twice.insert(part);
            }
        }
    }

    fn work(&mut self, work_dir: &Path) {
        for number in 0..self.elements.len() {
            let element = &mut self.elements[number];
            if element.state != "RUNNING" || element.next > Instant::now() {
                continue;
            }
            element.next = Instant::now() + self.scale.pace;
            let Some(part) = element.part else {
                self.make_the_whole(number, work_dir);
                continue;
            };
            let writer = element.writer.as_mut().unwrap();
            // An earlier start's output exists.
            while work_dir.join(format!("{}-{}", part, element.done)).exists() {
                element.done += 1;
            }
            if element.done < SHARDS {
                let start = (part * SHARDS + element.done) * self.scale.shard;
                let path = work_dir.join(format!("{}-{}", part, element.done));
                fs::write(path, format!("{start} {}", start + self.scale.shard)).unwrap();
                writer.push(SpoolEvent::Frame(FromWorker::Metrics(vec![Points {
                    series: "made".into(),
                    steps: vec![element.done as u64],
                    values: vec![start as f64],
                    at: vec![1_795_000_000_000],
                }])));
                element.done += 1;
                writer.push(SpoolEvent::Frame(FromWorker::Progress(Progress {
                    done: (element.done * self.scale.shard) as u64,
                    total: (SHARDS * self.scale.shard) as u64,
                    unit: "pairs".into(),
                })));
                writer.flush().unwrap();
                if let Some((after, way)) = self.fate.of(part, self.scale.one_in)
                    && element.done >= after
                    && self.failed.insert(part)
                {
                    self.fail(number, way);
                }
            } else {
                self.end(number, StageResult::of_part(), Vec::new());
            }
        }
    }

    fn ended(&mut self, how: &'static str) {
        *self.ends.entry(how).or_default() += 1;
    }

    fn fail(&mut self, number: usize, way: usize) {
        let element = &mut self.elements[number];
        let mut writer = element.writer.take().unwrap();
        element.node = None;
        let (state, end) = match way {
            0 => ("FAILED", "died without reporting a reason"),
            1 => ("NODE_FAIL", "node failed"),
            _ => {
                let reason = "its worker was killed by SIGKILL".to_owned();
                writer.push(SpoolEvent::Over(StartEnd::Again { reason }));
                writer.close(false).unwrap();
                ("PENDING", "its worker was killed by SIGKILL")
            }
        };
        element.state = state;
        element.next = Instant::now() + Duration::from_secs(3);
        self.ended(end);
    }

    fn end(&mut self, number: usize, result: StageResult, frames: Vec<FromWorker>) {
        let element = &mut self.elements[number];
        let mut writer = element.writer.take().unwrap();
        for frame in frames
            .into_iter()
            .chain([FromWorker::Answer(Answer::Result(result))])
        {
            writer.push(SpoolEvent::Frame(frame));
        }
        writer.push(SpoolEvent::Exited {
            status: ExitStatus::Code(0),
            usage: Usage::default(),
            out_of_memory: false,
        });
        writer.push(SpoolEvent::Over(StartEnd::Done));
        writer.close(true).unwrap();
        (element.state, element.node) = ("COMPLETED", None);
        self.ended("succeeded");
    }

    /// All shards, as one artifact.
    fn make_the_whole(&mut self, number: usize, work_dir: &Path) {
        let (spool, spec) = &self.specs[self.elements[number].job - 1];
        let Call::Run { artifacts, .. } = &spec.task.call else {
            panic!()
        };
        let staging = spool.join("staging");
        fs::create_dir_all(&staging).unwrap();
        let mut manifest = String::new();
        for entry in fs::read_dir(work_dir).unwrap().flatten() {
            if entry.file_type().unwrap().is_file() {
                manifest += &(fs::read_to_string(entry.path()).unwrap() + "\n");
            }
        }
        fs::write(staging.join("pairs"), manifest).unwrap();
        let contents = artifact::commit(&staging, artifacts).unwrap();
        let record = ArtifactRecord {
            hash: contents.hash,
            kind: "thing".into(),
            name: "pairs".into(),
            size: contents.size,
            files: contents.files,
            meta: retort_abi::ArtifactMeta::default(),
        };
        let result = StageResult {
            output: 1,
            summary: serde_json::Value::Null,
        };
        let record = Box::new(record);
        self.end(number, result, vec![FromWorker::Artifact { id: 1, record }]);
    }

    /// A node is gone, and Slurm restarts its elements.
    fn lose_a_node(&mut self) {
        let at_work: Vec<usize> = self
            .elements
            .iter()
            .filter_map(|element| element.node)
            .collect();
        if at_work.is_empty() {
            return;
        }
        let node = at_work[self.fate.draw(3, self.lost.len(), at_work.len())];
        self.lost.insert(node);
        for number in 0..self.elements.len() {
            let element = &mut self.elements[number];
            if element.node == Some(node) {
                (element.writer, element.node) = (None, None);
                element.state = "PENDING";
                element.next = Instant::now() + Duration::from_secs(8);
                self.ended("node failed, or preempted");
            }
        }
    }

    fn tell(&self) {
        let line = |element: &Element| {
            let index = element
                .index
                .map_or("N/A".to_owned(), |index| index.to_string());
            let node = element
                .node
                .map_or(String::new(), |node| format!("node{node}"));
            let reason = if element.starts > 0 {
                "BeginTime"
            } else {
                "Resources"
            };
            format!(
                "{}|{index}|{}|{reason}|{node}\n",
                element.job, element.state
            )
        };
        let text: String = self.elements.iter().map(line).collect();
        fs::write(self.dir.join("draft"), text).unwrap();
        fs::rename(self.dir.join("draft"), self.dir.join("queue")).unwrap();
    }
}

fn nodes(scale: Scale, fate: Fate, dir: PathBuf, shared: Arc<Shared>) {
    let mut cluster = Cluster {
        scale,
        fate,
        dir,
        specs: Vec::new(),
        elements: Vec::new(),
        lost: BTreeSet::new(),
        failed: BTreeSet::new(),
        ends: BTreeMap::new(),
        twice: BTreeSet::new(),
    };
    while !shared.over.load(Ordering::Relaxed) {
        cluster.take_jobs();
        cluster.start_what_has_room();
        cluster.look_for_parts_at_work_twice();
        let work_dir = cluster
            .specs
            .first()
            .and_then(|(_, spec)| match &spec.task.call {
                Call::Run { job, .. } => job.work_dir.clone(),
                _ => None,
            });
        if let Some(work_dir) = work_dir {
            cluster.work(&work_dir);
        }
        if shared.lose_a_node.swap(false, Ordering::Relaxed) {
            cluster.lose_a_node();
        }
        cluster.tell();
        let running = cluster
            .elements
            .iter()
            .filter(|element| element.state == "RUNNING");
        shared.running.store(running.count(), Ordering::Relaxed);
        shared.ends.lock().unwrap().clone_from(&cluster.ends);
        shared.twice.lock().unwrap().clone_from(&cluster.twice);
        thread::sleep(Duration::from_millis(100));
    }
}

/// A process's processor time in seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let ticks = ProcessStat::of(pid).unwrap().cpu_ticks;
    // SAFETY: a plain system call.
    ticks as f64 / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64
}

/// A process's peak memory in bytes.
fn most_memory(pid: u32) -> u64 {
    let kib = memory::peak_of(pid).unwrap_or_default();
    (kib as u64) << 10
}

#[test]
#[ignore = "two minutes: make test-long"]
fn a_million_pairs_on_sixty_four_nodes() {
    simulate(Scale {
        elements: 1200,
        nodes: 64,
        shard: 100,
        // As often as workers write with this many elements.
        pace: Duration::from_secs(5),
        one_in: 100,
        window: Duration::from_secs(12),
    });
}

#[test]
fn twelve_thousand_pairs_on_eight_nodes() {
    simulate(Scale {
        elements: 120,
        nodes: 8,
        shard: 10,
        pace: Duration::from_secs(1),
        one_in: 12,
        window: Duration::from_secs(4),
    });
}

fn simulate(scale: Scale) {
    let lab = prepare(scale);
    let shared = Arc::new(Shared::default());
    let cluster = start_nodes(scale, &lab, &shared);
    let settings = ["--executor", "slurm", "--slurm", "poll=5s"];
    let arguments = [&["run", "r.yaml"][..], &settings].concat();
    let first = Running::new(command(&lab, &arguments).spawn().unwrap());
    let pid = first.child.id();
    wait_for("a full cluster", || {
        (shared.running.load(Ordering::Relaxed) > 3 * scale.elements / 4).then_some(())
    });
    thread::sleep(scale.window / 4);
    let (cpu, began) = (cpu_seconds(pid), Instant::now());
    shared.lose_a_node.store(true, Ordering::Relaxed);
    thread::sleep(scale.window);
    let share = (cpu_seconds(pid) - cpu) / began.elapsed().as_secs_f64();
    let running = shared.running.load(Ordering::Relaxed);
    let memory = most_memory(pid);
    // The runner is gone, and a node with it, while the others go on.
    first.signal(9);
    first.end();
    shared.lose_a_node.store(true, Ordering::Relaxed);
    thread::sleep(scale.window / 4);
    let arguments = [&["resume"][..], &settings[2..]].concat();
    let second = Running::new(command(&lab, &arguments).spawn().unwrap());
    let watch = watch_memory(second.child.id());
    let said: CommandOutput = second.end();
    let memory = memory.max(watch.join().unwrap());
    shared.over.store(true, Ordering::Relaxed);
    cluster.join().unwrap();
    let said = said.expect(0);
    assert!(said.stderr.contains("taken up"), "{}", said.stderr);
    let figures = format!(
        "runner: {} MB at most, {:.1} % of a core with {running} elements running",
        memory >> 20,
        100.0 * share
    );
    eprintln!("{figures}");
    check_history(scale, &lab, &shared);
    assert!(memory < 500 << 20, "{figures}");
    // Processor time is only checked for many elements: with few, the runner's fixed costs dominate, and on a shared machine
    // they vary threefold. A thousand elements took 3.0 % on idle cores, and up to 7 % beside a compiler: `make test-long` runs
    // this alone.
    if scale.elements >= 1000 {
        assert!(
            share < 0.05 * (running as f64 / 1000.0).max(1.0),
            "{figures}"
        );
    }
}

/// Slurm's programs, the plugin and the recipe.
fn prepare(scale: Scale) -> Lab {
    // A file system in memory: the test measures the runner, not the disk under a thousand workers.
    let root = [Path::new("/dev/shm"), &std::env::temp_dir()]
        .into_iter()
        .find(|dir| dir.is_dir())
        .map(Path::to_owned)
        .unwrap();
    let dir = tempfile::Builder::new()
        .prefix("cluster")
        .tempdir_in(root)
        .unwrap();
    programs(dir.path());
    let plugins = dir.path().join("plugins");
    fs::create_dir(&plugins).unwrap();
    let divisible = "-DFAULTY_DIVISIBLE=\"true\"";
    compile(
        "faulty.c",
        &[divisible],
        &plugins.join("libretort_faulty.so"),
    );
    let lab = Lab { dir };
    lab.recipe(&[&format!("a: {{kind: do, workers: {}}}", scale.elements)]);
    lab
}

/// A command without the other tests' plugins, one of which has the same name.
fn command(lab: &Lab, arguments: &[&str]) -> Command {
    let dir = lab.dir.path();
    let path = std::env::var("PATH").unwrap();
    let mut command = Command::new(binary());
    command
        .args(arguments)
        .arg("--store")
        .arg(lab.store_dir())
        .current_dir(dir)
        .env_remove("RETORT_PLUGIN_PATH")
        .env_remove("XDG_DATA_HOME")
        .env("HOME", dir)
        .stdin(Stdio::null())
        .env("PATH", format!("{}:{path}", dir.join("bin").display()))
        .env("SIM", dir)
        .arg("--plugin-dir")
        .arg(dir.join("plugins"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn start_nodes(scale: Scale, lab: &Lab, shared: &Arc<Shared>) -> JoinHandle<()> {
    // SEED is another fate.
    let seed = std::env::var("SEED").map_or(1, |seed| seed.parse().expect("SEED is a number"));
    eprintln!("SEED={seed}");
    let (dir, shared) = (lab.dir.path().to_owned(), Arc::clone(shared));
    thread::spawn(move || {
        let queue = dir.join("queue");
        let run = AssertUnwindSafe(|| nodes(scale, Fate(seed), dir, shared));
        if let Err(panic) = panic::catch_unwind(run) {
            // Without jobs the runner ends, and this test with it.
            fs::write(queue, "").unwrap();
            panic::resume_unwind(panic);
        }
    })
}

/// The most memory that a process takes until it ends.
fn watch_memory(pid: u32) -> JoinHandle<u64> {
    thread::spawn(move || {
        let mut most = 0;
        while Path::new(&format!("/proc/{pid}/status")).exists() {
            let memory = most_memory(pid);
            if memory == 0 {
                break;
            }
            most = most.max(memory);
            thread::sleep(Duration::from_millis(200));
        }
        most
    })
}

/// Every pair was made once, and the history has everything that happened.
fn check_history(scale: Scale, lab: &Lab, shared: &Shared) {
    let output = retort(lab, &["artifacts", "list", "latest", "--json"]).json();
    let path = PathBuf::from(output[0]["path"].as_str().unwrap());
    let mut pairs = vec![0_u8; scale.pairs()];
    for line in fs::read_to_string(path.join("pairs")).unwrap().lines() {
        let (start, end) = line.split_once(' ').unwrap();
        let range = start.parse::<usize>().unwrap()..end.parse().unwrap();
        pairs[range].iter_mut().for_each(|times| *times += 1);
    }
    assert!(pairs.iter().all(|times| *times == 1));
    assert_eq!(*shared.twice.lock().unwrap(), BTreeSet::new());
    // No event is lost, and none was recorded twice, although the runner was killed while it read.
    let points = "select count(*) as n from v_metrics";
    let points = retort(lab, &["query", "--json", points]).json();
    assert_eq!(points[0]["n"], scale.elements * SHARDS);
    // Each start's end is recorded correctly.
    let starts = "select reason, count(*) as n from v_job_lives group by reason";
    let starts = retort(lab, &["query", "--json", starts]).json();
    let known: BTreeMap<String, usize> = starts
        .as_array()
        .unwrap()
        .iter()
        .map(|row| {
            let n = usize::try_from(row["n"].as_u64().unwrap()).unwrap();
            (row["reason"].as_str().unwrap_or("none").to_owned(), n)
        })
        .collect();
    let brought_about: BTreeMap<String, usize> = shared
        .ends
        .lock()
        .unwrap()
        .iter()
        .map(|(how, count)| ((*how).to_owned(), *count))
        .collect();
    assert_eq!(known, brought_about);
}

fn retort(lab: &Lab, arguments: &[&str]) -> CommandOutput {
    let output = command(lab, arguments).output().unwrap();
    let said = CommandOutput {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    };
    said.expect(0)
}
