//! Tests: files by other writers are read correctly, and damaged ones are refused.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;

/// Files of `tests/peers/parquet.py`.
fn golden(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/parquet");
    std::fs::read(folder.join(name)).unwrap()
}

/// All cells of a column, in the form of `expected.json`.
fn cells(file: &Parquet, column: usize) -> Result<Vec<Value>> {
    let (mut pages, mut found) = (file.pages(column), Vec::new());
    while let Some(page) = pages.next()? {
        for cell in page.cells()? {
            found.push(match cell? {
                None => Value::Null,
                Some(Cell::Int(value)) => json!(value),
                Some(Cell::Bytes(bytes)) => json!([bytes.len(), crc32fast::hash(bytes)]),
            });
        }
    }
    Ok(found)
}

/// The outcome of reading a whole file.
fn told(bytes: &[u8]) -> Result<u64, String> {
    let said = |error: Error| error.to_string();
    let file = Parquet::in_memory(bytes).map_err(said)?;
    for column in 0..file.columns.len() {
        cells(&file, column).map_err(said)?;
    }
    Ok(file.rows)
}

#[test]
fn columns_are_read_as_pyarrow_reads_them() {
    let expected: BTreeMap<String, BTreeMap<String, Vec<Value>>> =
        serde_json::from_slice(&golden("expected.json")).unwrap();
    let mut compared = 0;
    for (name, columns) in expected {
        let file = Parquet::in_memory(golden(&name)).unwrap();
        assert_eq!(file.columns.len(), columns.len(), "{name}");
        for (column, wanted) in columns {
            let path: Vec<&str> = column.split('.').collect();
            let number = file
                .column(&path)
                .unwrap_or_else(|| panic!("{name}: {column}"));
            let wanted = wanted.into_iter().map(|cell| match cell {
                Value::String(text) => json!([text.len(), crc32fast::hash(text.as_bytes())]),
                Value::Bool(value) => json!(i64::from(value)),
                cell => cell,
            });
            let wanted: Vec<Value> = wanted.collect();
            assert_eq!(file.rows, wanted.len() as u64, "{name}");
            assert_eq!(cells(&file, number).unwrap(), wanted, "{name}: {column}");
            compared += 1;
        }
    }
    assert_eq!(compared, 9 + 3 + 3 * 3 + 2 + 2 + 3);
}

#[test]
fn a_writers_notes_are_read() {
    let file = Parquet::in_memory(golden("hub.parquet")).unwrap();
    let note = file.notes.iter().find(|(key, _)| key == "huggingface");
    assert!(
        note.unwrap()
            .1
            .contains(r#""names": ["owl", "cat", "dog"]"#)
    );
    assert_eq!(file.groups, [5, 5, 2]);
    let names: Vec<String> = file.columns.iter().map(Column::name).collect();
    assert_eq!(names, ["image.bytes", "image.path", "label"]);
    assert_eq!(file.column(&["image"]), None);
}

#[test]
fn what_is_not_read_is_named() {
    let lists = told(&golden("lists.parquet")).unwrap_err();
    let expected =
        "column captions.list.element, row group 0: it holds lists; expected one value in a row";
    assert_eq!(lists, expected);
    let brotli = told(&golden("brotli.parquet")).unwrap_err();
    assert!(
        brotli.contains("column image, row group 0: packed by Brotli, which"),
        "{brotli}"
    );
    let delta = told(&golden("delta.parquet")).unwrap_err();
    assert!(
        delta.contains("an encoding that is not read (DELTA_BINARY_PACKED)"),
        "{delta}"
    );
    let mut encrypted = golden("hub.parquet");
    let end = encrypted.len() - 4;
    encrypted[end..].copy_from_slice(b"PARE");
    let encrypted = told(&encrypted).unwrap_err();
    assert_eq!(
        encrypted,
        "an encrypted Parquet file; expected one that is not"
    );
}

#[test]
fn damage_is_found() {
    let whole = golden("captions.parquet");
    let check = |bytes: &[u8], expected: &str| {
        let said = told(bytes).unwrap_err();
        assert!(said.contains(expected), "{said}");
    };
    check(b"", "too short");
    check(b"PAR1PAR1", "too short");
    check(&whole[1..], "its first bytes are wrong");
    check(&whole[..whole.len() - 1], "does not end as one");
    let mut long = whole.clone();
    let end = long.len() - 8;
    long[end..end + 4].copy_from_slice(&10_000_000u32.to_le_bytes());
    check(&long, "a footer of 10000000 bytes in a file of");
    long[end..end + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    check(&long, "more than 67108864");
    // A byte within an image, detected by the page's checksum.
    let mut flipped = whole.clone();
    let jpeg = whole
        .windows(3)
        .position(|bytes| bytes == b"\xff\xd8\xff")
        .unwrap();
    flipped[jpeg + 100] ^= 1;
    check(&flipped, "a damaged page: its checksum does not match");
}

/// Every byte of a file changed in several ways, and every truncation: the result is an error or other cells, nothing worse.
#[test]
fn no_damage_is_too_strange() {
    for name in [
        "hub.parquet",
        "zstd.parquet",
        "gzip.parquet",
        "dictionary.parquet",
    ] {
        let whole = golden(name);
        assert!(told(&whole).is_ok(), "{name}");
        let mut errors = 0;
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            for value in [bytes[at] ^ 1, bytes[at] ^ 0x80, 0, 0xff] {
                bytes[at] = value;
                errors += usize::from(told(&bytes).is_err());
            }
            assert!(told(&whole[..at]).is_err(), "{name}: {at}");
        }
        assert!(errors > whole.len() / 2, "{name}: {errors}");
    }
}

/// A field of a structure: a number.
fn int(step: u8, value: u64) -> Vec<u8> {
    let mut bytes = vec![step << 4 | 6];
    let mut zigzag = value << 1;
    while zigzag >= 0x80 {
        bytes.push(zigzag as u8 | 0x80);
        zigzag >>= 7;
    }
    bytes.push(zigzag as u8);
    bytes
}

/// A file of a column of numbers in some groups, whose chunks are given as (codec, cells, place); `pages` are what lies
/// before the footer. A group without cells has no rows.
fn file(pages: &[u8], rows: u64, chunks: &[(u64, u64, u64)]) -> Vec<u8> {
    let groups = chunks.iter().map(|&(codec, cells, place)| {
        let told = [int(4, codec), int(1, cells), int(4, place)].concat();
        let chunk = [&[0x3c][..], &told, &[0, 0]].concat();
        let rows = if cells == 0 { 0 } else { rows };
        [&[0x19, 0x1c][..], &chunk, &int(2, rows), &[0]].concat()
    });
    let groups: Vec<u8> = groups.flatten().collect();
    let groups = [&[0x29, (chunks.len() as u8) << 4 | 0x0c][..], &groups].concat();
    with_footer(pages, &groups)
}

/// A file of a column of numbers, in whose footer these fields follow the schema.
fn with_footer(pages: &[u8], fields: &[u8]) -> Vec<u8> {
    let root = [&b"\x48\x01r"[..], &int(1, 1), &[0]].concat();
    let column = [&int(1, 2)[..], &int(2, 0), b"\x18\x01c", &[0]].concat();
    let footer = [&[0x29, 0x2c][..], &root, &column, fields, &[0]].concat();
    let length = (footer.len() as u32).to_le_bytes();
    [b"PAR1", pages, &footer, &length, b"PAR1"].concat()
}

/// A list of so many equal structures, as a field.
fn list(step: u8, count: usize, each: &[u8]) -> Vec<u8> {
    let mut bytes = vec![step << 4 | 9, 0xfc];
    let mut left = count;
    while left >= 0x80 {
        bytes.push(left as u8 | 0x80);
        left >>= 7;
    }
    bytes.push(left as u8);
    bytes.extend(each.repeat(count));
    bytes
}

#[test]
fn entries_of_a_footer_are_counted() {
    let check = |fields: &[u8], expected: &str| {
        let said = told(&with_footer(b"", fields)).unwrap_err();
        assert!(said.contains(expected), "{said}");
    };
    // Empty structures, one byte each.
    let notes = |count| [&list(2, 0, &[])[..], &list(1, count, &[0])].concat();
    assert_eq!(told(&with_footer(b"", &notes(MOST_NOTES))), Ok(0));
    check(&notes(MOST_NOTES + 1), "more notes than any table");
    let groups = list(2, MOST_GROUPS + 1, &[0x36, 0, 0]);
    check(&groups, "more row groups than any table");
    // Columns stored in other files, without further fields.
    let chunks = list(1, MOST_CHUNKS + 1, &[0x18, 0, 0]);
    let group = [&[0x29, 0x1c][..], &chunks, &int(2, 1), &[0]].concat();
    check(&group, "more columns in row groups than any table");
}

#[test]
fn groups_and_pages_may_be_empty() {
    let two = [7u64.to_le_bytes(), 9u64.to_le_bytes()].concat();
    let packed = snap::raw::Encoder::new().compress_vec(&two).unwrap();
    let nothing = page(0, 0, 0, b"");
    let pages = [nothing, page(16, packed.len() as u64, 2, &packed)].concat();
    let bytes = file(&pages, 2, &[(1, 0, 0), (1, 2, 4), (1, 0, 4)]);
    let parquet = Parquet::in_memory(bytes).unwrap();
    assert_eq!(parquet.groups, [0, 2, 0]);
    assert_eq!(cells(&parquet, 0).unwrap(), [json!(7), json!(9)]);
}

/// A page of plain cells that claims these sizes.
fn page(unpacked: u64, packed: u64, cells: u64, bytes: &[u8]) -> Vec<u8> {
    let of_data = [int(1, cells), int(1, 0), int(1, 3), int(1, 3), vec![0]].concat();
    let head = [int(1, 0), int(1, unpacked), int(1, packed)].concat();
    [&head[..], &[0x2c], &of_data, &[0], bytes].concat()
}

#[test]
fn sizes_are_checked_before_anything_is_allocated() {
    let two = [7u64.to_le_bytes(), 9u64.to_le_bytes()].concat();
    let good = page(16, 16, 2, &two);
    assert_eq!(told(&file(&good, 2, &[(0, 2, 4)])), Ok(2));
    let check = |bytes: Vec<u8>, expected: &str| {
        let said = told(&bytes).unwrap_err();
        assert!(said.contains(expected), "{said}");
    };
    let huge = page(1 << 40, 16, 2, &two);
    check(
        file(&huge, 2, &[(1, 2, 4)]),
        "a page that takes 1048576 MiB",
    );
    let absent = page(16, 1 << 40, 2, &two);
    check(
        file(&absent, 2, &[(1, 2, 4)]),
        "a page of 1099511627776 bytes begins",
    );
    check(file(&good, 3, &[(0, 3, 4)]), "a page whose header");
    check(file(&good, 1, &[(0, 1, 4)]), "more cells than stated");
    check(
        file(&good, 1 << 60, &[(0, 2, 4)]),
        "more than 4294967296 rows",
    );
    check(file(&good, 9, &[(0, 2, 4)]), "2 cells for 9 rows");
    check(
        file(&good, 2, &[(0, 2, 4), (0, 2, 4)]),
        "it overlaps the previous row group",
    );
    check(
        file(&good, 2, &[(0, 2, 1 << 50)]),
        "beyond the end of the file",
    );
    let claimed = page(16, 16, 1 << 30, &two);
    check(
        file(&claimed, 1 << 30, &[(0, 1 << 30, 4)]),
        "it ends within its values",
    );
    let short = page(12, 12, 2, &two[..12]);
    check(file(&short, 2, &[(0, 2, 4)]), "it ends within its values");
    // Few bytes that unpack to many, repeatedly.
    let zeros = vec![0; 40 << 20];
    let packed = snap::raw::Encoder::new().compress_vec(&zeros).unwrap();
    let one = page(zeros.len() as u64, packed.len() as u64, 1, &packed);
    let all = file(&one.repeat(8), 8, &[(1, 8, 4)]);
    assert_eq!(told(&all), Ok(8));
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gzip, &zeros).unwrap();
    let packed = gzip.finish().unwrap();
    let one = page(zeros.len() as u64, packed.len() as u64, 1, &packed);
    check(
        file(&one.repeat(12), 12, &[(2, 12, 4)]),
        "more than any data set unpacks to",
    );
    let wrong = page(zeros.len() as u64 - 1, packed.len() as u64, 1, &packed);
    check(file(&wrong, 1, &[(2, 1, 4)]), "longer than stated");
}

/// Pages of a dictionary of one entry, and of so many cells that repeat it, in numbers of no bits.
fn repeated(entry: &[u8], cells: u64) -> Vec<u8> {
    let entry = [&(entry.len() as u32).to_le_bytes(), entry].concat();
    let size = entry.len() as u64;
    let head = [int(1, 2), int(1, size), int(1, size)].concat();
    let dictionary = [&head[..], &[0x4c], &int(1, 1), &int(1, 0), &[0, 0], &entry].concat();
    let of_data = [int(1, cells), int(1, 8), int(1, 3), int(1, 3), vec![0]].concat();
    let head = [int(1, 0), int(1, 1), int(1, 1)].concat();
    let data = [&head[..], &[0x2c], &of_data, &[0, 0]].concat();
    [dictionary, data].concat()
}

/// A file of a column of bytes in such groups.
fn of_bytes(groups: &[Vec<u8>], cells: u64) -> Vec<u8> {
    let mut at = 4;
    let places = groups.iter().map(|group| {
        at += group.len() as u64;
        (0, cells, at - group.len() as u64)
    });
    let places: Vec<_> = places.collect();
    let mut bytes = file(&groups.concat(), cells, &places);
    let column = [&int(1, 2)[..], &int(2, 0), b"\x18\x01c"].concat();
    let at = bytes.windows(column.len()).rposition(|of| *of == column);
    bytes[at.unwrap() + 1] = 6 << 1;
    bytes
}

#[test]
fn a_dictionary_is_repeated_within_the_growth_of_a_file() {
    let few = repeated(b"entry", 200_000);
    assert_eq!(
        told(&of_bytes(std::slice::from_ref(&few), 200_000)),
        Ok(200_000)
    );
    let check = |bytes: Vec<u8>, expected: &str| {
        let said = told(&bytes).unwrap_err();
        assert!(said.contains(expected), "{said}");
    };
    let many = "cells that repeat entries of a dictionary";
    check(of_bytes(&[repeated(b"entry", 1 << 20)], 1 << 20), many);
    check(of_bytes(&[repeated(&vec![7; 1 << 20], 512)], 512), many);
    // In all row groups together.
    check(of_bytes(&[few.clone(), few.clone()], 200_000), many);
    // One page holds the dictionary of a group.
    let twice = [repeated(b"entry", 1), repeated(b"entry", 1)].concat();
    check(of_bytes(&[twice], 2), "two dictionaries");
}

#[test]
fn pages_without_cells_are_counted_and_not_unpacked() {
    let two = [7u64.to_le_bytes(), 9u64.to_le_bytes()].concat();
    let good = page(16, 16, 2, &two);
    // Neither an empty page nor one of an index is unpacked: these claim too much.
    let empty = page(1 << 40, 3, 0, b"abc");
    let index = [&int(1, 1)[..], &int(1, 1 << 40), &int(1, 2), &[0], b"ab"].concat();
    let few = [empty.repeat(3), index.repeat(3), good.clone()].concat();
    assert_eq!(told(&file(&few, 2, &[(0, 2, 4)])), Ok(2));
    for idle in [page(0, 0, 0, b""), index] {
        let many = [idle.repeat(65_537), good.clone()].concat();
        let said = told(&file(&many, 2, &[(0, 2, 4)])).unwrap_err();
        assert!(
            said.contains("more than 65536 pages without cells"),
            "{said}"
        );
    }
}
