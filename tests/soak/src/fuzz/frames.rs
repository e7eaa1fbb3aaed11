//! A worker's messages: bytes through a live socket into the runner's reader.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use retort::worker::process::WorkerSocket;
use tokio::runtime::Runtime;

use super::Target;

pub const FRAMES: Target = Target {
    name: "frames",
    exercise,
    tokens: &[
        b"\x08\x00\x00\x00\"loaded\"",
        b"{\"log\":[{\"level\":2,\"text\":\"\",\"at\":0}]}",
        b"{\"metrics\":[{\"series\":\"loss\",\"steps\":[0],\"values\":[0],\"at\":[0]}]}",
        b"{\"progress\":{\"done\":1,\"total\":0,\"unit\":\"\"}}",
        b"{\"late\":{\"calls\":18446744073709551615}}",
        b"{\"artifact\":{\"id\":1,\"record\":",
        b"{\"failed\":{\"code\":\"cancelled\",\"message\":\"\"}}",
        b"{\"answer\":{\"result\":{\"output\":1}}}",
        b"\"hash\":\"../../x\"",
        b"[[[[",
        b"\\ud800",
        b"1e999",
        b"null",
    ],
    mend: Some(mend),
    examples: None,
};

fn exercise(bytes: &[u8]) -> String {
    thread_local! {
        static RUNTIME: Runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
    }
    RUNTIME.with(|runtime| runtime.block_on(hear(bytes)))
}

async fn hear(bytes: &[u8]) -> String {
    let (ours, mut theirs) = UnixStream::pair().expect("a socket");
    let mut wire = WorkerSocket::new(ours).expect("a socket");
    let mut outcome = String::new();
    let mut waiting = bytes.chunks(4096);
    loop {
        match wire.take() {
            Ok(Some(message)) => {
                outcome.push_str(
                    &format!("{message:.16?}")
                        .chars()
                        .take(40)
                        .collect::<String>(),
                );
                continue;
            }
            Ok(None) => {}
            Err(error) => {
                assert!(wire.closed(), "what follows nonsense is not read");
                return outcome + &error.to_string();
            }
        }
        if wire.closed() {
            return outcome;
        }
        // Never more than the socket buffers, because nobody reads while this thread writes.
        match waiting.next() {
            Some(piece) => theirs.write_all(piece).expect("room"),
            None => theirs.shutdown(Shutdown::Write).expect("a socket"),
        }
        wire.read().await;
    }
}

/// Usually sets each frame's length so that it ends at the next one: faults are more likely in the messages.
fn mend(bytes: &mut Vec<u8>) {
    if bytes.len().is_multiple_of(8) {
        return;
    }
    let mut mended = Vec::with_capacity(bytes.len());
    // A message begins with a brace or a quote, after three zeros of a length.
    let mut starts: Vec<usize> = (4..bytes.len())
        .filter(|&at| matches!(bytes[at], b'{' | b'"') && bytes[at - 2..at] == [0, 0])
        .collect();
    starts.push(bytes.len() + 4);
    for ends in starts.windows(2) {
        let message = &bytes[ends[0]..(ends[1] - 4).max(ends[0])];
        // As long as a mutated input, so it fits.
        mended.extend((message.len() as u32).to_le_bytes());
        mended.extend(message);
    }
    if !mended.is_empty() {
        *bytes = mended;
    }
}
