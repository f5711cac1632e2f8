//! What Flame's workers say: registrations, and references in a stream.

use lifl_common::flame::{HEADER_BYTES, LONGEST_REFERENCE_BYTES};
use lifl_daemon::flame::fuzzing::{Split, pad, registration, split};

use crate::input::pieces;

/// Four bytes of sizes, then what a connection brings, in pieces of those sizes.
pub fn flame_wire(data: &[u8]) {
    match registration(data) {
        Some((pid, fd, id)) => {
            let mut bytes = [pid.to_le_bytes(), fd.to_le_bytes(), id.to_le_bytes()].concat();
            bytes.truncate(data.len());
            assert_eq!(bytes, data, "a registration says something else than it does");
        }
        None => assert!(!matches!(data.len(), 10 | 12)),
    }
    let Some((sizes, stream)) = data.split_first_chunk::<4>() else {
        return;
    };
    let cut = split(&pieces(sizes, stream));
    conserved(stream, &cut);
    // It is the stream that counts, not how it came.
    let whole = split(&[stream]);
    conserved(stream, &whole);
    assert_eq!((&whole.messages, whole.broken), (&cut.messages, cut.broken));
    assert!(whole.broken || whole.left == cut.left);
    assert!(whole.left.len() <= LONGEST_REFERENCE_BYTES + stream.len().min(256) || whole.broken);
}

/// Each message is a piece of the stream with padding behind it, and they follow each other without a gap.
fn conserved(stream: &[u8], split: &Split) {
    let mut rest = stream;
    for message in &split.messages {
        rest = &rest[unpadded(message, rest)..];
    }
    assert!(split.broken || split.left == rest);
}

/// The length of the reference in a message, which must be the stream's next.
fn unpadded(message: &[u8], rest: &[u8]) -> usize {
    let common = message.iter().zip(rest).take_while(|(a, b)| a == b).count();
    let is_its_end = |&length: &usize| pad(&rest[..length]).is_some_and(|padded| padded[..] == *message);
    (HEADER_BYTES..=common)
        .rev()
        .find(is_its_end)
        .expect("a message that the stream does not hold")
}
