use super::*;

/// Numbers in [-1, 1) that look random.
pub fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn diagonal(mean: &[f64], deviations: &[f64]) -> Moments {
    let dim = mean.len();
    let mut covariance = vec![0.0; dim * dim];
    for (i, deviation) in deviations.iter().enumerate() {
        covariance[i * dim + i] = deviation * deviation;
    }
    Moments::new(mean.to_vec(), covariance).unwrap()
}

fn check(a: &Moments, b: &Moments, expected: f64) {
    for (a, b) in [(a, b), (b, a)] {
        let found = frechet_distance(a, b).unwrap();
        assert!(
            (found - expected).abs() <= 1e-6 * (1.0 + expected),
            "{found}, not {expected}"
        );
    }
}

#[test]
fn frechet_distance_of_gaussians() {
    // Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2.
    let a = diagonal(&[0.0, 1.0, 2.0], &[1.0, 2.0, 0.5]);
    check(
        &a,
        &diagonal(&[1.0, 1.0, 0.0], &[3.0, 2.0, 1.0]),
        5.0 + 4.0 + 0.25,
    );
    check(&a, &a, 0.0);
    check(&a, &diagonal(&[0.0, 1.0, 2.0], &[1.0, 0.0, 0.0]), 4.25); // singular
    check(
        &diagonal(&[0.0; 2], &[0.0; 2]),
        &diagonal(&[3.0, 4.0], &[0.0; 2]),
        25.0,
    );
    // Not commuting: the trace of (S1 S2)^(1/2) of 2 x 2 matrices is sqrt(tr S1 S2 + 2 sqrt(det S1 S2)).
    let s1 = Moments::new(vec![0.0; 2], vec![2.0, 1.0, 1.0, 2.0]).unwrap(); // det 3
    let s2 = Moments::new(vec![0.0; 2], vec![1.0, 0.0, 0.0, 5.0]).unwrap(); // det 5
    check(
        &s1,
        &s2,
        4.0 + 6.0 - 2.0 * (12.0 + 2.0 * 15f64.sqrt()).sqrt(),
    );
}

#[test]
fn moments_are_those_of_the_definition() {
    let dim = 70; // more than a block of columns
    let count = BATCH_ROWS + 7; // more than a batch of rows
    let features = noise(count * dim, 3);
    let moments = Moments::of(&features, dim).unwrap();
    let column = |i: usize| features.iter().skip(i).step_by(dim).map(|&x| f64::from(x));
    for (i, j) in [(0, 0), (3, 66), (66, 3), (69, 69)] {
        let (mi, mj) = (
            column(i).sum::<f64>() / count as f64,
            column(j).sum::<f64>() / count as f64,
        );
        let sum: f64 = column(i)
            .zip(column(j))
            .map(|(x, y)| (x - mi) * (y - mj))
            .sum();
        assert!((moments.mean[i] - mi).abs() < 1e-12);
        let found = moments.covariance[i * dim + j];
        assert!((found - sum / (count - 1) as f64).abs() < 1e-12, "{i} {j}");
    }
    let same = Moments::of(&features, dim).unwrap();
    check(&moments, &same, 0.0);
    let moved: Vec<f32> = features.iter().map(|x| x + 0.5).collect();
    check(
        &moments,
        &Moments::of(&moved, dim).unwrap(),
        0.25 * dim as f64,
    );
    // Fewer samples than features: singular, and still 0 from itself.
    let few = Moments::of(&features[..dim * 5], dim).unwrap();
    check(&few, &few, 0.0);
}

#[test]
fn parts_do_not_change_the_moments() {
    let dim = 70;
    let features = noise((2 * BATCH_ROWS + 9) * dim, 4);
    let mut running = RunningMoments::new(dim);
    for part in features.chunks(37 * dim) {
        running.add(part).unwrap();
    }
    let whole = Moments::of(&features, dim).unwrap();
    assert_eq!(running.finish().unwrap(), whole);
    assert!(RunningMoments::new(dim).finish().is_err());
}

#[test]
fn the_distance_is_that_of_roots_by_eigenvectors() {
    let dim = 40;
    for (rows, seed) in [(300, 7), (25, 8)] {
        // Correlated features; with 25 rows both covariances are singular.
        let mix = noise(dim * dim, seed + 100);
        let features = |seed, offset: f32| -> Vec<f32> {
            let plain = noise(rows * dim, seed);
            let mixed = |row: &[f32]| -> Vec<f32> {
                let weights = mix.chunks_exact(dim);
                weights
                    .map(|w| w.iter().zip(row).map(|(w, x)| w * x).sum::<f32>() + offset)
                    .collect()
            };
            plain.chunks_exact(dim).flat_map(mixed).collect()
        };
        let a = Moments::of(&features(seed, 0.0), dim).unwrap();
        let b = Moments::of(&features(seed + 1, 0.3), dim).unwrap();
        let root = |m: &[f64]| {
            let mut eigen = DMatrix::from_column_slice(dim, dim, m).symmetric_eigen();
            eigen.eigenvalues.apply(|x| *x = x.max(0.0).sqrt());
            eigen.recompose()
        };
        let s2 = DMatrix::from_column_slice(dim, dim, &b.covariance);
        let inner = root(&a.covariance) * &s2 * root(&a.covariance);
        let trace = |m: &[f64]| (0..dim).map(|i| m[i * (dim + 1)]).sum::<f64>();
        let means: f64 = a
            .mean
            .iter()
            .zip(&b.mean)
            .map(|(a, b)| (a - b).powi(2))
            .sum();
        let expected = means + trace(&a.covariance) + trace(&b.covariance)
            - 2.0 * root(inner.as_slice()).trace();
        check(&a, &b, expected);
    }
    // Nothing varies in one set.
    let still = Moments::new(vec![1.0; 2], vec![0.0; 4]).unwrap();
    check(&still, &diagonal(&[1.0, 3.0], &[1.0, 2.0]), 9.0);
}

/// The size of published figures: 2048 features, of fewer samples than that in one set.
#[test]
#[ignore = "a minute: make test-long"]
fn the_distance_of_2048_features() {
    let dim = 2048;
    let clock = std::time::Instant::now();
    let a = Moments::of(&noise(3000 * dim, 11), dim).unwrap();
    let b = Moments::of(&noise(1500 * dim, 12), dim).unwrap();
    println!(
        "moments of 4500 rows: {:.1} s",
        clock.elapsed().as_secs_f64()
    );
    let clock = std::time::Instant::now();
    let distance = frechet_distance(&a, &b).unwrap();
    println!(
        "distance {distance:.6}: {:.1} s",
        clock.elapsed().as_secs_f64()
    );
    assert!((frechet_distance(&b, &a).unwrap() / distance - 1.0).abs() < 1e-6);
    assert!(frechet_distance(&a, &a).unwrap() < 1e-6 * distance);
}

#[test]
fn inception_score_of_known_cases() {
    let logits = |p: &[f32]| -> Vec<f32> { p.iter().map(|p| p.ln().max(-1e4)).collect() };
    let sure = logits(&[1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]);
    let found = inception_score(&sure, 2, 2).unwrap();
    assert!(
        (found.mean - 2.0).abs() < 1e-12 && found.deviation < 1e-12,
        "{found:?}"
    );
    let unsure = [0.25; 12];
    let found = inception_score(&unsure, 4, 1).unwrap();
    assert!((found.mean - 1.0).abs() < 1e-12, "{found:?}");
    // Two splits of two: one varied (2), one not (1).
    let half = logits(&[1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]);
    let found = inception_score(&half, 2, 2).unwrap();
    assert!((found.mean - 1.5).abs() < 1e-12 && (found.deviation - 0.5).abs() < 1e-12);
    // By the definition, in splits of 2, 2 and 3 rows.
    let (rows, classes, splits) = (7, 5, 3);
    let random: Vec<f32> = noise(rows * classes, 9).iter().map(|x| 3.0 * x).collect();
    let p: Vec<Vec<f64>> = random
        .chunks(classes)
        .map(|row| {
            let e: Vec<f64> = row.iter().map(|&x| f64::from(x).exp()).collect();
            e.iter().map(|x| x / e.iter().sum::<f64>()).collect()
        })
        .collect();
    let scores = [0..2, 2..4, 4..7].map(|part| {
        let n = part.len() as f64;
        let q: Vec<f64> = (0..classes)
            .map(|c| p[part.clone()].iter().map(|p| p[c]).sum::<f64>() / n)
            .collect();
        let kl = |p: &Vec<f64>| p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
        (p[part.clone()].iter().map(kl).sum::<f64>() / n).exp()
    });
    let found = inception_score(&random, classes, splits).unwrap();
    let mean = scores.iter().sum::<f64>() / 3.0;
    assert!((found.mean - mean).abs() < 1e-12, "{found:?} {scores:?}");
    assert!(RunningScore::new(7, 5, 3).unwrap().finish().is_err());
}

#[test]
fn rows_of_sorted_classes_are_dealt_to_the_splits() {
    let (classes, each, splits) = (10, 50, 10);
    let count = classes * each;
    let sure = |class: usize| (0..classes).map(move |c| if c == class { 20.0 } else { 0.0 });
    let sorted: Vec<u32> = (0..count).map(|i| (i / each) as u32).collect();
    let mixed: Vec<u32> = (0..count).map(|i| (i % classes) as u32).collect();
    let logits =
        |labels: &[u32]| -> Vec<f32> { labels.iter().flat_map(|&l| sure(l as usize)).collect() };
    // Each split has a single class, so the score is 1.
    let apart = inception_score(&logits(&sorted), classes, splits).unwrap();
    assert!((apart.mean - 1.0).abs() < 1e-3, "{apart:?}");
    let best = inception_score(&logits(&mixed), classes, splits).unwrap();
    assert!((best.mean - 10.0).abs() < 1e-3, "{best:?}");
    // Positions 49 apart, so that every class reaches every split.
    let places: Vec<u32> = (0..count).map(|i| (i * 49 % count) as u32).collect();
    let running = RunningScore::new(count, classes, splits).unwrap();
    let mut running = running.dealt(places);
    for part in logits(&sorted).chunks(7 * classes) {
        running.add(part).unwrap();
    }
    let dealt = running.finish().unwrap();
    assert!((dealt.mean - best.mean).abs() < 0.5, "{dealt:?}");

    assert!(is_sorted_by_class(&sorted) && !is_sorted_by_class(&mixed));
    assert!(is_sorted_by_class(&[3, 3, 1, 1, 1]));
    assert!(!is_sorted_by_class(&[1, 1, 3, 3, 1]));
    // One class, and one row of each.
    assert!(!is_sorted_by_class(&[1, 1, 1]) && !is_sorted_by_class(&[0, 1, 2]));
    assert!(!is_sorted_by_class(&[]));
}

#[test]
fn what_is_no_covariance_is_refused() {
    let whole = vec![4.0, 1.0, 0.5, 1.0, 3.0, -2.0, 0.5, -2.0, 2.0];
    let of = |changes: &[(usize, f64)]| {
        let mut covariance = whole.clone();
        changes
            .iter()
            .for_each(|(at, value)| covariance[*at] = *value);
        let made = Moments::new(vec![0.0; 3], covariance);
        made.map(drop).map_err(|e| e.to_string())
    };
    let said = |text: &str| Err(format!("covariance: {text}"));
    assert_eq!(of(&[]), Ok(()));
    // `numpy.tril` of it.
    let lower = of(&[(1, 0.0), (2, 0.0), (5, 0.0)]);
    let expected = "element (1, 0) is 1, and element (0, 1) 0: a covariance is symmetric";
    assert_eq!(lower, said(expected));
    // Asymmetry by rounding is accepted, larger asymmetry is not.
    assert_eq!(of(&[(5, -2.0 + 3e-6)]), Ok(()));
    assert!(of(&[(5, -2.0 + 5e-6)]).is_err());
    let expected = "element (1, 1) is -0.001, and no variance is below 0";
    assert_eq!(of(&[(4, -0.001)]), said(expected));
    assert_eq!(of(&[(8, 0.0)]), Ok(()));
    for (value, text) in [(f64::NAN, "NaN"), (f64::NEG_INFINITY, "-inf")] {
        let expected = format!("element (1, 2) is {text}");
        assert_eq!(of(&[(5, value)]), said(&expected));
    }
    // A constant feature has variance 0 despite rounding.
    let still: Vec<f32> = (0..6000).map(|i| [0.1, i as f32][i % 2]).collect();
    let moments = Moments::of(&still, 2).unwrap();
    Moments::new(moments.mean, moments.covariance).unwrap();
}

#[test]
fn unusable_input_is_refused() {
    assert!(matches!(
        Moments::of(&[1.0; 5], 2),
        Err(StatisticsError::Shape { .. })
    ));
    assert!(matches!(
        Moments::of(&[1.0; 2], 2),
        Err(StatisticsError::TooFew { .. })
    ));
    let error = Moments::of(&[1.0, 1.0, f32::NAN, 1.0], 2).unwrap_err();
    assert_eq!(error.to_string(), "features: value 2 is not finite");
    assert!(Moments::new(vec![0.0; 2], vec![0.0; 3]).is_err());
    let error = Moments::new(vec![0.0, f64::NAN], vec![0.0; 4]).unwrap_err();
    assert_eq!(error.to_string(), "mean: value 1 is not finite");
    let one = diagonal(&[0.0], &[1.0]);
    assert!(frechet_distance(&one, &diagonal(&[0.0; 2], &[1.0; 2])).is_err());
    assert!(inception_score(&[0.5; 4], 2, 3).is_err());
    assert_eq!(class_agreement(&[1, 2, 3, 4], &[1, 0, 3, 4]), Ok(0.75));
    assert!(class_agreement(&[1], &[1, 2]).is_err());
    assert!(class_agreement(&[], &[]).is_err());
}
