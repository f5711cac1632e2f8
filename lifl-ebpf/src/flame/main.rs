//! The SK_MSG program for Flame's Python workers: `cargo xtask build-ebpf` compiles it to `flame.bpf.o`, which the
//! daemon carries.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod program;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
