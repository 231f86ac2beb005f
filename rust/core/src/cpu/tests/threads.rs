//! Work shared by threads: every part once, panics that reach the caller, and a forked child.

use super::*;
use crate::codebook::Codebook4;
use crate::cpu::quantize_4bit;
use crate::cpu::threads::{for_each, part_len};
use std::sync::atomic::{AtomicUsize, Ordering};

#[test]
fn parts_are_whole_units_and_few() {
    for (n, unit, threads) in
        [(0, 64, 4), (1, 64, 1), (65_535, 256, 8), (65_536, 256, 2), (10_000_000, 4096, 3)]
    {
        let len = part_len(n, unit, threads);
        assert!(len > 0 && len.is_multiple_of(unit), "{n} {unit} {threads}");
        assert!(n.div_ceil(len) <= 4 * threads);
        assert!(n >= 65_536 || n <= len, "small work stays in one part");
    }
}

#[test]
fn for_each_takes_every_part_once() {
    for threads in [1, 2, 3, 7] {
        let counts: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
        for_each(threads, counts.iter(), |count| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
    }
}

#[test]
fn for_each_brings_a_panic_to_the_caller() {
    let run = || for_each(3, 0..50, |part| assert!(part != 33, "part 33"));
    assert!(std::panic::catch_unwind(run).is_err());
    // and the pool still works
    for_each(3, 0..50, |_| ());
}

#[test]
#[cfg(unix)]
fn a_forked_child_builds_its_own_threads() {
    let input: Vec<f32> = (0..300_000).map(|i| (i as f32).sin()).collect();
    let run = |threads| {
        let mut packed = vec![0; 150_000];
        let mut absmax = vec![0.0; 300_000usize.div_ceil(64)];
        let execution = Execution { isa: Isa::SCALAR, threads };
        quantize_4bit(&input, Codebook4::Nf4, 64, &mut packed, &mut absmax, execution);
        packed
    };
    let expected = run(3);
    // SAFETY: the child touches memory of its own and of no other thread, and leaves without running destructors.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: both calls take plain numbers. The alarm ends a child that waits for threads it does not have.
        unsafe {
            libc::alarm(60);
            libc::_exit(i32::from(run(3) != expected));
        }
    }
    let mut status = -1;
    // SAFETY: the child is this process's, and `status` outlives the call.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child ended by itself, with the same bytes");
}
