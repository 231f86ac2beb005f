//! Threads of the CPU kernels, rebuilt after a fork, and the floating-point environment that they compute in.

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Elements below which waking another thread costs more than it saves (about 10 us against 20 us of work).
const MIN_PARALLEL: usize = 64 * 1024;
/// How long a thread stays awake for the next call: waking it takes up to 0.2 ms on a virtual machine, the whole time of
/// some calls. OpenMP's threads, torch's among them, stay awake for longer.
const LINGER: Duration = Duration::from_micros(100);
/// Elements that make the cost of handing out a part small.
const MIN_PART: usize = 16 * 1024;

/// A pool and the process that its threads live in.
struct Pool {
    process: u32,
    threads: usize,
    workers: rayon::ThreadPool,
}

/// The newest pool. Pools are never freed: a replaced one may still be at work for another caller, and the threads of
/// one that came over a fork are gone. Sizes double, so a process makes few. An atomic instead of a lock, because a
/// fork copies a lock that another thread holds, and nobody in the child would ever release it.
static POOL: AtomicPtr<Pool> = AtomicPtr::new(std::ptr::null_mut());

/// A pool of this process with at least `threads` threads; none where the system refuses to start them.
fn pool(threads: usize) -> Option<&'static rayon::ThreadPool> {
    let process = std::process::id();
    let current = POOL.load(Ordering::Acquire);
    // SAFETY: a non-null POOL came from Box::leak below and is never freed or written again.
    if let Some(pool) = unsafe { current.as_ref() }
        && pool.process == process
        && pool.threads >= threads
    {
        return Some(&pool.workers);
    }
    let threads = threads.next_power_of_two();
    // The stack size is given because std would else read the environment, under a lock.
    let workers = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(2 << 20)
        .thread_name(|i| format!("qbits-{i}"))
        .start_handler(|_| std::mem::forget(FloatEnvironment::ieee()))
        .build()
        .ok()?;
    let pool: &'static Pool = Box::leak(Box::new(Pool { process, threads, workers }));
    // Where two callers build one at the same time, both use their own and one of them stays for the next.
    POOL.store(std::ptr::from_ref(pool).cast_mut(), Ordering::Release);
    Some(&pool.workers)
}

/// Length of the parts of `n` elements for [`for_each`], a multiple of `unit`: four parts to a thread, so that one
/// which the system interrupts does not keep the others waiting, and one part where threads would not pay.
pub(super) fn part_len(n: usize, unit: usize, threads: usize) -> usize {
    if threads <= 1 || n < MIN_PARALLEL {
        return n.next_multiple_of(unit).max(unit);
    }
    n.div_ceil(4 * threads).max(MIN_PART).next_multiple_of(unit)
}

/// Calls `work` for each part, on up to `threads` threads, and returns when all are done.
pub(super) fn for_each<P, I>(threads: usize, parts: I, work: impl Fn(P) + Sync)
where
    P: Send,
    I: ExactSizeIterator<Item = P> + Send,
{
    let threads = threads.min(parts.len());
    let workers = if threads > 1 { pool(threads - 1) } else { None };
    let Some(workers) = workers else {
        return parts.for_each(work);
    };
    let parts = Mutex::new(parts);
    let run = || {
        loop {
            let part = parts.lock().unwrap_or_else(PoisonError::into_inner).next();
            match part {
                Some(part) => work(part),
                None => return,
            }
        }
    };
    let num_busy = AtomicUsize::new(threads - 1);
    workers.in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| {
                let _ended = Countdown(&num_busy);
                run();
                rayon::spawn(linger);
            });
        }
        run();
        // The others end within one part, for which the end of the scope would put this thread to sleep.
        spin_until(|| num_busy.load(Ordering::Acquire) == 0);
    });
}

/// Keeps this thread of the pool awake for a while, for work that comes meanwhile.
fn linger() {
    spin_until(|| rayon::yield_now() == Some(rayon::Yield::Executed));
}

/// Asks again and again for the time that a thread stays awake: more would harm where threads share a core.
fn spin_until(is_done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_done() && begin.elapsed() < LINGER {
        std::hint::spin_loop();
    }
}

/// Counts down when dropped, also by a panic.
struct Countdown<'a>(&'a AtomicUsize);

impl Drop for Countdown<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// While it lives, this thread computes float32 as IEEE 754 says: nearest even, with subnormals. A host process may
/// have asked for flush-to-zero (torch.set_flush_denormal), which would change codes.
pub(super) struct FloatEnvironment {
    #[cfg(target_arch = "x86_64")]
    saved: u32,
}

impl FloatEnvironment {
    /// Sets the environment; dropping the value restores the former one.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn ieee() -> Self {
        /// Every exception masked, round to nearest, no FTZ, no DAZ: the state that Rust assumes.
        const DEFAULT: u32 = 0x1f80;
        let mut saved = 0u32;
        // SAFETY: stmxcsr writes the four bytes of `saved` and nothing else.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut saved, options(nostack, preserves_flags)) };
        if saved != DEFAULT {
            // SAFETY: DEFAULT sets no reserved bit, so ldmxcsr cannot fault; it restores what Rust assumes.
            unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &DEFAULT, options(nostack, preserves_flags)) };
        }
        Self { saved }
    }

    /// Other architectures are left as they are: their builds of torch do not set the mode.
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn ieee() -> Self {
        Self {}
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for FloatEnvironment {
    fn drop(&mut self) {
        // SAFETY: `saved` was read from this register on this thread, so it is a valid value of it.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &self.saved, options(nostack, preserves_flags)) };
    }
}
