//! The target of that name under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lifl_fuzz::frame(data));
