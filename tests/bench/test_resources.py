"""The reader of ptxas reports and the comparison with ceilings, on literal reports."""

from __future__ import annotations

import json

import pytest

from bench import resources
from bench.resources import Used, parse, problems, serialized, table, written

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void fastsae::cuda::sort_kernel<fastsae::cuda::Float16>\
(long, int, unsigned long*, fastsae::cuda::Float16::Bits*, int*)' for 'sm_90a'
ptxas info    : Function properties for void fastsae::cuda::sort_kernel<fastsae::cuda::Float16>
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers
ptxas info    : Compile time = 25.396 ms
ptxas info    : Compiling entry function 'void fastsae::cuda::topk_kernel<fastsae::cuda::Float32, \
false, 512, 4>(fastsae::cuda::TopkArgs<fastsae::cuda::Float32>)' for 'sm_80'
ptxas info    : Function properties for void fastsae::cuda::topk_kernel<fastsae::cuda::Float32>
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 1168 bytes smem, 8 bytes cmem[2]
"""
SORT, TOPK = "sort_kernel<Float16>", "topk_kernel<Float32,false,512,4>"
FOUND = {SORT: {"sm_90a": Used(30, 0)}, TOPK: {"sm_80": Used(64, 1168, 16)}}
CEILINGS = {SORT: {"sm_90a": [30, 0]}, TOPK: {"sm_80": [64, 1168]}}


def test_parses_a_report() -> None:
    assert parse(REPORT) == FOUND


def test_names_are_short() -> None:
    assert resources.short("void fastsae::cuda::(anonymous namespace)::f<(int)3>(int)") == "f<3>"
    assert resources.short("fastsae::cuda::<unnamed>::g(float const*)") == "g"


@pytest.mark.parametrize(
    ("ceilings", "spilling", "expected"),
    [
        (CEILINGS, {TOPK: 16}, []),
        (CEILINGS, {}, [f"{TOPK} on sm_80: expected no bytes of spills, got 16"]),
        (CEILINGS, {TOPK: 8}, [f"{TOPK} on sm_80: expected 8 bytes of spills, got 16"]),
        (
            {SORT: {"sm_90a": [29, 0]}, TOPK: {"sm_80": [64, 1024]}},
            {TOPK: 16},
            [
                f"{SORT} on sm_90a: expected at most 29 registers, got 30",
                f"{TOPK} on sm_80: expected at most 1024 bytes shared, got 1168",
            ],
        ),
        (
            {TOPK: {"sm_80": [64, 1168]}},
            {TOPK: 16},
            [f"{SORT} on sm_90a: expected a ceiling in resources.json, got none"],
        ),
        (
            {**CEILINGS, "old": {"sm_80": [1, 0]}},
            {TOPK: 16},
            ["old: expected a kernel for its ceiling, got none"],
        ),
    ],
)
def test_compares_with_ceilings(ceilings, spilling, expected) -> None:
    assert problems(FOUND, ceilings, spilling) == expected


def test_writes_what_it_reads() -> None:
    known = json.loads(written(FOUND, "13.0", {TOPK: 16}))
    assert known == {
        "nvcc": "13.0",
        "spills_allowed": {TOPK: 16},
        "ceilings": CEILINGS,
    }


def test_prints_a_table() -> None:
    lines = table(FOUND).splitlines()
    assert lines[0].split()[-2:] == ["sm_80", "sm_90a"]
    assert lines[1].split() == [SORT, "30", "/", "0"]
    assert lines[2].split() == [TOPK, "64", "/", "1168", "!16"]


def test_names_products_that_wait_for_each_other() -> None:
    assert serialized(REPORT) == []
    said = (
        "ptxas info    : (C7517) warpgroup.wait is injected in around line 753 by compiler to "
        "allow use of registers defined by GMMA in function 'void fastsae::cuda::product_kernel<"
        "fastsae::cuda::FilterSums>(CUtensorMap_st)'\n"
    )
    assert serialized(REPORT + said) == [
        "product_kernel<FilterSums>: expected products that ptxas adds nothing to, got C7517: "
        "warpgroup.wait is injected in around line 753 by compiler to allow use of registers "
        "defined by GMMA"
    ]
