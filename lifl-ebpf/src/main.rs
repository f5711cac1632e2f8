//! LIFL's SK_MSG program: `cargo xtask build-ebpf` compiles it to `lifl.bpf.o`, which the daemon carries.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod program;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
