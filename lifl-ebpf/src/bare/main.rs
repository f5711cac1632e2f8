//! The least that hands a message from one socket to another in the kernel: what `lifl bench handoff` holds LIFL's program
//! against. `cargo xtask build-ebpf` compiles it to `bare.bpf.o`.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod program;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
