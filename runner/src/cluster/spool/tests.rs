//! Reading and writing spools.

use std::time::Duration;

use retort_abi::Part;

use super::job_spec::JOB_SPEC;
use super::*;
use crate::frame::{Line, Task};

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
fn records_are_read_once_and_in_order() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("3");
    let mut reader = Reader::new(dir.clone());
    assert!(all(&mut reader).is_empty(), "nothing has begun");
    let mut numbers = Vec::new();
    for start in 0..3 {
        assert!(!reader.advance(), "the next has not begun");
        let mut writer = Writer::open(&dir).unwrap();
        assert_eq!((writer.start(), reader.advance()), (start, start > 0));
        assert!(all(&mut reader).is_empty() && reader.start() == start);
        // More pieces and records than are read at once.
        for size in [10, CHUNK + 5, 3, PIECE as usize, 1] {
            writer.push(said(&"x".repeat(size)));
            writer.flush().unwrap();
            numbers.extend(all(&mut reader).iter().map(|record| record.number));
        }
        writer.push(SpoolEvent::Over(StartEnd::Done));
        writer.close(start == 1).unwrap();
        numbers.extend(all(&mut reader).iter().map(|record| record.number));
        assert_eq!(numbers.len(), 6 * (start as usize + 1));
    }
    assert!(numbers.is_sorted());
    assert_eq!(wasted_starts(&dir, &dir, 2, 0), 1);
    assert_eq!(all_wasted_starts(&dir, &dir, 0), 2);
    let mut again = Reader::new(dir);
    let mut once_more = Vec::new();
    loop {
        once_more.extend(all(&mut again).iter().map(|record| record.number));
        if !again.advance() {
            break;
        }
    }
    assert_eq!(once_more, numbers);
}

#[test]
fn a_start_without_a_piece_holds_nothing_up() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("0");
    for start in [0, 3] {
        let mut writer = Writer::open(&dir).unwrap();
        assert_eq!(writer.start(), start);
        writer.push(said("here"));
        writer.flush().unwrap();
        for gap in [1, 2] {
            fs::write(mark(&dir, gap), "").unwrap();
        }
    }
    let (mut reader, mut records) = (Reader::new(dir), Vec::new());
    while reader.look_on(&mut records).unwrap() {}
    let numbers: Vec<u64> = records.iter().map(|record| record.number).collect();
    assert_eq!((numbers, reader.start()), (vec![0, 3 << 32], 3));
}

#[test]
fn only_files_in_a_spool_are_used() {
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
        for name in [STOP, JOB_SPEC, "life-0", "0.0.open"] {
            make(&at(name));
        }
        assert!(!is_to_stop(root.path()));
        for error in [
            ask_to_stop(root.path(), true).unwrap_err(),
            read_job_spec(root.path()).unwrap_err(),
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
        // The name is taken: the next start gets the next number, and cannot notify the previous one.
        let mut writer = Writer::open(root.path()).unwrap();
        assert_eq!(writer.start(), 1);
        assert!(!writer.supersede());
        assert_eq!(wasted_starts(root.path(), root.path(), 1, 0), 1);
        fs::remove_file(at("life-1")).unwrap();
        make(&at("life-1"));
        assert!(!writer.is_superseded());
        let error = writer.close(true).unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }
}

#[test]
fn what_a_superseded_start_has_left_is_read_before_the_next() {
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
    // Its node is lost: a complete record, and a torn one.
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
    // `advance` may be called more than once before the next read.
    assert!(reader.advance() && reader.advance());
    assert_eq!(texts(&mut reader), ["whole", "the next"]);
    assert_eq!((reader.start(), reader.advance()), (1, false));
    second.push(said("the last"));
    second.close(true).unwrap();
    assert_eq!(texts(&mut reader), ["the last"]);
    let mut again = Reader::new(dir);
    assert!(again.advance());
    let all = ["read in time", "whole", "the next", "the last"];
    assert_eq!(texts(&mut again), all);
}

#[test]
fn a_start_learns_that_another_has_begun() {
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
        // Like a file whose last page has not arrived: its full length, and zeros.
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

fn spec(elements: Vec<Option<Part>>) -> JobSpec {
    JobSpec {
        format: FORMAT,
        elements,
        task: Task {
            plugin: "/p.so".into(),
            hash: None,
            call: frame::Call::Describe,
        },
        threads: 2,
        requeue: 3,
        wasted: Vec::new(),
        interval: Duration::from_millis(250),
        again: true,
        ranks: false,
        meeting: String::new(),
    }
}

#[test]
fn orders_that_make_no_sense_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let part = |index, of| Some(Part { index, of });
    let parts = || spec(vec![part(0, 3), part(2, 3)]);
    let check = |spec: JobSpec, expected: &str| {
        // Such a file is not written and, if another program wrote it, not read.
        let written = write_job_spec(root.path(), &spec);
        assert_eq!(written.is_ok(), expected.is_empty(), "{written:?}");
        let text = serde_json::to_vec(&spec).unwrap();
        fs::write(root.path().join(JOB_SPEC), text).unwrap();
        match read_job_spec(root.path()) {
            Ok(read) => assert_eq!((read, ""), (spec, expected)),
            Err(error) => {
                let said = error.to_string();
                assert!(!expected.is_empty() && said.contains(expected), "{said}");
                assert!(matches!(error, SpoolError::Damaged { .. }));
            }
        }
    };
    check(spec(vec![None]), "");
    check(parts(), "");
    for elements in [
        vec![],
        vec![None; 3],
        vec![part(0, 2), None],
        vec![part(0, 2), part(0, 2)],
        vec![part(2, 2)],
        vec![part(0, 2), part(1, 3)],
    ] {
        check(spec(elements), "are not parts of one stage");
    }
    for interval in [Duration::ZERO, Duration::MAX] {
        check(
            JobSpec {
                interval,
                ..parts()
            },
            "between two writes",
        );
    }
    for (wasted, expected) in [
        (vec![0, 3], ""),
        (vec![1], "wasted starts of 1 elements, of 2"),
    ] {
        check(JobSpec { wasted, ..parts() }, expected);
    }
    for threads in [0, usize::MAX] {
        check(JobSpec { threads, ..parts() }, "threads");
    }
    check(
        JobSpec {
            format: 7,
            ..parts()
        },
        "another retort",
    );
    let path = root.path().join(JOB_SPEC);
    for text in [
        // Three million elements in a short file.
        format!(
            "{{\"format\":1,\"elements\":[{}null]",
            "null,".repeat(3_000_000)
        ),
        " ".repeat(20 << 20),
    ] {
        fs::write(&path, text).unwrap();
        let error = read_job_spec(root.path()).unwrap_err();
        assert!(matches!(error, SpoolError::Damaged { .. }), "{error}");
    }
    // A link to a valid one, and a folder that is a link.
    write_job_spec(root.path(), &parts()).unwrap();
    let other = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(&path, other.path().join(JOB_SPEC)).unwrap();
    std::os::unix::fs::symlink(root.path(), other.path().join("folder")).unwrap();
    for dir in [other.path().to_owned(), other.path().join("folder")] {
        let error = read_job_spec(&dir).unwrap_err().to_string();
        assert!(error.contains("a symbolic link"), "{error}");
    }
}

#[test]
fn nothing_is_written_through_a_link() {
    let root = tempfile::tempdir().unwrap();
    let mine = root.path().join("mine");
    fs::write(&mine, "mine").unwrap();
    let spool = root.path().join("spool");
    make_dir(&spool).unwrap();
    std::os::unix::fs::symlink(&mine, spool.join(STOP)).unwrap();
    ask_to_stop(&spool, true).unwrap_err();
    let element = element_dir(&spool, 0);
    let mut writer = Writer::open(&element).unwrap();
    fs::remove_file(mark(&element, 0)).unwrap();
    std::os::unix::fs::symlink(&mine, mark(&element, 0)).unwrap();
    writer.close(true).unwrap_err();
    assert_eq!(fs::read(&mine).unwrap(), b"mine");
    // No one else in the group may write there, whatever the umask.
    use std::os::unix::fs::PermissionsExt;
    for dir in [&spool, &element] {
        assert_eq!(fs::metadata(dir).unwrap().permissions().mode() & 0o022, 0);
    }
    std::os::unix::fs::symlink(root.path(), root.path().join("link")).unwrap();
    make_dir(&root.path().join("link")).unwrap_err();
    // A directory that another user has made, or that is writable by others, is not used.
    let job = root.path().join(FOLDER).join("job");
    make_dir(&job).unwrap();
    ask_to_stop(&job, true).unwrap();
    for dir in [&job, &root.path().join(FOLDER)] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o775)).unwrap();
        for refused in [make_dir(&job).is_err(), ask_to_stop(&job, true).is_err()] {
            assert!(refused, "{}", dir.display());
        }
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    make_dir(&job).unwrap();
}

#[test]
fn a_sealed_piece_that_is_cut_off_is_damage() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().to_owned();
    let mut writer = Writer::open(&dir).unwrap();
    writer.push(said("one"));
    writer.push(said("two"));
    writer.close(true).unwrap();
    let path = piece_path(&dir, 0, 0, true);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let mut reader = Reader::new(dir.clone());
    let mut records = Vec::new();
    let mut looks = 0;
    // The rest may be on its way.
    let error = loop {
        match reader.look(&mut records) {
            Ok(_) => looks += 1,
            Err(error) => break error.to_string(),
        }
        assert!(looks < 100);
    };
    assert!(error.contains("its last record is cut off"), "{error}");
    assert_eq!((looks, records.len()), (TORN_LOOKS - 1, 1));
    // It arrives in time.
    let mut reader = Reader::new(dir.clone());
    assert_eq!(all(&mut reader).len(), 1);
    fs::write(&path, &whole).unwrap();
    assert_eq!(all(&mut reader).len(), 1);
    // Records from another start.
    fs::rename(&path, piece_path(&dir, 1, 0, true)).unwrap();
    let mut reader = Reader::new(dir);
    assert!(reader.advance());
    let error = reader.look(&mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("belongs to another start"), "{error}");
}

#[test]
fn pieces_without_number_are_read_a_part_at_a_time() {
    let root = tempfile::tempdir().unwrap();
    for piece in 0..1000 {
        fs::write(piece_path(root.path(), 0, piece, true), "").unwrap();
    }
    let mut reader = Reader::new(root.path().to_owned());
    let mut looks = 1;
    while reader.look(&mut Vec::new()).unwrap() == SpoolReading::More {
        looks += 1;
    }
    assert!(looks > 2 && reader.cost() >= 1000 * A_PIECE, "{looks}");
}

#[test]
fn a_handle_that_fails_is_opened_anew() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("0");
    let mut writer = Writer::open(&dir).unwrap();
    writer.push(said("one"));
    writer.flush().unwrap();
    // A file that cannot be written, as if its server had forgotten it.
    writer.file = File::open(piece_path(&dir, 0, 0, false)).unwrap();
    writer.push(said("two"));
    writer.flush().unwrap();
    writer.push(said("three"));
    assert!(!is_over(&dir, 0));
    writer.close(true).unwrap();
    assert!(is_over(&dir, 0) && !is_over(&dir, 1));
    assert_eq!(all(&mut Reader::new(dir.clone())).len(), 3);
    let mut next = Writer::open(&dir).unwrap();
    assert!(
        !is_over(&dir, 0) && !is_over(&dir, 1),
        "the next start goes on"
    );
    next.push(said("four"));
    fs::remove_file(piece_path(&dir, 1, 0, false)).unwrap();
    next.file = File::open(root.path()).unwrap();
    let error = next.flush().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

#[test]
fn records_wait_until_the_next_piece_can_be_made() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("0");
    let (mut writer, mut reader) = (Writer::open(&dir).unwrap(), Reader::new(dir.clone()));
    let next = piece_path(&dir, 0, 1, false);
    fs::create_dir(&next).unwrap();
    writer.push(said(&"x".repeat(PIECE as usize)));
    writer.flush().unwrap_err();
    writer.push(said("two"));
    writer.flush().unwrap_err();
    writer.close(true).unwrap_err();
    assert_eq!(all(&mut reader).len(), 1);
    // The server's confirmation got lost: the file exists, and is empty.
    fs::remove_dir(&next).unwrap();
    File::create_new(&next).unwrap();
    writer.flush().unwrap();
    assert_eq!(all(&mut reader).len(), 1);
    writer.push(said("three"));
    writer.close(true).unwrap();
    assert_eq!(all(&mut reader).len(), 1);
    assert!(piece_path(&dir, 0, 0, true).exists() && piece_path(&dir, 0, 1, true).exists());
    assert!(is_over(&dir, 0) && all(&mut Reader::new(dir.clone())).len() == 3);
    // A file that already has content, or a link, is not used.
    fs::write(&next, "x").unwrap();
    assert!(new_piece(&next).is_err());
    fs::remove_file(&next).unwrap();
    std::os::unix::fs::symlink(root.path().join("elsewhere"), &next).unwrap();
    assert!(new_piece(&next).is_err() && !root.path().join("elsewhere").exists());
}

#[test]
fn starts_are_counted_from_the_last_that_got_further() {
    let root = tempfile::tempdir().unwrap();
    let (dir, first) = (root.path().join("1"), root.path().join("0"));
    assert_eq!(all_wasted_starts(&dir, &dir, 2), 3, "none began");
    make_dir(&first).unwrap();
    // Whether the first rank got further, whether this one ended well, and the row's length afterwards.
    for (start, (advances, good, row)) in [
        (false, false, 3),
        (true, false, 1),
        (false, false, 2),
        (false, true, 2),
        (true, true, 0),
        (false, false, 1),
    ]
    .into_iter()
    .enumerate()
    {
        let mut writer = Writer::open(&dir).unwrap();
        if advances {
            let saved = SavedProgress::default();
            saved.write(&first, start as u32).unwrap();
        }
        writer.close(good).unwrap();
        assert_eq!(all_wasted_starts(&dir, &first, 2), row, "{start}");
    }
    // A start that was killed has left no word.
    let _writer = Writer::open(&dir).unwrap();
    assert_eq!(all_wasted_starts(&dir, &first, 2), 2);
}
