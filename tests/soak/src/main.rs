//! `retort-soak`: hostile inputs and disturbed runs, for some minutes or hours, and a report at the end.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use retort_soak::disturb::{self, Lab};
use retort_soak::fuzz::driver::{self, FuzzInput, Until};
use retort_soak::fuzz::{TARGETS, Target};
use retort_soak::report::Report;

/// Tries to break retort, and says what broke. Exit code 1 where something did.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Campaign,
}

#[derive(Subcommand)]
enum Campaign {
    /// Feed hostile inputs to everything that reads what others made.
    Fuzz {
        /// How long, in minutes; all targets together.
        #[arg(long, default_value_t = 5.0)]
        minutes: f64,
        /// This target alone (may be repeated).
        #[arg(long)]
        target: Vec<String>,
        /// Go on until each target had so many inputs, however long that takes.
        #[arg(long)]
        inputs: Option<u64>,
        #[command(flatten)]
        common: Common,
    },
    /// Kill, stop and starve runs of the real binary.
    Disturb {
        #[command(flatten)]
        disturbed: Disturbed,
        #[command(flatten)]
        common: Common,
    },
    /// Both, at the same time.
    All {
        #[command(flatten)]
        disturbed: Disturbed,
        #[command(flatten)]
        common: Common,
    },
    /// Feed one target, in this process; for `fuzz`.
    #[command(hide = true)]
    Feed {
        target: String,
        seed: u64,
        until: f64,
        note: PathBuf,
        /// Whether `until` is a number of inputs instead of seconds.
        #[arg(long)]
        inputs: bool,
        #[arg(long)]
        known: Vec<u64>,
    },
    /// Try one input on a target, in this process.
    Try {
        /// The target.
        target: String,
        /// The input.
        file: PathBuf,
    },
}

#[derive(clap::Args)]
struct Disturbed {
    /// How long, in minutes.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// So many stores at a time, each with a seed of its own: the given one and those that follow it.
    #[arg(long, default_value_t = 2)]
    lanes: u64,
    /// The binary; the one beside this program, if left out.
    #[arg(long)]
    retort: Option<PathBuf>,
}

#[derive(clap::Args)]
struct Common {
    /// Seed of all choices.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
    /// Where crashing inputs are kept.
    #[arg(long, default_value = "target/soak")]
    keep: PathBuf,
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Campaign::Fuzz {
            minutes,
            target,
            inputs,
            common,
        } => {
            let mut report = Report::new(common.seed);
            fuzz(minutes, &target, inputs, &common, &mut report);
            end(&report, &common)
        }
        Campaign::Disturb { disturbed, common } => {
            let mut report = Report::new(common.seed);
            disturb(&disturbed, &common, &mut report);
            end(&report, &common)
        }
        Campaign::All { disturbed, common } => {
            let (mut report, mut beside) = (Report::new(common.seed), Report::default());
            std::thread::scope(|scope| {
                scope.spawn(|| fuzz(disturbed.minutes, &[], None, &common, &mut beside));
                disturb(&disturbed, &common, &mut report);
            });
            report.add(beside);
            end(&report, &common)
        }
        Campaign::Feed {
            target,
            seed,
            until,
            note,
            inputs,
            known,
        } => {
            let until = match inputs {
                true => Until::Inputs(until as u64),
                false => Until::Time(Duration::from_secs_f64(until)),
            };
            let meal = FuzzInput {
                seed,
                until,
                known,
                note,
            };
            let inputs = driver::feed(named(&target), &meal);
            println!("{}", serde_json::to_string(&inputs).expect("plain data"));
            ExitCode::SUCCESS
        }
        Campaign::Try { target, file } => {
            let bytes = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            println!("{}", (named(&target).exercise)(&bytes));
            ExitCode::SUCCESS
        }
    }
}

fn named(name: &str) -> &'static Target {
    Target::named(name).unwrap_or_else(|| {
        let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("there is no target `{name}`: {}", names.join(", "));
        std::process::exit(2)
    })
}

fn fuzz(
    minutes: f64,
    wanted: &[String],
    inputs: Option<u64>,
    common: &Common,
    report: &mut Report,
) {
    let targets: Vec<&Target> = match wanted {
        [] => TARGETS.iter().collect(),
        names => names.iter().map(|name| named(name)).collect(),
    };
    let share = Duration::from_secs_f64(60.0 * minutes / targets.len() as f64);
    let began = Instant::now();
    for target in targets {
        let until = inputs.map_or(Until::Time(share), Until::Inputs);
        let (done, violations) = driver::run(target, common.seed, until, &common.keep, |meal| {
            feed_command(target, meal)
        });
        eprintln!(
            "{}: {} inputs, {} crashes",
            target.name,
            done.count,
            violations.len()
        );
        report.inputs.insert(target.name.to_owned(), done);
        report.violations.extend(violations);
    }
    report.seconds += began.elapsed().as_secs_f64();
}

fn disturb(disturbed: &Disturbed, common: &Common, report: &mut Report) {
    let beside = || {
        let this = std::env::current_exe().expect("this program");
        this.with_file_name("retort")
    };
    let retort = disturbed.retort.clone().unwrap_or_else(beside);
    let time = Duration::from_secs_f64(60.0 * disturbed.minutes);
    std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..disturbed.lanes)
            .map(|lane| {
                let retort = retort.clone();
                scope.spawn(move || {
                    let mut report = Report::default();
                    let lab = Lab::new(retort, &mut report);
                    disturb::disturb(&lab, common.seed + lane, time, &mut report);
                    report
                })
            })
            .collect();
        for lane in lanes {
            report.add(lane.join().expect("a lane"));
        }
    });
    disturb::check_variety(report);
}

fn feed_command(target: &Target, meal: &FuzzInput) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["feed", target.name, &meal.seed.to_string()]);
    match meal.until {
        Until::Inputs(most) => command.args([&most.to_string(), "--inputs"]),
        Until::Time(most) => command.arg(most.as_secs_f64().to_string()),
    };
    command.arg(&meal.note);
    for known in &meal.known {
        command.args(["--known", &known.to_string()]);
    }
    command
}

fn end(report: &Report, common: &Common) -> ExitCode {
    match common.json {
        true => println!(
            "{}",
            serde_json::to_string_pretty(report).expect("plain data")
        ),
        false => println!("{report}"),
    }
    ExitCode::from(u8::from(!report.violations.is_empty()))
}
