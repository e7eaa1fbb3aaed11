//! Training data: splits, augmentation, prepared images, batches prepared ahead.

use super::*;

#[test]
fn a_split_is_stratified_and_repeatable() {
    let labels: Vec<u32> = (0..103).map(|i| i % 10).chain([10]).collect();
    let bytes = Bytes::Memory(vec![0; labels.len()]);
    let names = vec![String::new(); 11];
    let images = Images::new((1, 1, 1), 255.0, names, labels, bytes);
    let (train, held) = images.split(0.2, 7);
    assert_eq!((train.len(), held.len()), (84, 20));
    for class in 0..10 {
        assert_eq!(
            held.iter().filter(|&&i| images.labels[i] == class).count(),
            2
        );
    }
    assert!(
        train.contains(&103),
        "a class of one image stays in training"
    );
    let mut all = [train, held.clone()].concat();
    all.sort_unstable();
    assert_eq!(all, (0..104).collect::<Vec<_>>());
    assert_eq!(images.split(0.2, 7).1, held);
    assert_ne!(images.split(0.2, 8).1, held);
    assert!(images.split(0.0, 7).1.is_empty());
}

#[test]
fn what_training_sees_is_a_function_of_seed_epoch_and_image() {
    let rows: Vec<String> = (0..40)
        .map(|i| {
            (0..36)
                .map(|p| format!("{},", (p * 7 + i) % 200))
                .collect::<String>()
                + "0"
        })
        .collect();
    let options = DataOptions {
        max: Some(255.0),
        crop: Some(Size::Side(4)),
        flip: true,
        ..DataOptions::default()
    };
    let images = csv(rows.join("\n").as_bytes(), options).unwrap();
    assert_eq!(images.shape(), [1, 4, 4]);
    let all: Vec<usize> = (0..40).collect();
    let seen = |seed, epoch| {
        images
            .gather_augmented(&all, Some(Augment { seed, epoch }))
            .unwrap()
            .0
    };
    let first = seen(3, 0);
    assert_eq!(first, seen(3, 0));
    assert_ne!(first, seen(3, 1));
    assert_ne!(first, seen(4, 0));
    // One by one and in another order.
    let one = images
        .gather_augmented(&[17], Some(Augment { seed: 3, epoch: 0 }))
        .unwrap()
        .0;
    assert_eq!(one, first[17 * 16..18 * 16]);
    // Every position and both orientations occur.
    let views: std::collections::BTreeSet<_> = (0..40)
        .map(|i| images.view(i, Some(Augment { seed: 3, epoch: 0 })))
        .collect();
    assert!(views.iter().any(|view| view.mirrored) && views.iter().any(|view| !view.mirrored));
    for place in 0..3 {
        assert!(
            views.iter().any(|view| view.top == place)
                && views.iter().any(|view| view.left == place)
        );
    }
    // Ten views for tokens: the middle and the corners, and these mirrored.
    let ten = images.views();
    assert_eq!(ten.len(), 10);
    let part = |top, left, mirrored| View {
        top,
        left,
        mirrored,
    };
    assert_eq!(
        [ten[0], ten[1], ten[5], ten[9]],
        [
            part(1, 1, false),
            part(0, 0, false),
            part(1, 1, true),
            part(2, 2, true)
        ]
    );
    let row = |view| images.gather_view(&[0], view).unwrap().0[..4].to_vec();
    let value = |p: usize| (p * 7 % 200) as f32 / 255.0 * 2.0 - 1.0;
    assert_eq!(row(ten[1]), [value(0), value(1), value(2), value(3)]);
    assert_eq!(row(ten[5]), [value(10), value(9), value(8), value(7)]);
    // Without augmentation, the middle as stored.
    let middle = images.gather(&[0]).unwrap().0;
    assert_eq!(middle[..4], [value(7), value(8), value(9), value(10)]);
    let mirrored = (0..40)
        .find(|&i| images.view(i, Some(Augment { seed: 3, epoch: 0 })).mirrored)
        .unwrap();
    let View { top, left, .. } = images.view(mirrored, Some(Augment { seed: 3, epoch: 0 }));
    let stored = |p: usize| ((p * 7 + mirrored) % 200) as f32 / 255.0 * 2.0 - 1.0;
    let row: Vec<f32> = (0..4).rev().map(|x| stored(top * 6 + left + x)).collect();
    assert_eq!(first[mirrored * 16..][..4], row[..]);
}

#[test]
fn prepared_images_are_those_that_were_prepared() {
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<String> = (0..5).map(|i| format!("{i},1,2,3,{}", i % 2)).collect();
    let options = DataOptions {
        csv: Some("a.csv".into()),
        ..max16()
    };
    std::fs::write(dir.path().join("a.csv"), rows.join("\n")).unwrap();
    let source = Source::open(&options, dir.path(), &mut |_, _| true).unwrap();
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let mut writer = prepared::Writer::new(&out, prepared::Description::of(&source)).unwrap();
    source
        .read(&mut |_| true, &mut |image| writer.push(&image))
        .unwrap();
    let damaged = content::Damaged {
        name: "b.png".into(),
        why: "cut".into(),
    };
    writer.finish(&[damaged]).unwrap();
    let images = Images::of(Prepared::open(&out).unwrap());
    let held = read(&options, dir.path()).unwrap();
    assert_eq!(
        (pixels(&images), &images.labels),
        (pixels(&held), &held.labels)
    );
    let manifest = std::fs::read_to_string(out.join("manifest.jsonl")).unwrap();
    assert_eq!(manifest.lines().count(), 6);
    assert!(
        manifest.ends_with("{\"file\":\"b.png\",\"damaged\":\"cut\"}\n"),
        "{manifest}"
    );
    std::fs::write(
        out.join("labels.npy"),
        [crate::numpy::header("<u4", &[5]), vec![9; 20]].concat(),
    )
    .unwrap();
    assert!(
        Prepared::open(&out)
            .err()
            .unwrap()
            .to_string()
            .contains("a label beyond 2 classes")
    );
}

#[test]
fn a_feed_gives_each_step_its_images_from_wherever_it_begins() {
    let rows: Vec<String> = (0..50).map(|i| format!("{i},0,0,0,0")).collect();
    let options = DataOptions {
        max: Some(50.0),
        ..DataOptions::default()
    };
    let images = std::sync::Arc::new(csv(rows.join("\n").as_bytes(), options).unwrap());
    let feed = || {
        let picks = |step: u64| vec![step as usize, (step * 7 % 50) as usize];
        feed::Feed::new(std::sync::Arc::clone(&images), picks, |step| Augment {
            seed: 1,
            epoch: step,
        })
    };
    let mut whole = feed();
    let all: Vec<Vec<f32>> = (0..20)
        .map(|step| whole.take(step).unwrap().pixels)
        .collect();
    assert_eq!(all[9][0], 9.0 / 50.0 * 2.0 - 1.0);
    let mut late = feed();
    for step in [11, 12, 5, 6, 6, 19] {
        assert_eq!(
            late.take(step).unwrap().pixels,
            all[step as usize],
            "step {step}"
        );
    }
    assert!(late.wait().1 >= 0.0);
}
