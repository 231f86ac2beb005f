"""Schemes: records that survive JSON, presets, and the rules that pick a scheme by a layer's name."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from qbits.errors import ArgumentTypeError, ArgumentValueError
from qbits.schemes import (
    AF4,
    FP4,
    NF4,
    Int8,
    LLMInt8,
    QuantScheme,
    SwitchBack,
    as_scheme,
    available_schemes,
    matches,
    resolve,
)

PRESETS = ["nf4", "nf4-dq", "fp4", "fp4-dq", "af4", "af4-dq", "int8", "llm-int8", "switchback"]


def test_available_schemes_are_the_presets_by_name():
    assert available_schemes() == PRESETS
    assert [as_scheme(name).name for name in PRESETS] == PRESETS
    assert as_scheme("fp4-dq") == FP4(block_size=64, double_quant=True)


SCHEMES = [NF4(), FP4(128), AF4(4096), NF4(32, True), Int8(), Int8(3.5), LLMInt8(), SwitchBack(False)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scheme_survives_json(scheme):
    again = QuantScheme.from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert again == scheme
    assert type(again) is type(scheme)


def test_scheme_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NF4().block_size = 128
    assert len({NF4(), NF4(64), FP4()}) == 2


def test_scheme_names_its_block_size_where_it_is_not_the_default():
    assert [str(s) for s in (NF4(), NF4(double_quant=True), FP4(32))] == ["nf4", "nf4-dq", "fp4 (block 32)"]
    int8 = (Int8(), Int8(4), LLMInt8(), LLMInt8(threshold=5.5))
    assert [str(s) for s in int8] == ["int8", "int8 (threshold 4)", "llm-int8", "llm-int8 (threshold 5.5)"]


@pytest.mark.parametrize("block_size", [0, 16, 48, 8192, 64.0, True, "64", None])
def test_scheme_refuses_a_block_size(block_size):
    with pytest.raises(ValueError) as error:
        NF4(block_size=block_size)
    assert str(error.value) == (
        f"qbits::NF4: block_size must be one of [32, 64, 128, 256, 512, 1024, 2048, 4096], got {block_size!r}"
    )


def test_scheme_refuses_a_double_quant_that_is_no_bool():
    with pytest.raises(TypeError) as error:
        FP4(double_quant=1)
    assert str(error.value) == "qbits::FP4: double_quant must be a bool, got 1"


@pytest.mark.parametrize("threshold", [-1, float("nan"), True, "6", None])
def test_scheme_refuses_a_threshold(threshold):
    for scheme in (Int8, LLMInt8):
        with pytest.raises(ValueError) as error:
            scheme(threshold)
        assert str(error.value) == (
            f"qbits::{scheme.__name__}: threshold must be a number >= 0, got {threshold!r}"
        )


def test_from_dict_refuses_an_unknown_codebook():
    with pytest.raises(ValueError) as error:
        QuantScheme.from_dict({"codebook": "nf3"})
    assert str(error.value) == (
        "qbits::QuantScheme.from_dict: codebook must be one of ['nf4', 'fp4', 'af4', 'int8', 'llm-int8', "
        "'switchback'], got 'nf3'"
    )


def test_from_dict_refuses_an_unknown_field():
    with pytest.raises(ValueError) as error:
        QuantScheme.from_dict({"codebook": "nf4", "blocksize": 64})
    assert str(error.value) == (
        "qbits::QuantScheme.from_dict: record must hold only codebook, block_size and double_quant, "
        "got ['blocksize']"
    )
    with pytest.raises(ValueError) as error:
        QuantScheme.from_dict({"codebook": "int8", "block_size": 64})
    assert str(error.value) == (
        "qbits::QuantScheme.from_dict: record must hold only codebook and threshold, got ['block_size']"
    )


def test_as_scheme_lists_the_presets_for_an_unknown_name():
    with pytest.raises(ArgumentValueError) as error:
        as_scheme("int3")
    assert str(error.value) == f"qbits::as_scheme: scheme must be one of {PRESETS}, got 'int3'"


@pytest.mark.parametrize("scheme", [4, None, QuantScheme()])
def test_as_scheme_refuses_what_is_neither_a_name_nor_a_scheme(scheme):
    with pytest.raises(ArgumentTypeError) as error:
        as_scheme(scheme)
    assert str(error.value) == (
        f"qbits::as_scheme: scheme must be a preset's name or a QuantScheme, got {type(scheme).__name__}"
    )


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("lm_head", "model.lm_head", True),
        ("lm_head", "lm_head", True),
        ("lm_head", "lm_head.0", False),
        ("model.*", "model.lm_head", True),
        ("model.*", "a.model.lm_head", False),
        ("LM_HEAD", "lm_head", False),
        ("layers.[0-3].q", "layers.3.q", True),
        ("re:.*[.](q|k)", "layers.3.q", True),
        ("re:layers", "layers.3", False),
        (re.compile(r"layers\.\d+"), "layers.31", True),
        (re.compile(r"layers\.\d+"), "layers.31.q", False),
    ],
)
def test_matches_fits_globs_and_regular_expressions(pattern, name, fits):
    assert matches(pattern, name) is fits


def test_matches_refuses_a_broken_regular_expression():
    with pytest.raises(ArgumentValueError) as error:
        matches("re:(", "a")
    assert str(error.value) == (
        "qbits::matches: pattern must be a regular expression after 're:', "
        "got 're:(' (missing ), unterminated subpattern at position 0)"
    )


def test_matches_refuses_a_pattern_of_another_type():
    with pytest.raises(ArgumentTypeError) as error:
        matches(3, "a")
    assert str(error.value) == "qbits::matches: pattern must be a glob or a regular expression, got int"


def test_resolve_takes_the_first_rule_that_fits():
    pick = resolve({"*.mlp.*": FP4(), "h.0.*": None, re.compile(r"h\..*"): "nf4-dq"})
    assert pick("h.0.mlp.up") == FP4()
    assert pick("h.0.attn.q") is None
    assert pick("h.1.attn.q") == NF4(double_quant=True)
    assert pick("lm_head") is None


def test_resolve_checks_every_scheme_of_a_mapping_at_once():
    with pytest.raises(ArgumentValueError, match="got 'nf5'"):
        resolve({"a": "nf4", "never": "nf5"})


def test_switchback_stores_no_codes_and_refuses_what_is_no_bool():
    assert [str(s) for s in (SwitchBack(), SwitchBack(False))] == ["switchback", "switchback (one scale)"]
    assert not SwitchBack.stores_codes and NF4.stores_codes
    with pytest.raises(TypeError) as error:
        SwitchBack(vectorwise=1)
    assert str(error.value) == "qbits::SwitchBack: vectorwise must be a bool, got 1"
