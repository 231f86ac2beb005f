"""Golden vectors of NUMERICS 8.1 to 8.5: memory bytes in hexadecimal, and sha256 of what they decode to.

All were produced by running the rules in numpy float32; all but 8.3 also equal bitsandbytes 0.50.2.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


def sha256(data: npt.NDArray[np.generic]) -> str:
    """Hash of the array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()


def bytes_of(text: str) -> npt.NDArray[np.uint8]:
    """Bytes written in hexadecimal."""
    return np.frombuffer(bytes.fromhex(text), np.uint8)


def float32_of(text: str) -> npt.NDArray[np.float32]:
    """Float32 values from their bytes in memory order."""
    return np.frombuffer(bytes.fromhex(text), np.float32)


def bfloat16_of(text: str) -> npt.NDArray[np.float32]:
    """Bfloat16 values from their bytes in memory order, widened to float32."""
    return (np.frombuffer(bytes.fromhex(text), np.uint16).astype(np.uint32) << 16).view(np.float32)


# 1.6: float32 entries of each map; fp4 as checkpoints store it, with +0 at index 8
MAP_SHA256 = {
    "dynamic": "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    "dynamic_unsigned": "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
    "linear": "80bf4c55fa736fa18f611d26a59e99475bae78388280fbccbf4c7d12437a4775",
    "linear_no_zero": "d88eea2f793473b6ba77330cd7ce319ceb4f31aa83ccf5dda7e88b1564de56c1",
    "linear_unsigned": "7cb9ea560989533d101f5082aa194366c6fd5d82a305f2994cc39312a65f7962",
    "normal": "695151d62a023d258f8c1b6d9eb7c67501d612a09af2473b5a046db7cf3436be",
    "normal_symmetric": "a1dc1a106736730497a824543972384d24dfa942cdfa1829073351e16d2c5568",
    "e5m2": "0da7c4e2990b302a360d0664262e0bce8012809e65954885e9b573c00fd57b04",
    "e4m3": "f3c007a4cafc83fe599bffde8d83c3b00a6c648306af949f2d0a051da02832aa",
    "nf4": "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a",
    "fp4": "b830bcf8857895e5676b8e2ce608a60bb8af9b3ce6270073e9de34814196f09c",
}

# 8.1: bfloat16 [2, 64], two blocks of 64
INPUT_4BIT = (
    "9d3db83e48bf923d2a3f93becf3fccbf54bd9dbe7e3e64be6a3f513e133fd53e863e6e3f04bfd3bf863f063f2bbe593d10"
    "3f1040ef3f99bf7f3feb3e1c4016bef4be96beb2beb33e183d8bbddc3e5ebf8bbe113e053e2e3f75bf833d293f523fe9be"
    "0e40c1be13be263f15c0a23f7ebe753fa5bfd3bf543f56bf08bfad3fb03fc5ba0bbc0a3ca9bb02bde53c00000080283cd1"
    "b9b8bc20bc4fbc81bc93bc1bbd763b6ebbefba71bc233dee3be4bc51bbd73bda3bc63ba1bcb43c84b960bccabb23bc45bc"
    "1cbcc4bb013c963caabb863ad7bb053d8d3c653ccfbcd13cccbc91bcfabb253c3f3ce1b9383dc9bb65bc57bd1abc1e3a51"
    "3b033cba39413d83bc733b"
)
PACKED_4BIT = {
    "nf4": (
        "7947a6e17686b8a98b51ca67afe2c9f656597793688a37ab5f56a0d6c21b35dd75962d77973544318674e9269983c746"
        "55569b676dba2c2459a7e64057897f48"
    ),
    "fp4": (
        "16c17e2a9e6e417664fa5791732d4639eee6196ce117c174e3e97b5e4da4cf559e6ea50069defcca199f26d9666c59fe"
        "efee64e1e247d5dce6793efbe11613c1"
    ),
}
ABSMAX_4BIT = "00001c400000573d"
DECODED_4BIT_SHA256 = {
    ("nf4", "float32"): "76ffef8ec7ee43d769c4ada59bd57ba9661b7f34153146313e54e26a716986c0",
    ("nf4", "bfloat16"): "328df168e53f53ff7d0e67369af41c69ae1d083a00a7be99a96a2e2b2dddd735",
    ("nf4", "float16"): "c0c368a692fa9518db5d2accbcc3d15edcb9ccdf58889ff819d4faecf1473f9a",
    ("fp4", "float32"): "409828f589b810ab0fb4b42df56ca18ce1e436bc9d2d2f7261239cfecdf0a4ce",
    ("fp4", "bfloat16"): "1840513c084af67e2d0c78e75c2346896ff42b38090d40053acd8525533c45f6",
    ("fp4", "float16"): "4edb056ce07633dea6ad04d714e091733e066db73205eb961462d7faea32dcf7",
}

# 8.2: bfloat16 [256], one block, signed dynamic map
INPUT_8BIT = (
    "c3bf40bf27bfcebfcdbd1cbf7bbfcebf36bf9c3e47bf81be64bed83f6a3eef3e32bf95bf333f4c3e5e3f7a3e2abf4f3f8d"
    "3f34be10c0b9bf7a3d1ebf4cbf07bef13f94bd223e46bf4c3e3b3d1d3ef4bee3bd963e22beecbc174085bfca3f21bf6dbf"
    "0c3f883de0be433fe23e953f01400d3e703f3ebe25bfc53f5fbf55c03fbfd1bc83bf19bf81bf58bef7bbd63f293c34bf3e"
    "be7fbf55bfecbe0fbfcb3e7bbf02bfcc3d27bf3b3fb8bf00bf303e24be823e01bf85bf3b3f86bff1be953eff3f293f983f"
    "513f6abfb13f50bf6dbf8e3fab3f1b3fd4bd1bbe07c01fbfbdbf91bf603f0fbfa53f513f523e9c3e093fddbe24406fbe5d"
    "bcee3ffdbfe63fd13dae3e363fe3bfb53e9a3f9bbee2bf233f4ebfcebff0bf0b3f293f13402d3fdb3fe6bfaebf7cbfc13f"
    "243ff23edbbe0d3fc6bf053fda3d8a3eaa3fdf3fed3f35bf2440d63e5abe57bfd7be20bf7abf603f7d3f9f3ec33f9a3fe8"
    "bfcfbe76bfabbba2bd583f953f073fcf3f77bf113e28beb7bedc3f9bbe753eac3fd33d8d3fafbe733f12bf563fe43f48be"
    "043fecbf3bc011bf0bbf653f62bf083fc6bf31be3a3f6a3d683f863f05bfad3f713ef53feb3faa3f78bfa03f9b3f07bf60"
    "3e13bfbb3fe33fd33fddbe8bbeb8bfa03fa33fc83ec63ea3bdaf3e733fb1bfdd3f17c06ebf963e5c3e703fbc3f0ebf3fbf"
    "4fbe6bbeaf3ac03e15bf13bf813fd8bd97bfbabd103f"
)
CODES_8BIT = (
    "26373924583a322437bb36484bdbb3c1382ec6b0cab538c9cf501728a1393655e05bac36b0a0ab3c57ba5262ea30d93933"
    "c3a23dc8c1d0e2aacb4f39d834003764313a314d6ddb92384f31353d3bc0323ca639c7283cad52b63c30c7303dbae2c5d1"
    "c933d53533cfd4c458531a39272eca3bd3c9b1bbc33dee4a6adf1cdea6bec721bfd14321c535241fc3c5e8c6dc202a32d8"
    "c5c13dc326c2a6b8d4dddf38eec04c353e3932cacdbcd8d1203e326e5bc9d0c3da32aa523fdc43b5d4a6cf40cc3ac9dd4e"
    "c21f083b3bcb34c32651c7a1cbce3cd4b4e0dfd432d2d13bb23ad7dddb3d4628d2d3c0c05bbecc29dc1433bab2cbd73b37"
    "4d4b89bf3a3acd582d59c3"
)
ABSMAX_8BIT = "00005540"
DECODED_8BIT_SHA256 = "684477a2ca482bd8665c3c03a86fb7f406105922190c4448f3ed416fa8e45436"
# the same input (its magnitude for the unsigned map) with other maps: first 8 codes, sha256 of the 256 codes
CODES_8BIT_OF_MAP = {
    "dynamic_unsigned": (
        "b1908cb54d8a9ab5",
        "d7ac694d20de9a2ea759f3654297e0bcd07599d39c7f4af929d33f87f5c355de",
    ),
    "linear": ("456266427b685a42", "375b3713ebdc9c1cb4c8f960aa453950dc2350641cda10f53edd61044ef05c9f"),
    "e5m2": ("05090a04140a0704", "0faa5e4af4d60de5058a71d8ed39720e7f6179608e6cd446e76968a4d3ce91a4"),
    "e4m3": ("0911130829140e08", "d6ed5b3f3bec6577f764afd0e166b11d93d071951ea419cf172052d32d925a8b"),
}


class Edge(NamedTuple):
    """One block: float32 input, packed bytes of both types, absmax; all as memory bytes."""

    input: str
    nf4: str
    fp4: str
    absmax: str


ONE = "0000803f"
# 8.3: one block each, block size 64
EDGES_4BIT = {
    "zeros": Edge("00000000" * 64, "77" * 32, "00" * 32, "00000000"),
    "nan": Edge("0000c07f" + ONE * 63, "77" * 32, "00" * 32, "0000c07f"),
    "minus_inf": Edge("000080ff" + ONE * 63, "77" * 32, "00" * 32, "0000807f"),
    "subnormal": Edge("c2160100" * 64, "77" * 32, "00" * 32, "00000000"),  # 1e-40
    "odd_length": Edge("0000803f000080bf0000003f000080be0000003e", "f0c497", "3b5f60", ONE),
    "huge": Edge("e6b1617f997696fe9976967ee6b161ff", "f4b0", "3c4b", "e6b1617f"),
    "smallest_normal": Edge("00008000000040800000200000000000", "f2a7", "3d70", "00008000"),
    "ties_nf4": Edge("0000803fd81c59bf71783abdfffa223dda895c3f00fb223d", "f067e8", "3b9131", ONE),
    "ties_fp4": Edge(
        "0000803fb9aa2a3b0000b03d5055153fb9aa2abb0000b0bd505515bf5f7089b0", "f78d7627", "301589d8", ONE
    ),
}
# 1.0, mid[199], mid[200], mid[201], mid[50], mid[51], +0, -0 in one block of 256, signed dynamic map
TIES_8BIT = "0000803f0000683e6666763e6666823ecdcc90be9a9989be0000000000000080"
TIES_8BIT_CODES = "ffc8c8ca32347f7f"

# 8.4: nested NF4 of a [300, 64] float32 weight, block size 64
NESTED_SHAPE = (300, 64)
NESTED_INPUT_SHA256 = "b6999dc254c3e7b38a6c70f0562db5bac572491f8d5a56e24487265f498d3fc3"
NESTED_PACKED_SHA256 = "bd886940f520f2f879f5419f096787629d44ad38e92441cc7293fa253fcd4faf"
NESTED_ABSMAX_SHA256 = "b51abdb96a8228b960af961535e00bd982051fa940de6c7644ba8c4f289a8913"
NESTED_OFFSET = "1176783f"
NESTED_CODES_SHA256 = "3aa41219ab5efa1c9b6308b03262a241caa22f9c7dd4fdd7a5efed2ab9191959"
NESTED_SCALE = "e0730f3e50876f3d"
NESTED_DECODED_ABSMAX_SHA256 = "8db82ace0039671eeb1eb9941165d1b6552fdd4d6913b16a1295247d9e65d80b"
NESTED_DECODED_SHA256 = "f896805473e36c8904c1867fc36472a135bc5f317bcd4e124bde4c874fbbe8bb"


def nested_input() -> npt.NDArray[np.float32]:
    """Flat input of 8.4: a linear congruential sequence u in [-1, 1), and x = u * |u|."""
    state = 5
    values = np.empty(NESTED_SHAPE[0] * NESTED_SHAPE[1], np.float32)
    for i in range(values.size):
        state = (1664525 * state + 1013904223) % 2**32
        values[i] = ((state >> 8) - 2**23) * 2.0**-23  # 24 bits: exact
    return values * np.abs(values)


class Int8(NamedTuple):
    """Codes, scales and outlier columns of 8.5."""

    codes: str
    scales: str
    outlier_columns: tuple[int, ...] = ()


# 8.5: float16 [4, 8]; row 1 is zero, row 2 holds ties, row 3 6.0 and the number below
INPUT_INT8 = (
    "90ba5536313b8ebd58b1003a21b926bb00000000000000000000000000000000f0570038003e004100b800be00c1f0d7"
    "b3b2e4b243bf86b51fc00046ff4570bd"
)
INT8 = Int8(
    "b5245281f145c5ae00000000000000007f00020200fefe81fcfbdaf9d47f7fe3", "00c0b13f000000000000fe420000c040"
)
INT8_OUTLIERS = Int8(
    "00245281f100c500000000000000000000194c7fe700810000fbdaf9d4007f00",
    "00c0b13f000000000000204000e0bf40",
    (0, 5, 7),
)
INPUT_INT8_WEIGHT = (
    "59ad03a694319940a83b4cb9a1bad8b81db6abbcd1350db542b8c934afbd3bb185399eb0733e453e83bbf3bc01ac3137"
)
INT8_WEIGHT = Int8("fbff0a7f35dbd2dfde9820e4d01b81f136f57f7bb69ffb23", "0020134000e0b53f0060ce3f")
