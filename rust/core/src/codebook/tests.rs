//! Codebooks and maps against their published bits and hashes, thresholds against an exact oracle.

use super::*;
use sha2::{Digest, Sha256};

fn sha256(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn maps() -> Vec<[f32; 256]> {
    vec![
        DYNAMIC_SIGNED,
        create_dynamic_map(false, 7, 8).unwrap(),
        create_linear_map(true, 8, true).unwrap(),
        create_linear_map(true, 8, false).unwrap(),
        create_linear_map(false, 8, true).unwrap(),
        create_normal_map(true),
        create_normal_map(false),
        create_fp8_map(true, 5, 2, 8).unwrap(),
        create_fp8_map(true, 4, 3, 8).unwrap(),
    ]
}

#[test]
fn maps_and_codebooks_have_the_published_hashes() {
    let hashes = [
        "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
        "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
        "80bf4c55fa736fa18f611d26a59e99475bae78388280fbccbf4c7d12437a4775",
        "d88eea2f793473b6ba77330cd7ce319ceb4f31aa83ccf5dda7e88b1564de56c1",
        "7cb9ea560989533d101f5082aa194366c6fd5d82a305f2994cc39312a65f7962",
        "695151d62a023d258f8c1b6d9eb7c67501d612a09af2473b5a046db7cf3436be",
        "a1dc1a106736730497a824543972384d24dfa942cdfa1829073351e16d2c5568",
        "0da7c4e2990b302a360d0664262e0bce8012809e65954885e9b573c00fd57b04",
        "f3c007a4cafc83fe599bffde8d83c3b00a6c648306af949f2d0a051da02832aa",
    ];
    for (map, hash) in maps().iter().zip(hashes) {
        assert_eq!(sha256(map), hash);
    }
    assert_eq!(
        sha256(Codebook4::Nf4.values()),
        "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
    );
    assert_eq!(
        sha256(Codebook4::Fp4.values()),
        "b830bcf8857895e5676b8e2ce608a60bb8af9b3ce6270073e9de34814196f09c"
    );
}

#[test]
fn maps_are_the_same_for_every_default() {
    assert_eq!(create_dynamic_map(true, 7, 8).unwrap(), DYNAMIC_SIGNED);
    assert_eq!(create_linear_map(false, 8, false), create_linear_map(false, 8, true));
    for map in maps() {
        assert_eq!(validate_map("quantize_blockwise", &map).unwrap(), &map);
    }
}

#[test]
fn maps_of_fewer_bits_hold_that_many_distinct_values() {
    for total_bits in 2..8 {
        for max_exponent_bits in 1..total_bits {
            let map = create_dynamic_map(true, max_exponent_bits, total_bits).unwrap();
            assert!(validate_map("x", &map).is_ok());
            assert_eq!(map.iter().filter(|&&value| value != 0.0).count(), (1 << total_bits) - 1);
        }
        let map = create_linear_map(true, total_bits, true).unwrap();
        // the middle of an odd count may keep a residue of rounding
        assert_eq!(map.iter().filter(|value| value.abs() > 1e-6).count(), (1 << total_bits) - 2);
        assert_eq!((map[0], map[255]), (-1.0, 1.0));
    }
    // seven magnitudes; the smallest is a subnormal, 0.5 * 2^-2 of the largest, 1.5 * 2^2
    let map = create_fp8_map(true, 2, 1, 4).unwrap();
    let positive: Vec<f32> = map.iter().copied().filter(|&value| value > 0.0).collect();
    assert_eq!(positive.len(), 7);
    assert_eq!((positive[0], positive[6]), (1.0 / 48.0, 1.0));
}

#[test]
fn maps_refuse_impossible_fields() {
    let message = |result: Result<[f32; 256]>| result.unwrap_err().message;
    assert_eq!(
        message(create_dynamic_map(true, 7, 9)),
        "qbits::create_dynamic_map: total_bits must be 2 to 8, got 9"
    );
    assert_eq!(
        message(create_dynamic_map(true, 8, 8)),
        "qbits::create_dynamic_map: max_exponent_bits must be 1 to total_bits - 1, got 8"
    );
    assert_eq!(
        message(create_dynamic_map(false, 5, 8)),
        "qbits::create_dynamic_map: max_exponent_bits must be total_bits - 1 for an unsigned map, got 5"
    );
    assert_eq!(
        message(create_linear_map(true, 1, true)),
        "qbits::create_linear_map: total_bits must be 2 to 8, got 1"
    );
    assert_eq!(
        message(create_fp8_map(true, 8, 0, 8)),
        "qbits::create_fp8_map: exponent_bits must be 1 to 7, got 8"
    );
    assert_eq!(
        message(create_fp8_map(true, 5, 3, 9)),
        "qbits::create_fp8_map: total_bits must be at most 8, got 9"
    );
    assert_eq!(
        message(create_fp8_map(true, 5, 3, 8)),
        "qbits::create_fp8_map: exponent, precision and sign bits must add up to 8, got 5 + 3 + 1"
    );
}

#[test]
fn validate_map_names_the_first_fault() {
    let rule = "qbits::quantize: codebook must hold 256 finite values in ascending order, got ";
    let message = |map: &[f32]| validate_map("quantize", map).unwrap_err().message;
    assert_eq!(message(&[0.0; 3]), format!("{rule}3 values"));
    let mut map = DYNAMIC_SIGNED;
    map[9] = f32::NAN;
    assert_eq!(message(&map), format!("{rule}NaN at index 9"));
    map[9] = 0.5;
    assert!(message(&map).starts_with(&format!("{rule}-0.")));
    assert!(message(&map).ends_with("after 0.5 at index 10"));
}

#[test]
fn nf4_thresholds_are_the_published_ones() {
    let bits = [
        0xbf591cd8u32,
        0xbf1c5270,
        0xbeeb8480,
        0xbeadea76,
        0xbe703cec,
        0xbe0d38bc,
        0xbd3a7871,
        0x3d22faff,
        0x3df64862,
        0x3e5067e0,
        0x3e9582d4,
        0x3ec753f9,
        0x3f006d04,
        0x3f248daf,
        0x3f5c89da,
    ];
    let thresholds: Vec<u32> = Codebook4::Nf4.thresholds().iter().map(|t| t.to_bits()).collect();
    assert_eq!(thresholds, bits);
}

#[test]
fn codes_step_exactly_above_each_threshold() {
    for (k, &t) in Codebook4::Nf4.thresholds().iter().enumerate() {
        let codes = [t.next_down(), t, t.next_up()].map(|y| usize::from(Codebook4::Nf4.encode(y)));
        assert_eq!(codes, [k, k, k + 1]);
    }
    for (k, &t) in Codebook4::Af4.thresholds().iter().enumerate() {
        let codes = [t.next_up(), t, t.next_down()].map(|y| usize::from(Codebook4::Af4.encode(y)));
        assert_eq!(codes, [k, k, k + 1]);
    }
    for (rank, &t) in Codebook4::Fp4.thresholds().iter().enumerate() {
        let [low, high] = [FP4_CODE_OF_RANK[rank], FP4_CODE_OF_RANK[rank + 1]];
        assert_eq!([t.next_down(), t, t.next_up()].map(|y| Codebook4::Fp4.encode(y)), [low, low, high]);
        let codes = [t.next_down(), t, t.next_up()].map(|y| Codebook4::Fp4.encode(-y));
        assert_eq!(codes, [low | 8, low | 8, high | 8]);
    }
}

#[test]
fn codebooks_encode_their_own_values() {
    for codebook in Codebook4::ALL {
        assert_eq!(Codebook4::from_name(codebook.name()), Some(codebook));
        assert_eq!(codebook.encode(0.0), codebook.zero_code());
        assert_eq!(codebook.encode(-0.0), codebook.zero_code());
        for (code, &value) in codebook.values().iter().enumerate() {
            if value != 0.0 {
                assert_eq!(usize::from(codebook.encode(value)), code, "{codebook:?}");
            }
        }
    }
    assert_eq!(Codebook4::from_name("int4"), None);
    assert_eq!(Codebook4::Fp4.decoded_values()[8].to_bits(), 0x8000_0000);
    assert_eq!((INT4[0], INT4[1], INT4[7], INT4[8], INT4[15]), (1.0, 6.0 / 7.0, 0.0, 0.0, -1.0));
}

/// The rule as NUMERICS 2.2 words it: count the midpoints below, then ties.
fn encode_by_the_rule(map: &[f32; 256], y: f32) -> u8 {
    let middle: Vec<f32> = map.windows(2).map(|pair| (pair[0] + pair[1]) * 0.5).collect();
    let k = middle.iter().filter(|&&m| m < y).count();
    let moves = k < 255 && y == middle[k] && k % 2 == 1 && map[k] != map[k + 1];
    (k + usize::from(moves)) as u8
}

#[test]
fn thresholds_fold_the_rule_for_ties() {
    for map in maps() {
        let thresholds = Thresholds::new(&map);
        for pair in map.windows(2) {
            let middle = (pair[0] + pair[1]) * 0.5;
            for y in [middle.next_down(), middle, middle.next_up(), pair[0], -middle] {
                assert_eq!(thresholds.encode(y), encode_by_the_rule(&map, y), "{y}");
            }
        }
        for y in [0.0, -0.0, 1e-45, -1e-45, 2.0, -2.0, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(thresholds.encode(y), encode_by_the_rule(&map, y), "{y}");
        }
        assert_eq!(thresholds.encode(f32::NAN), thresholds.encode(0.0));
    }
}
