//! Points and curves: all points are kept, in whatever order they come, and summarised exactly.

use super::*;

#[test]
fn nan_and_infinities_are_values() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        let values = [
            0.5,
            f64::NAN,
            f64::NEG_INFINITY,
            3.0,
            f64::INFINITY,
            f64::NAN,
        ];
        let points: Vec<_> = (0..)
            .zip(values)
            .map(|(step, value)| a_point(step, value))
            .collect();
        store
            .append_metrics(attempt, &losses(&points))
            .await
            .unwrap();
        let read = store.metric_series(&run, "distill/loss").await.unwrap();
        assert_eq!(
            format!(
                "{:?}",
                read.iter().map(|point| point.value).collect::<Vec<_>>()
            ),
            format!("{values:?}")
        );
        assert_eq!(read[3].at, points[3].at);
        let summary = &store.last_metrics(&run).await.unwrap()[0];
        assert!(summary.last.is_nan());
        assert_eq!(
            (summary.min, summary.max),
            (Some(f64::NEG_INFINITY), Some(f64::INFINITY))
        );
        let shown = serde_json::to_value(summary).unwrap();
        assert_eq!(
            (&shown["last"], &shown["min"]),
            (&json!("NaN"), &json!("-Infinity"))
        );
    });
}

#[test]
fn a_later_point_at_a_step_replaces_the_earlier() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        store
            .append_metrics(attempt, &losses(&[a_point(0, f64::NAN)]))
            .await
            .unwrap();
        // More than one statement's worth, twice.
        for round in [0.0, 1000.0] {
            let points: Vec<_> = (0..600_u32)
                .map(|step| a_point(step.into(), round + f64::from(step)))
                .collect();
            store
                .append_metrics(attempt, &losses(&points))
                .await
                .unwrap();
        }
        store
            .append_metrics(attempt, &losses(&[a_point(7, -1.0)]))
            .await
            .unwrap();
        let read = store.metric_series(&run, "loss").await.unwrap();
        assert_eq!(read.len(), 600);
        assert_eq!((read[7].value, read[599].value), (-1.0, 1599.0));
        let summary = &store.last_metrics(&run).await.unwrap()[0];
        assert_eq!((summary.last_step, summary.last), (599, 1599.0));
        assert_eq!((summary.min, summary.max), (Some(-1.0), Some(1599.0)));
    });
}

/// Numbers that look random, and are the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[test]
fn points_in_any_order_are_kept_as_a_map_would_keep_them() {
    check(|dir| async move {
        let mut store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        let mut dice = Dice(7);
        let mut model = std::collections::BTreeMap::new();
        let mut end = 0;
        for round in 0..40_u32 {
            // Mostly onwards, sometimes back into what is there; few or many at a time.
            let count = [1, 3, 700, 1500, 9000][dice.below(5) as usize];
            let back = if round % 3 == 2 {
                dice.below(end + 1)
            } else {
                0
            };
            let start = end - back;
            let stride = 1 + dice.below(3);
            let mut points = Vec::new();
            for number in 0..count {
                let step = match round % 5 {
                    4 => start + dice.below(count * 2),
                    _ => start + number * stride,
                };
                let value = match dice.below(50) {
                    0 => f64::NAN,
                    1 => f64::INFINITY,
                    number => number as f64 / 7.0,
                };
                points.push(a_point(step, value));
                model.insert(step, value);
            }
            end = end.max(*model.keys().next_back().unwrap() + 1);
            store
                .append_metrics(attempt, &losses(&points))
                .await
                .unwrap();
            if round % 7 == 6 {
                store.close().await;
                store = open(&dir).await;
            }
        }
        let read = store.metric_series(&run, "distill/loss").await.unwrap();
        let bits = |value: f64| if value.is_nan() { 1 } else { value.to_bits() };
        let found: Vec<_> = read
            .iter()
            .map(|point| (point.step, bits(point.value)))
            .collect();
        let expected: Vec<_> = model
            .iter()
            .map(|(&step, &value)| (step, bits(value)))
            .collect();
        assert_eq!(found, expected);
        assert!(
            read.iter()
                .all(|point| point.at.0 == 1_800_000_000_000 + point.step.cast_signed())
        );
        let summary = &store.last_metrics(&run).await.unwrap()[0];
        assert_eq!(summary.points, model.len() as u64);
        assert_eq!(bits(summary.last), expected.last().unwrap().1);
        // Nothing is left behind of blocks that were packed again.
        let orphans: i64 = sqlx::query_scalar(
            "select count(*) from packs where key not in (select pack from blocks)",
        )
        .fetch_one(store.pool())
        .await
        .unwrap();
        assert_eq!(orphans, 0);
        // SQL sees the same.
        let (count, total): (i64, f64) = sqlx::query_as(
            "select count(*), sum(value) from v_metrics where value < 1000 and series = 'loss'",
        )
        .fetch_one(store.pool())
        .await
        .unwrap();
        let finite: Vec<f64> = model
            .values()
            .copied()
            .filter(|value| value.is_finite())
            .collect();
        assert_eq!(count, finite.len() as i64);
        assert!((total - finite.iter().sum::<f64>()).abs() < 1e-6 * total.abs());
    });
}

#[test]
fn a_curve_sums_up_what_is_there() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        let values: Vec<f64> = (0..200_000_u32)
            .map(|step| f64::from(step * 7919 % 1013))
            .collect();
        let points: Vec<_> = (0..)
            .zip(&values)
            .map(|(step, &value)| a_point(step, value))
            .collect();
        for points in points.chunks(30_000) {
            store
                .append_metrics(attempt, &losses(points))
                .await
                .unwrap();
        }
        for (buckets, axis) in [(10, Axis::Step), (1000, Axis::Step), (7, Axis::Time)] {
            for (from, to) in [(0, u64::MAX), (5_000, 150_001), (199_999, 199_999)] {
                let query = CurveQuery {
                    buckets,
                    axis,
                    from,
                    to,
                };
                let curve = store.curve(&run, "loss", query).await.unwrap();
                assert!(!curve.is_empty() && curve.len() <= buckets as usize);
                let (first, last) = (from as usize, (to as usize).min(values.len() - 1));
                let mut next = first as u64;
                for bucket in &curve {
                    assert_eq!(bucket.first_step, next, "no gap, no overlap");
                    next = bucket.last_step + 1;
                    let inside = &values[bucket.first_step as usize..=bucket.last_step as usize];
                    assert_eq!(bucket.points, inside.len() as u64);
                    assert_eq!(bucket.min, inside.iter().copied().reduce(f64::min));
                    assert_eq!(bucket.max, inside.iter().copied().reduce(f64::max));
                    let mean = inside.iter().sum::<f64>() / inside.len() as f64;
                    assert!((bucket.mean.unwrap() - mean).abs() < 1e-9);
                }
                assert_eq!(next, last as u64 + 1);
            }
        }
        assert_eq!(
            store
                .curve(
                    &run,
                    "no",
                    CurveQuery {
                        buckets: 5,
                        axis: Axis::Step,
                        from: 0,
                        to: 9
                    }
                )
                .await
                .unwrap(),
            []
        );
    });
}

/// How many spans there are. Each sums up its blocks.
async fn spans(store: &Store) -> i64 {
    let (all, wrong): (i64, i64) = sqlx::query_as(
        "select count(*), coalesce(sum((s.last_step, s.points, s.numbers, s.sum, s.min, s.max, s.first_at, s.last_at) is not (
             select max(b.last_step), sum(b.points), sum(b.numbers), sum(b.sum), min(b.min), max(b.max), min(b.first_at),
                    max(b.last_at)
             from blocks b where b.series = s.series and b.first_step between s.first_step and s.last_step)), 0)
         from spans s",
    )
    .fetch_one(store.pool())
    .await
    .unwrap();
    assert_eq!(wrong, 0);
    all
}

/// The buckets of `loss` have all points, once.
async fn check_curve(store: &Store, run: &RunId, values: &[f64]) {
    for axis in [Axis::Step, Axis::Time] {
        for (from, to) in [(0, u64::MAX), (1500, 299_999)] {
            let query = CurveQuery {
                buckets: 3,
                axis,
                from,
                to,
            };
            let curve = store.curve(run, "loss", query).await.unwrap();
            assert!((2..=3).contains(&curve.len()), "{}", curve.len());
            let mut next = from;
            for bucket in &curve {
                assert_eq!(bucket.first_step, next, "no gap, no overlap");
                next = bucket.last_step + 1;
                let inside = &values[bucket.first_step as usize..=bucket.last_step as usize];
                assert_eq!(bucket.points, inside.len() as u64);
                assert_eq!(bucket.max, inside.iter().copied().reduce(f64::max));
                let mean = inside.iter().sum::<f64>() / inside.len() as f64;
                assert!((bucket.mean.unwrap() - mean).abs() < 1e-9);
            }
            assert_eq!(next, to.min(values.len() as u64 - 1) + 1);
        }
    }
}

#[test]
fn spans_follow_their_blocks() {
    check(|dir| async move {
        let mut store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        let mut values: Vec<f64> = (0..320_000_u32)
            .map(|step| f64::from(step * 7919 % 1013))
            .collect();
        let points: Vec<_> = (0..)
            .zip(&values)
            .map(|(step, &value)| a_point(step, value))
            .collect();
        // Blocks of the least size, so that the spans are small too.
        for (number, points) in points.chunks(1024).enumerate() {
            if number == 100 {
                // What is remembered of a series is read again.
                store.close().await;
                store = open(&dir).await;
            }
            store
                .append_metrics(attempt, &losses(points))
                .await
                .unwrap();
        }
        assert_eq!(spans(&store).await, 4);
        check_curve(&store, &run, &values).await;
        // A block within the second span changes; the others stay.
        values[100_000] = 5000.0;
        let late = losses(&[a_point(100_000, 5000.0)]);
        store.append_metrics(attempt, &late).await.unwrap();
        assert_eq!(spans(&store).await, 3);
        check_curve(&store, &run, &values).await;

        succeed(&store, &run).await;
        store.close().await;
        let copy = dir.with_extension("copy");
        export(&dir, None, &copy, false).await.unwrap();
        let other = open(&dir.with_extension("other")).await;
        other.import(&copy).await.unwrap();
        assert_eq!(spans(&other).await, 4);
        check_curve(&other, &run, &values).await;
        other.close().await;
        let store = open(&dir).await;
        store.remove_runs(&[run]).await.unwrap();
        assert_eq!(spans(&store).await, 0);
    });
}

#[test]
fn a_long_series_is_exported_piece_by_piece() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        for round in 0..5_u32 {
            let points: Vec<_> = (0..3000)
                .map(|step| a_point(u64::from(3 * (3000 * round + step)), f64::from(step)))
                .collect();
            store
                .append_metrics(attempt, &losses(&points))
                .await
                .unwrap();
        }
        let series = &store.last_metrics(&run).await.unwrap()[0];
        let (mut after, mut all, mut pieces) = (None, Vec::new(), 0);
        while let Some(points) = store.points_after(series, after).await.unwrap() {
            assert!(points.len() <= 8192, "{}", points.len());
            after = points.last().map(|point| point.step);
            all.extend(points);
            pieces += 1;
        }
        assert!(pieces > 1);
        assert_eq!(
            all,
            store.metric_series(&run, "distill/loss").await.unwrap()
        );
    });
}
