//! Spools as their readers and writers see them.

use super::*;
use crate::frame::Line;

fn said(text: &str) -> SpoolEvent {
    SpoolEvent::Frame(FromWorker::Log(vec![Line {
        level: 3,
        text: text.into(),
        at: 0,
    }]))
}

fn all(reader: &mut Reader) -> Vec<Record> {
    let mut records = Vec::new();
    while reader.look(&mut records).unwrap() == SpoolReading::More {}
    records
}

#[test]
fn what_is_written_is_read_once_and_in_order_through_pieces_and_lives() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("3");
    let mut reader = Reader::new(dir.clone());
    assert!(all(&mut reader).is_empty(), "nothing has begun");
    let mut numbers = Vec::new();
    for life in 0..3 {
        assert!(!reader.turn(), "the next has not begun");
        let mut writer = Writer::open(&dir).unwrap();
        assert_eq!((writer.life(), reader.turn()), (life, life > 0));
        assert!(all(&mut reader).is_empty() && reader.life() == life);
        // Pieces and records beyond what is read at once.
        for size in [10, CHUNK + 5, 3, PIECE as usize, 1] {
            writer.push(said(&"x".repeat(size)));
            writer.flush().unwrap();
            numbers.extend(all(&mut reader).iter().map(|record| record.number));
        }
        writer.push(SpoolEvent::Over(LifeEnd::Done));
        writer.close(life == 1).unwrap();
        numbers.extend(all(&mut reader).iter().map(|record| record.number));
        assert_eq!(numbers.len(), 6 * (life as usize + 1));
    }
    assert!(numbers.is_sorted());
    assert_eq!(wasted_lives(&dir, 3), 2);
    let mut again = Reader::new(dir);
    let mut once_more = Vec::new();
    loop {
        once_more.extend(all(&mut again).iter().map(|record| record.number));
        if !again.turn() {
            break;
        }
    }
    assert_eq!(once_more, numbers);
}

#[test]
fn what_is_no_file_in_a_spool_is_neither_waited_for_nor_written_to() {
    type Make = fn(&Path);
    let pipe: Make = |path| {
        let made = std::process::Command::new("mkfifo").arg(path).status();
        assert!(made.unwrap().success());
    };
    let folder: Make = |path| fs::create_dir(path).unwrap();
    let device: Make = |path| std::os::unix::fs::symlink("/dev/zero", path).unwrap();
    for make in [pipe, folder, device] {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        for name in [STOP, ORDER, "life-0", "0.0.open"] {
            make(&at(name));
        }
        assert!(!is_to_stop(root.path()));
        for error in [
            ask_to_stop(root.path(), true).unwrap_err(),
            read_order(root.path()).unwrap_err(),
            Reader::new(root.path().to_owned())
                .look(&mut Vec::new())
                .unwrap_err(),
        ] {
            let damaged = matches!(error, SpoolError::Damaged { .. });
            assert!(
                damaged && error.to_string().contains("not a regular file"),
                "{error}"
            );
        }
        // The name is taken: the next life has the next number, and cannot tell the one before.
        let mut writer = Writer::open(root.path()).unwrap();
        assert_eq!(writer.life(), 1);
        assert!(!writer.supersede());
        assert_eq!(wasted_lives(root.path(), 1), 1);
        fs::remove_file(at("life-1")).unwrap();
        make(&at("life-1"));
        assert!(!writer.is_superseded());
        let error = writer.close(true).unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }
}

#[test]
fn what_a_superseded_life_has_left_is_read_before_the_next() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().to_owned();
    let mut reader = Reader::new(dir.clone());
    let texts = |reader: &mut Reader| -> Vec<String> {
        let records = all(reader);
        let text = |record: &Record| match &record.word {
            SpoolEvent::Frame(FromWorker::Log(lines)) => lines[0].text.clone(),
            other => panic!("{other:?}"),
        };
        records.iter().map(text).collect()
    };
    let mut first = Writer::open(&dir).unwrap();
    first.push(said("read in time"));
    first.flush().unwrap();
    assert_eq!(texts(&mut reader), ["read in time"]);
    // Its node is lost: a whole record, and one that is torn.
    first.push(said("whole"));
    first.flush().unwrap();
    first.push(said("torn"));
    let open = piece_path(&dir, 0, 0, false);
    let mut bytes = fs::read(&open).unwrap();
    bytes.extend(&first.pending[..first.pending.len() - 1]);
    fs::write(&open, bytes).unwrap();
    let mut second = Writer::open(&dir).unwrap();
    assert!(second.supersede());
    second.push(said("the next"));
    second.flush().unwrap();
    // Asked more than once before it is looked at, as Slurm may be.
    assert!(reader.turn() && reader.turn());
    assert_eq!(texts(&mut reader), ["whole", "the next"]);
    assert_eq!((reader.life(), reader.turn()), (1, false));
    second.push(said("the last"));
    second.close(true).unwrap();
    assert_eq!(texts(&mut reader), ["the last"]);
    let mut again = Reader::new(dir);
    assert!(again.turn());
    let all = ["read in time", "whole", "the next", "the last"];
    assert_eq!(texts(&mut again), all);
}

#[test]
fn a_life_learns_that_another_has_begun() {
    let root = tempfile::tempdir().unwrap();
    let old = Writer::open(root.path()).unwrap();
    assert!(!old.supersede() && !old.is_superseded());
    let mut new = Writer::open(root.path()).unwrap();
    assert!(new.supersede() && old.is_superseded() && new.is_followed_too_soon());
    let mut old = old;
    old.close(false).unwrap();
    assert!(!new.is_followed_too_soon());
    new.close(true).unwrap();
    let third = Writer::open(root.path()).unwrap();
    assert!(!third.supersede(), "it has ended");
}

#[test]
fn a_torn_end_is_nothing_yet() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("0");
    let mut writer = Writer::open(&dir).unwrap();
    writer.push(said("one"));
    writer.push(said("two"));
    writer.flush().unwrap();
    let path = piece_path(&dir, 0, 0, false);
    let whole = fs::read(&path).unwrap();
    for end in 0..=whole.len() {
        let mut reader = Reader::new(dir.clone());
        // As a file looks of which the last page has not come: its length, and zeros.
        let mut torn = whole[..end].to_vec();
        torn.resize(whole.len(), 0);
        for bytes in [&whole[..end], &torn[..]] {
            fs::write(&path, bytes).unwrap();
            let seen = all(&mut reader.clone()).len();
            assert!(
                seen <= 2 && (end == whole.len()) == (seen == 2),
                "{end}: {seen}"
            );
        }
        let first = all(&mut reader).len();
        fs::write(&path, &whole).unwrap();
        assert_eq!(first + all(&mut reader).len(), 2, "{end}");
    }
    let mut reader = Reader::new(dir.clone());
    let mut spoilt = whole.clone();
    spoilt[20] ^= 1;
    fs::remove_file(&path).unwrap();
    fs::write(piece_path(&dir, 0, 0, true), spoilt).unwrap();
    let error = reader.look(&mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("0.0.sealed is damaged"), "{error}");
}
