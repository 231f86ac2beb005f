//! Codes of any ascending 256-entry map by one look-up and one addition, for the SIMD kernels.

use crate::codebook::Thresholds;

/// Most entries of a table: 64 KB, which stay in the second-level cache.
const MAX_ENTRIES: u32 = 16 * 1024;

/// Buckets of magnitudes, each of which holds at most one threshold: exponent and first fraction bits of |y|, once for
/// either sign.
///
/// With b the bits of |y|, clamped as [`Buckets::clamp`] says, the top byte of `b + entry` is the code for a positive
/// y, and its complement for a negative one: an entry holds the bucket's first code in that byte, and below it what
/// carries into it when b passes the threshold.
pub(super) struct Buckets {
    /// [2 * num_buckets], positive y first.
    pub entries: Vec<u32>,
    /// Smallest and largest bits that are told apart, but for 0.
    pub low: u32,
    /// See `low`.
    pub high: u32,
    /// Fraction bits that a bucket spans.
    pub shift: u32,
    /// Codes by how many different thresholds are passed, where some are equal.
    pub code_of_rank: Option<Box<[u8; 256]>>,
}

impl Buckets {
    /// A table for these thresholds; none where they are too close together or too far apart, or not finite.
    pub(super) fn new(thresholds: &Thresholds) -> Option<Self> {
        let mut distinct = thresholds.as_array().to_vec();
        distinct.dedup();
        if !distinct.is_sorted() || !distinct.iter().all(|t| t.is_finite()) {
            return None;
        }
        let spare = 255 - distinct.len() as u32;
        let (negative, positive) = distinct.split_at(distinct.partition_point(|&t| t < 0.0));
        // Bits at which the count of passed thresholds grows: y > t for a positive y, -y >= -t for a negative one.
        let positive: Vec<u32> = positive.iter().map(|t| t.abs().to_bits() + 1).collect();
        let negative: Vec<u32> = negative.iter().rev().map(|t| t.abs().to_bits()).collect();
        let steps = || positive.iter().chain(&negative).copied();
        // A threshold at 0 has a bucket of its own; see `clamp`.
        let smallest = steps().filter(|&step| step > 1).min().unwrap_or(1);
        let high = steps().max().unwrap_or(1);
        let mut table = (14..=17).rev().find_map(|shift| {
            let low = ((smallest >> shift) << shift).saturating_sub(1 << shift);
            let num_buckets = (high >> shift) - (low >> shift) + 1;
            if 2 * num_buckets > MAX_ENTRIES {
                return None;
            }
            let mut table = Self { entries: Vec::new(), low, high, shift, code_of_rank: None };
            table.entries = table.entries_of(&positive, negative.len() as u32, num_buckets)?;
            table.entries.extend(table.entries_of(&negative, positive.len() as u32 + spare, num_buckets)?);
            Some(table)
        })?;
        if spare > 0 {
            let all = thresholds.as_array();
            let code = |rank: usize| {
                rank.checked_sub(1).map_or(0, |i| all.partition_point(|t| *t <= distinct[i]) as u8)
            };
            table.code_of_rank = Some(Box::new(std::array::from_fn(|rank| code(rank.min(distinct.len())))));
        }
        Some(table)
    }

    /// The entries of one sign: `code` in front of the first of the ascending `steps`. None where two share a bucket.
    fn entries_of(&self, steps: &[u32], mut code: u32, num_buckets: u32) -> Option<Vec<u32>> {
        let first = self.low >> self.shift;
        let mut steps = steps.iter().map(|&step| self.clamp(step)).peekable();
        let mut entries = Vec::with_capacity(num_buckets as usize);
        for bucket in first..first + num_buckets {
            let in_bucket = |step: &u32| step >> self.shift == bucket;
            let first_code = code << 24;
            entries.push(match steps.next_if(in_bucket) {
                Some(step) => {
                    code += 1;
                    first_code.wrapping_add(1 << 24).wrapping_sub(step)
                }
                None => first_code.wrapping_sub(bucket << self.shift),
            });
            if steps.peek().is_some_and(in_bucket) {
                return None;
            }
        }
        Some(entries)
    }

    /// Clamps bits to what the table covers, with 0 apart from all other small ones.
    fn clamp(&self, bits: u32) -> u32 {
        bits.max(self.low + bits.min(1)).min(self.high)
    }

    /// Code of the scaled element `y`, as the vector kernels find it.
    #[cfg(test)]
    fn encode(&self, y: f32) -> u8 {
        let bits = self.clamp(y.abs().to_bits());
        let sign = usize::from(y.is_sign_negative());
        let index =
            ((bits >> self.shift) - (self.low >> self.shift)) as usize + sign * self.entries.len() / 2;
        let sum = (bits.wrapping_add(self.entries[index]) >> 24) as u8;
        let rank = if sign == 1 { !sum } else { sum };
        self.code_of_rank.as_ref().map_or(rank, |codes| codes[usize::from(rank)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codebook::{
        DYNAMIC_SIGNED, create_dynamic_map, create_fp8_map, create_linear_map, create_normal_map,
    };

    #[test]
    fn every_map_of_the_library_has_a_table_that_gives_its_codes() {
        let maps = [
            DYNAMIC_SIGNED,
            create_dynamic_map(false, 7, 8).unwrap(),
            create_linear_map(true, 8, true).unwrap(),
            create_linear_map(true, 8, false).unwrap(),
            create_linear_map(false, 8, true).unwrap(),
            create_normal_map(true),
            create_normal_map(false),
            create_fp8_map(true, 5, 2, 8).unwrap(),
            create_fp8_map(true, 4, 3, 8).unwrap(),
        ];
        for (i, map) in maps.iter().enumerate() {
            let thresholds = Thresholds::new(map);
            let buckets = Buckets::new(&thresholds).unwrap_or_else(|| panic!("map {i} has a table"));
            let special =
                [0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30, 3.0, -3.0, f32::MAX, f32::INFINITY, -f32::INFINITY];
            for &t in thresholds.as_array().iter().chain(map).chain(&special) {
                for y in [t.next_down(), t, t.next_up(), -t] {
                    assert_eq!(buckets.encode(y), thresholds.encode(y), "map {i}, y = {y:e}");
                }
            }
        }
    }

    #[test]
    fn thresholds_that_no_table_parts_have_none() {
        let close = std::array::from_fn(|i| f32::from_bits(0x3f00_0000 + i as u32));
        assert!(Buckets::new(&Thresholds::new(&close)).is_none());
        let far = std::array::from_fn(|i| f32::from_bits(1 + (i as u32) * 0x7f_0000));
        assert!(Buckets::new(&Thresholds::new(&far)).is_none());
    }
}
