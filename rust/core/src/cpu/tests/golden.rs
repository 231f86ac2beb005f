//! Golden vectors of the numerics reference, section 8: written with numpy, equal to bitsandbytes 0.50.2 on a CPU.

use super::*;
use crate::codebook::{Codebook4, DYNAMIC_SIGNED, create_dynamic_map, create_fp8_map, create_linear_map};
use crate::cpu::{
    Absmax, Nested, dequantize_4bit, dequantize_blockwise, quantize_4bit, quantize_absmax, quantize_blockwise,
};
use half::f16;

/// Two blocks of 64, bfloat16.
const INPUT_4BIT: &str = "\
    9d3db83e48bf923d2a3f93becf3fccbf54bd9dbe7e3e64be6a3f513e133fd53e863e6e3f04bfd3bf863f063f2bbe593d\
    103f1040ef3f99bf7f3feb3e1c4016bef4be96beb2beb33e183d8bbddc3e5ebf8bbe113e053e2e3f75bf833d293f523f\
    e9be0e40c1be13be263f15c0a23f7ebe753fa5bfd3bf543f56bf08bfad3fb03fc5ba0bbc0a3ca9bb02bde53c00000080\
    283cd1b9b8bc20bc4fbc81bc93bc1bbd763b6ebbefba71bc233dee3be4bc51bbd73bda3bc63ba1bcb43c84b960bccabb\
    23bc45bc1cbcc4bb013c963caabb863ad7bb053d8d3c653ccfbcd13cccbc91bcfabb253c3f3ce1b9383dc9bb65bc57bd\
    1abc1e3a513b033cba39413d83bc733b";
/// Their codes in nf4.
const NF4_PACKED: &str = "\
    7947a6e17686b8a98b51ca67afe2c9f656597793688a37ab5f56a0d6c21b35dd75962d77973544318674e9269983c746\
    55569b676dba2c2459a7e64057897f48";
/// Their codes in fp4.
const FP4_PACKED: &str = "\
    16c17e2a9e6e417664fa5791732d4639eee6196ce117c174e3e97b5e4da4cf559e6ea50069defcca199f26d9666c59fe\
    efee64e1e247d5dce6793efbe11613c1";
/// One block of 256, bfloat16.
const INPUT_8BIT: &str = "\
    c3bf40bf27bfcebfcdbd1cbf7bbfcebf36bf9c3e47bf81be64bed83f6a3eef3e32bf95bf333f4c3e5e3f7a3e2abf4f3f\
    8d3f34be10c0b9bf7a3d1ebf4cbf07bef13f94bd223e46bf4c3e3b3d1d3ef4bee3bd963e22beecbc174085bfca3f21bf\
    6dbf0c3f883de0be433fe23e953f01400d3e703f3ebe25bfc53f5fbf55c03fbfd1bc83bf19bf81bf58bef7bbd63f293c\
    34bf3ebe7fbf55bfecbe0fbfcb3e7bbf02bfcc3d27bf3b3fb8bf00bf303e24be823e01bf85bf3b3f86bff1be953eff3f\
    293f983f513f6abfb13f50bf6dbf8e3fab3f1b3fd4bd1bbe07c01fbfbdbf91bf603f0fbfa53f513f523e9c3e093fddbe\
    24406fbe5dbcee3ffdbfe63fd13dae3e363fe3bfb53e9a3f9bbee2bf233f4ebfcebff0bf0b3f293f13402d3fdb3fe6bf\
    aebf7cbfc13f243ff23edbbe0d3fc6bf053fda3d8a3eaa3fdf3fed3f35bf2440d63e5abe57bfd7be20bf7abf603f7d3f\
    9f3ec33f9a3fe8bfcfbe76bfabbba2bd583f953f073fcf3f77bf113e28beb7bedc3f9bbe753eac3fd33d8d3fafbe733f\
    12bf563fe43f48be043fecbf3bc011bf0bbf653f62bf083fc6bf31be3a3f6a3d683f863f05bfad3f713ef53feb3faa3f\
    78bfa03f9b3f07bf603e13bfbb3fe33fd33fddbe8bbeb8bfa03fa33fc83ec63ea3bdaf3e733fb1bfdd3f17c06ebf963e\
    5c3e703fbc3f0ebf3fbf4fbe6bbeaf3ac03e15bf13bf813fd8bd97bfbabd103f";
/// Its codes in the signed dynamic map.
const DYNAMIC_CODES: &str = "\
    26373924583a322437bb36484bdbb3c1382ec6b0cab538c9cf501728a1393655e05bac36b0a0ab3c57ba5262ea30d939\
    33c3a23dc8c1d0e2aacb4f39d834003764313a314d6ddb92384f31353d3bc0323ca639c7283cad52b63c30c7303dbae2\
    c5d1c933d53533cfd4c458531a39272eca3bd3c9b1bbc33dee4a6adf1cdea6bec721bfd14321c535241fc3c5e8c6dc20\
    2a32d8c5c13dc326c2a6b8d4dddf38eec04c353e3932cacdbcd8d1203e326e5bc9d0c3da32aa523fdc43b5d4a6cf40cc\
    3ac9dd4ec21f083b3bcb34c32651c7a1cbce3cd4b4e0dfd432d2d13bb23ad7dddb3d4628d2d3c0c05bbecc29dc1433ba\
    b2cbd73b374d4b89bf3a3acd582d59c3";

fn decoded_hash<T: Float>(
    packed: &[u8],
    absmax: Absmax<'_>,
    codebook: Codebook4,
    n: usize,
    execution: Execution,
) -> String {
    let mut output = vec![T::default(); n];
    dequantize_4bit(packed, absmax, codebook, 64, &mut output, execution);
    sha256(&output.to_bytes())
}

#[test]
fn quantize_4bit_gives_the_golden_bytes() {
    let input = bfloats(INPUT_4BIT);
    let cases = [
        (
            Codebook4::Nf4,
            NF4_PACKED,
            [
                "76ffef8ec7ee43d769c4ada59bd57ba9661b7f34153146313e54e26a716986c0",
                "328df168e53f53ff7d0e67369af41c69ae1d083a00a7be99a96a2e2b2dddd735",
                "c0c368a692fa9518db5d2accbcc3d15edcb9ccdf58889ff819d4faecf1473f9a",
            ],
        ),
        (
            Codebook4::Fp4,
            FP4_PACKED,
            [
                "409828f589b810ab0fb4b42df56ca18ce1e436bc9d2d2f7261239cfecdf0a4ce",
                "1840513c084af67e2d0c78e75c2346896ff42b38090d40053acd8525533c45f6",
                "4edb056ce07633dea6ad04d714e091733e066db73205eb961462d7faea32dcf7",
            ],
        ),
    ];
    for execution in executions() {
        for (codebook, expected, hashes) in cases {
            let mut packed = [0; 64];
            let mut absmax = [0.0; 2];
            quantize_4bit(&input, codebook, 64, &mut packed, &mut absmax, execution);
            assert_eq!(hex(&packed), expected, "{codebook:?} {execution:?}");
            assert_eq!(hex(&absmax.to_bytes()), "00001c400000573d");
            let absmax = Absmax::Plain(&absmax);
            let decoded = [
                decoded_hash::<f32>(&packed, absmax, codebook, 128, execution),
                decoded_hash::<bf16>(&packed, absmax, codebook, 128, execution),
                decoded_hash::<f16>(&packed, absmax, codebook, 128, execution),
            ];
            assert_eq!(decoded, hashes, "{codebook:?} {execution:?}");
        }
    }
}

#[test]
fn quantize_blockwise_gives_the_golden_codes() {
    let input = bfloats(INPUT_8BIT);
    for execution in executions() {
        let mut codes = [0; 256];
        let mut absmax = [0.0];
        quantize_blockwise(&input, &DYNAMIC_SIGNED, 256, &mut codes, &mut absmax, execution);
        assert_eq!(hex(&codes), DYNAMIC_CODES, "{execution:?}");
        assert_eq!(absmax, [3.328125]);
        let mut output = [0.0f32; 256];
        dequantize_blockwise(&codes, &absmax, &DYNAMIC_SIGNED, 256, &mut output, execution);
        assert_eq!(
            sha256(&output.to_bytes()),
            "684477a2ca482bd8665c3c03a86fb7f406105922190c4448f3ed416fa8e45436"
        );
    }
}

#[test]
fn quantize_blockwise_gives_the_golden_codes_of_other_maps() {
    let input = bfloats(INPUT_8BIT);
    let magnitudes: Vec<bf16> = input.iter().map(|x| bf16::from_f32(x.to_f32().abs())).collect();
    let cases = [
        (
            create_dynamic_map(false, 7, 8).unwrap(),
            &magnitudes,
            "b1908cb54d8a9ab5",
            "d7ac694d20de9a2ea759f3654297e0bcd07599d39c7f4af929d33f87f5c355de",
        ),
        (
            create_linear_map(true, 8, true).unwrap(),
            &input,
            "456266427b685a42",
            "375b3713ebdc9c1cb4c8f960aa453950dc2350641cda10f53edd61044ef05c9f",
        ),
        (
            create_fp8_map(true, 5, 2, 8).unwrap(),
            &input,
            "05090a04140a0704",
            "0faa5e4af4d60de5058a71d8ed39720e7f6179608e6cd446e76968a4d3ce91a4",
        ),
        (
            create_fp8_map(true, 4, 3, 8).unwrap(),
            &input,
            "0911130829140e08",
            "d6ed5b3f3bec6577f764afd0e166b11d93d071951ea419cf172052d32d925a8b",
        ),
    ];
    for execution in executions() {
        for (map, input, first, hash) in &cases {
            let mut codes = [0; 256];
            quantize_blockwise(input, map, 256, &mut codes, &mut [0.0], execution);
            assert_eq!(hex(&codes[..8]), *first);
            assert_eq!(sha256(&codes), *hash, "{execution:?}");
        }
    }
}

/// The pseudo-random weight [300, 64] of section 8.4.
fn nested_input() -> Vec<f32> {
    let mut s = 5u32;
    let next = |_| {
        s = s.wrapping_mul(1664525).wrapping_add(1013904223);
        let u = ((s >> 8) as f32 - 8388608.0) * 2f32.powi(-23);
        u * u.abs()
    };
    (0..19_200).map(next).collect()
}

#[test]
fn nested_statistics_are_the_golden_ones() {
    let input = nested_input();
    assert_eq!(hex(&input[..4].to_bytes()), "a9938cbe43a05c3e783087be0720ff3e");
    assert_eq!(sha256(&input.to_bytes()), "b6999dc254c3e7b38a6c70f0562db5bac572491f8d5a56e24487265f498d3fc3");
    for execution in executions() {
        let mut packed = [0; 9600];
        let mut absmax = [0.0; 300];
        quantize_4bit(&input, Codebook4::Nf4, 64, &mut packed, &mut absmax, execution);
        assert_eq!(hex(&packed[..8]), "4a4d96741d12782c");
        assert_eq!(sha256(&packed), "bd886940f520f2f879f5419f096787629d44ad38e92441cc7293fa253fcd4faf");
        assert_eq!(
            sha256(&absmax.to_bytes()),
            "b51abdb96a8228b960af961535e00bd982051fa940de6c7644ba8c4f289a8913"
        );
        let mut codes = [0; 300];
        let mut scale = [0.0; 2];
        let offset = quantize_absmax(&absmax, &mut codes, &mut scale, execution);
        assert_eq!(hex(&offset.to_le_bytes()), "1176783f");
        assert_eq!(hex(&codes[..8]), "c13e58bca83cc1c2");
        assert_eq!(sha256(&codes), "3aa41219ab5efa1c9b6308b03262a241caa22f9c7dd4fdd7a5efed2ab9191959");
        assert_eq!(hex(&scale.to_bytes()), "e0730f3e50876f3d");
        let nested = Nested { codes: &codes, scale: &scale, offset, map: &DYNAMIC_SIGNED };
        let absmax: Vec<f32> = (0..300).map(|block| Absmax::Nested(nested).get(block)).collect();
        assert_eq!(hex(&absmax[..2].to_bytes()), "ee4e7d3f4f1e743f");
        assert_eq!(
            sha256(&absmax.to_bytes()),
            "8db82ace0039671eeb1eb9941165d1b6552fdd4d6913b16a1295247d9e65d80b"
        );
        assert_eq!(
            decoded_hash::<f32>(&packed, Absmax::Nested(nested), Codebook4::Nf4, 19_200, execution),
            "f896805473e36c8904c1867fc36472a135bc5f317bcd4e124bde4c874fbbe8bb"
        );
    }
}
