//! Copies out of memory that another process may be writing.

/// Copies bytes, and reads each of them once: what is decided by the copy cannot change afterwards, whatever the bytes'
/// owner writes. A plain copy may be read again where the compiler finds that cheaper.
///
/// # Panics
/// If the lengths differ.
pub(crate) fn copy_once(from: &[u8], to: &mut [u8]) {
    assert_eq!(from.len(), to.len());
    // SAFETY: every eight bytes are a `u64`.
    let (before, words, after) = unsafe { from.align_to::<u64>() };
    let (to_before, rest) = to.split_at_mut(before.len());
    let (to_words, to_after) = rest.split_at_mut(size_of_val(words));
    copy_bytes(before, to_before);
    for (from, to) in words.iter().zip(to_words.as_chunks_mut().0) {
        // SAFETY: a reference can be read.
        *to = unsafe { std::ptr::from_ref(from).read_volatile() }.to_ne_bytes();
    }
    copy_bytes(after, to_after);
}

fn copy_bytes(from: &[u8], to: &mut [u8]) {
    for (from, to) in from.iter().zip(to) {
        // SAFETY: a reference can be read.
        *to = unsafe { std::ptr::from_ref(from).read_volatile() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_the_same_wherever_they_begin_and_end() {
        let from: Vec<u8> = (0..64).collect();
        for start in 0..=16 {
            for end in start..=40 {
                let mut to = vec![0xFF; end - start];
                copy_once(&from[start..end], &mut to);
                assert_eq!(to, from[start..end], "{start}..{end}");
            }
        }
    }
}
