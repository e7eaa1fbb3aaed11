//! Ranks through libtorch's collective, as threads of one process: sums, and trainings with a sharded optimiser.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use retort_abi::{ArtifactMeta, Cancel, Failure, FailureCode, Host, LogLevel, Part};
use retort_engine::backend::Tensors;
use retort_engine::collective::{Collective, Rendezvous, SingleRank};
use retort_engine::error::{Error, Result};
use retort_engine::muon::Muon;
use retort_engine::tape::Variable;
use retort_engine::train::{StepOutput, TrainOptions, TrainingLoop, average};
use retort_libtorch::{Libtorch, ProductPrecision, meet_at};
use retort_tests::port::HeldPort;
use tch::Device;
use tempfile::TempDir;

/// A training's ranks meet at this port.
fn rendezvous(place: &HeldPort) -> Rendezvous {
    Rendezvous {
        host: "127.0.0.1".into(),
        port: place.number(),
        name: String::new(),
        held: false,
        patience: Duration::from_secs(120),
    }
}

#[test]
fn ranks_add_up_and_one_that_is_gone_is_an_error() {
    let place = HeldPort::take();
    let rendezvous = rendezvous(&place);
    let size = 3;
    let ranks = (0..size).map(|index| {
        let rendezvous = rendezvous.clone();
        std::thread::spawn(move || {
            let ranks = meet_at(&rendezvous, Device::Cpu, Part { index, of: size }).unwrap();
            assert!(ranks.on_device().is_none());
            let mut values = vec![0.1 * (index + 1) as f32; 1000];
            ranks.all_reduce(&mut values).unwrap();
            let mut of_one = [index as f32, -1.0];
            ranks.broadcast(&mut of_one, 2).unwrap();
            assert_eq!(of_one, [2.0, -1.0]);
            ranks.barrier().unwrap();
            if index == 1 {
                return values;
            }
            let began = std::time::Instant::now();
            let error = ranks.all_reduce(&mut [1.0]).unwrap_err();
            assert!(matches!(error, Error::Rank(_)), "{error:?}");
            // Not when it has waited for as long as it may.
            assert!(began.elapsed().as_secs() < 60);
            values
        })
    });
    let ranks: Vec<_> = ranks.collect();
    let all: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
    assert!((all[0][0] - 0.6).abs() < 1e-6);
    assert!(all.iter().all(|values| values == &all[0]), "the same bits");
}

/// A rank that is alive and does not come is waited for as long as the training says; what is configured is only the most.
#[test]
fn a_rank_that_does_not_come_is_given_up_in_time() {
    let place = HeldPort::take();
    let rendezvous = rendezvous(&place);
    let (done, given_up) = std::sync::mpsc::channel::<()>();
    let other = rendezvous.clone();
    let hangs = std::thread::spawn(move || {
        let ranks = meet_at(&other, Device::Cpu, Part { index: 1, of: 2 }).unwrap();
        ranks.all_reduce(&mut [1.0]).unwrap();
        let _ = given_up.recv();
        // It comes late, and ends what the first one's thread still waits for.
        let _ = ranks.all_reduce(&mut [2.0]);
    });
    let ranks = meet_at(&rendezvous, Device::Cpu, Part { index: 0, of: 2 }).unwrap();
    // What was set before does not matter.
    ranks.set_patience(Some(Duration::ZERO));
    ranks.set_patience(None);
    ranks.all_reduce(&mut [1.0]).unwrap();
    ranks.set_patience(Some(Duration::from_millis(1500)));
    let began = std::time::Instant::now();
    let mut values = [1.0];
    let error = ranks.all_reduce(&mut values).unwrap_err();
    let waited = began.elapsed();
    assert!(matches!(error, Error::Rank(_)), "{error:?}");
    assert!(
        error.to_string().contains("took longer than 1.5 s"),
        "{error}"
    );
    assert!(waited >= Duration::from_millis(1400) && waited.as_secs() < 60);
    // It does not wait for Gloo's thread, which goes on.
    drop(ranks);
    assert!(began.elapsed().as_secs() < 60);
    drop(done);
    hangs.join().unwrap();
    // Who gave up has its memory for itself.
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(std::hint::black_box(values), [1.0]);
}

#[test]
fn several_trainings_meet_in_a_store_that_somebody_else_holds() {
    let place = HeldPort::take();
    let rendezvous = |name: &str, held: bool| Rendezvous {
        host: "127.0.0.1".into(),
        port: place.number(),
        name: name.into(),
        held,
        patience: Duration::from_secs(120),
    };
    let alone = Part { index: 0, of: 1 };
    let holder = meet_at(&rendezvous("", false), Device::Cpu, alone).unwrap();
    for name in ["one", "two"] {
        let ranks = [0, 1].map(|index| {
            let rendezvous = rendezvous(name, true);
            std::thread::spawn(move || {
                let ranks = meet_at(&rendezvous, Device::Cpu, Part { index, of: 2 }).unwrap();
                let mut values = [index as f32 + 1.0];
                ranks.all_reduce(&mut values).unwrap();
                ranks.barrier().unwrap();
                values[0]
            })
        });
        assert_eq!(ranks.map(|rank| rank.join().unwrap()), [3.0, 3.0]);
    }
    drop(holder);
}

/// A training's host, which asks it to stop at a given step.
struct Until(u64, AtomicU64);

impl Host for Until {
    fn log(&self, _: LogLevel, _: &str) {}
    fn metric(&self, _: &str, _: u64, _: f64) {}
    fn progress(&self, done: u64, _: u64, _: &str) {
        self.1.store(done, Ordering::Relaxed);
    }
    fn cancelled(&self) -> Cancel {
        match self.1.load(Ordering::Relaxed) >= self.0 {
            true => Cancel::AtCheckpoint,
            false => Cancel::Run,
        }
    }
    fn artifact_begin(&self, _: &str, _: &str) -> std::result::Result<(u64, PathBuf), Failure> {
        Err(Failure::new(FailureCode::Internal, "none"))
    }
    fn artifact_commit(&self, _: u64, _: &ArtifactMeta) -> std::result::Result<(), Failure> {
        Ok(())
    }
    fn artifact_abort(&self, _: u64) {}
}

const STEPS: u64 = 24;
/// A step's samples, one number each, from which the loss is computed.
const BATCH: usize = 8;

type FinalWeights = BTreeMap<String, Vec<f32>>;

/// One rank's training of a matrix that Muon moves, two others and a vector, up to a step; the weights if it has ended.
fn train(dir: &Path, ranks: &dyn Collective, zero_stage: u8, until: u64) -> Option<FinalWeights> {
    let backend = Libtorch::with(Device::Cpu, ProductPrecision::Full, 1);
    let shapes: [(&str, &[usize]); 4] = [
        ("blocks.a", &[6, 5]),
        ("b", &[5, 4]),
        ("bias", &[4]),
        ("head", &[4, 3]),
    ];
    let params: Vec<_> = shapes
        .iter()
        .map(|(name, shape)| {
            let size = shape.iter().product::<usize>();
            let values: Vec<f32> = (0..size).map(|i| (i as f32 * 0.7 + 1.0).sin()).collect();
            let tensor = backend.floats(&values, shape).unwrap();
            ((*name).to_owned(), Variable::parameter(tensor))
        })
        .collect();
    let options = TrainOptions {
        steps: STEPS,
        batch: BATCH,
        warmup: 4,
        learning_rate: 0.01,
        clip: 0.1,
        ema: 0.9,
        muon: Some(Muon::default()),
        zero_stage,
        checkpoint_seconds: 1000,
        ..Default::default()
    };
    let average = average(&backend, &options, &params).unwrap();
    let host = Until(until, AtomicU64::new(0));
    let fit = TrainingLoop {
        host: &host,
        backend: &backend,
        work_dir: Some(dir),
        name: "test",
        ranks,
        options: &options,
        params: &params,
        ema: average.as_ref(),
        kept: None,
        adversary: None,
    };
    let loss = |step: u64| -> Result<StepOutput<Libtorch>> {
        let own = ranks.share(BATCH, 0, 1);
        let x: Vec<f32> = own
            .clone()
            .flat_map(|sample| {
                (0..6)
                    .map(move |at| ((step as usize * BATCH + sample) * 6 + at) as f32)
                    .map(f32::sin)
            })
            .collect();
        let x = Variable::constant(backend.floats(&x, &[own.len(), 6])?);
        let y = x.matmul(&params[0].1, false)?.matmul(&params[1].1, false)?;
        let y = y.add(&params[2].1)?;
        let y = y.matmul(&params[3].1, false)?;
        let loss = y.mul(&y)?.mean_all()?;
        let share = own.len() as f64 / BATCH as f64;
        Ok(StepOutput::new(loss.affine(share, 0.0)?, Vec::new()))
    };
    match fit.run(loss, None) {
        Ok(weights) => Some(
            weights
                .into_iter()
                .map(|(name, w)| (name, w.data))
                .collect(),
        ),
        Err(Error::Cancelled) => None,
        Err(error) => panic!("{error}"),
    }
}

/// The same with several ranks, as threads of this process; returns the first rank's result.
fn train_together(dir: &TempDir, size: usize, zero_stage: u8, until: u64) -> Option<FinalWeights> {
    if size == 1 {
        return train(dir.path(), &SingleRank, zero_stage, until);
    }
    let place = HeldPort::take();
    let rendezvous = rendezvous(&place);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..size)
            .map(|index| {
                let (rendezvous, dir) = (&rendezvous, dir.path());
                scope.spawn(move || {
                    let part = Part { index, of: size };
                    let ranks = meet_at(rendezvous, Device::Cpu, part).unwrap();
                    train(dir, &*ranks, zero_stage, until)
                })
            })
            .collect();
        let made: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        assert!(
            made.iter().all(|own| *own == made[0]),
            "all ranks hold the same"
        );
        made.into_iter().next().unwrap()
    })
}

#[test]
fn any_number_of_ranks_resumes_sharded_moments() {
    let new = || tempfile::tempdir().unwrap();
    let whole = |size, zero_stage| train_together(&new(), size, zero_stage, u64::MAX).unwrap();
    let one = whole(1, 0);
    let apart = |made: &FinalWeights| {
        let pairs = one
            .iter()
            .flat_map(|(name, values)| values.iter().zip(&made[name]));
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    for size in [2, 4] {
        let plain = whole(size, 0);
        assert_eq!(whole(size, 1), plain, "{size} ranks: not one bit");
        assert!(apart(&plain) < 1e-5, "{}", apart(&plain));
        // Interrupted.
        let dir = new();
        assert_eq!(train_together(&dir, size, 1, 9), None);
        assert_eq!(train_together(&dir, size, 1, u64::MAX).unwrap(), plain);
    }
    // In sequence: sharded or not, with other numbers of ranks.
    let dir = new();
    let legs = [
        (2, 1, 5),
        (4, 1, 10),
        (4, 0, 14),
        (1, 1, 17),
        (2, 1, 20),
        (1, 0, u64::MAX),
    ];
    let mut made = None;
    for (size, zero_stage, until) in legs {
        assert_eq!(made, None);
        made = train_together(&dir, size, zero_stage, until);
    }
    let made = made.expect("weights");
    assert!(apart(&made) < 1e-5, "{}", apart(&made));
}
