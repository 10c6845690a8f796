"""`tilewright inspect` of a tiny Llama compiled for an H100: what a user reads of each kernel."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch

import tilewright as tw
from canned_binaries import canned_binaries
from cli_running import run
from tilewright.codegen.triton.package import read_package
from tilewright.compiler.inspect.facts import (
    DECODE,
    PREFILL,
    as_run,
    final_graph,
    graph_texts,
    pick_pass,
)
from tilewright.compiler.inspect.kernels import kernel_name, kernel_report, nodes_of_calls
from tilewright.errors import UsageError
from tilewright.ir.graph import Graph
from tiny_models import tiny_model

# Launches of a step, by kernel without the hashes. A layer's seven at decode: q+k+v with the norm
# before them, RoPE with the KV write, attention over splits and their merge, o and the residual,
# gate+up with norm and activation, down and the residual.
DECODE_GOLDEN = {
    "rms_norm_linear": 2 + 1,  # and the lm_head
    "rope_append_kv": 2,
    "paged_decode": 4,
    "linear_add": 4,
    "rms_norm_linear_gated": 2,
    "embedding": 1,
    "mul_cos_sin": 1,
    "cast": 1,
    "sample": 2,
}
PREFILL_GOLDEN = {
    "linear": 9,
    "paged_attention": 2,
    "add_rms_norm": 3,  # the last of the picked rows
    "gated": 2,
    "rope_append_kv": 2,
    "embedding_rms_norm": 1,
    "embedding": 1,  # picks the rows that logits are wanted of, of the last attention
    "embedding_add_rms_norm": 1,  # and of the residual
    "mul_cos_sin": 1,
    "cast": 1,
}
LISTS = {"decode": "decode_kernels", "prefill": "kernels"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_model("llama").to(torch.bfloat16)
    with canned_binaries():
        engine = tw.compile(model, target="h100", verify="structure")
    path = tmp_path_factory.mktemp("h100") / "tiny"
    engine.save(path)
    return path


@pytest.fixture(scope="module")
def found(folder) -> dict:
    result = run("inspect", folder, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def every(found) -> list[tuple[str, dict]]:
    """(setting, kernel) of both Programs."""
    return [(setting, kernel) for setting, name in LISTS.items() for kernel in found[name]]


def stem(name: str) -> str:
    return re.sub(r"(_[0-9a-f]{4})?-[0-9a-f]{8}$", "", name)


def test_launches_of_a_step_are_the_known_ones(found):
    for setting, golden in (("decode", DECODE_GOLDEN), ("prefill", PREFILL_GOLDEN)):
        launches: Counter[str] = Counter()
        for kernel in found[LISTS[setting]]:
            launches[stem(kernel["kernel"])] += kernel["launches"][setting]
        assert +launches == golden  # without those of other sizes
        assert found["steps"][setting]["launches"] == sum(golden.values())
        assert found["steps"][setting]["layers"] == 2
    assert found["steps"]["decode"]["launches_a_layer"] == 7
    # The second layer has the add that only the last one is followed by.
    assert found["steps"]["prefill"]["launches_a_layer"] == 9.5


def test_every_kernel_of_ours_has_its_facts(found, folder):
    assert not any(kernel["kind"] == "library" for kernel in found["decode_kernels"])
    for setting, kernel in every(found):
        assert kernel["kind"] in ("generated", "template", "library")
        if kernel["kind"] == "library":
            assert kernel["binaries"] == [] and kernel["source"] is None
            continue
        assert kernel["source"] == (folder / "kernels" / kernel["kernel"] / "kernel.py").read_text()
        runs = any(setting in one["runs_at"] for one in kernel["binaries"])
        # A step of one sequence shares no pages.
        assert runs is (kernel["launches"][setting] > 0) is (stem(kernel["kernel"]) != "cascade")
        for one in kernel["binaries"]:
            assert 0 < one["registers"] <= 255 and one["threads"] % 32 == 0
            assert 0 < one["occupancy"] <= 1 and one["blocks_per_sm"] > 0


def test_costs_come_to_those_of_the_graph(found):
    for setting in LISTS:
        flops = sum(row["flops"] for row in found["costs"][setting])
        assert found["steps"][setting]["flops"] == flops
    qkv, rest = 64 * (64 + 2 * 32), 64 * 64 + 3 * 64 * 96
    linear = next(row for row in found["kernels"] if row["kernel"] == "linear")
    # Of a prompt's 256 rows, one's logits are wanted: all behind the last attention is of that one.
    products = 256 * (2 * qkv + rest) + rest + 160 * 64
    assert linear["costs"]["prefill"]["flops"] == 2 * products
    ours = [row for row in found["decode_kernels"] if "linear" in row["kernel"]]
    products = 2 * (qkv + rest) + 160 * 64
    # Two operations an element of a weight, and some for norms, residuals and activations.
    assert 2 * products < sum(row["costs"]["decode"]["flops"] for row in ours) < 2.1 * products
    moved = sum(row["costs"]["decode"]["bytes"] for row in ours)
    assert 2 * products < moved < 2.2 * products  # bfloat16 weights, and a few activations
    seconds = sum(row["costs"]["decode"]["roofline_seconds"] for row in ours)
    assert seconds == pytest.approx(moved / 3352e9)


def test_every_call_is_traced_to_the_node_that_it_came_from(folder):
    from tilewright.runtime.folder import load_image

    image = load_image(folder)
    assert image.decode is not None
    for one in (image, image.decoding):
        made = nodes_of_calls(final_graph(one), one.program)
        for call, nodes in zip(one.program.calls, made, strict=True):
            (node,) = nodes
            body = node.attr("body")
            ops = [n.op for n in body.calls()] if isinstance(body, Graph) else [node.op]
            assert list(call.origin) == ops
    for setting in (DECODE, PREFILL):
        report = kernel_report(image, (setting,))
        packages = [k.package for k in report.kernels if k.package]
        read = [read_package(image.files.__getitem__, package.id) for package in packages]
        assert packages == read
        calls = as_run(image, setting).program.calls
        assert {k.name for k in report.kernels} == {kernel_name(call) for call in calls}


def test_a_report_of_both_settings_has_the_kernels_of_both_programs(folder, found):
    from tilewright.runtime.folder import load_image

    report = kernel_report(load_image(folder), (DECODE, PREFILL))
    assert {k.name for k in report.kernels} == {kernel["kernel"] for _, kernel in every(found)}
    for kernel in report.kernels:
        there = [
            setting
            for setting, one in every(found)
            if one["kernel"] == kernel.name and one["launches"][setting]
        ]
        assert there == [name for name, step in kernel.steps.items() if step.launches]


def test_graphs_of_decode_steps_come_after_the_others(folder):
    from tilewright.runtime.folder import load_image

    image = load_image(folder)
    texts, general = graph_texts(image), len(image.graphs)
    report = json.loads((folder / "report.json").read_text())
    assert [name for name, _ in texts[1:]] == [row["name"] for row in report["passes"]]
    assert texts[general][0] == "one_token" and texts[-1] == image.decode.graphs[-1]
    assert pick_pass(image, "fuse")[1] == image.graphs[-1][1]  # the general one
    assert pick_pass(image, str(len(texts) - 1))[1] == texts[-1][1]
    title, text = pick_pass(image, "one_token")
    assert (title, text) == (f"{general:03d}-one_token", texts[general][1])
    with pytest.raises(UsageError, match=f"{general:03d}-one_token"):
        pick_pass(image, "nonesuch")


def test_the_text_has_a_row_a_kernel_and_the_sums(folder, found):
    text = run("inspect", folder).stdout
    for setting, name in LISTS.items():
        pattern = rf"^Kernels: launches at {setting}.*?\n(.*?)^{setting}: "
        table = re.search(pattern, text, re.MULTILINE | re.DOTALL)[1].splitlines()
        for kernel in found[name]:
            (row,) = (line for line in table if line.startswith(f"{kernel['kernel']} "))
            assert row.split()[1:3] == [kernel["kind"], str(kernel["launches"][setting])]
    assert re.search(r"decode: 20 launches a step, 7 a layer \(2 layers\); .* at least ", text)
    assert re.search(r"prefill: 23 launches a step, 9\.5 a layer \(2 layers\); .* at least ", text)
    assert "triton (10 generated calls, 11 library calls, 4 template calls)" in text
    assert "a Program of their own (3 generated calls, 16 template calls)" in text


def test_one_kernel_prints_its_source(folder, found):
    result = run("inspect", folder, "--kernel", "paged_decode")
    kernel = next(k for k in found["decode_kernels"] if stem(k["kernel"]) == "paged_decode")
    assert result.exit_code == 0 and result.stdout.endswith(kernel["source"])
    assert "no spills" in result.stdout and "blocks an SM" in result.stdout
    alone = run("inspect", folder, "--kernel", kernel["kernel"], "--json")
    assert json.loads(alone.stdout) == kernel
    assert "No source" in run("inspect", folder, "--kernel", "linear").stdout


@pytest.mark.parametrize("name", ["nonesuch", "add_rms_norm", ""])
def test_a_kernel_that_is_not_there_or_not_one_is_refused(folder, found, name):
    result = run("inspect", folder, "--kernel", name)
    assert result.exit_code == 2 and f"kernel '{name}'" in result.stderr
    assert all(kernel["kernel"] in result.stderr for _, kernel in every(found))


def test_the_page_has_every_source(folder, found, tmp_path):
    result = run("inspect", folder, "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "page.html").read_text("utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["kernels"] == found["kernels"] and data["steps"] == found["steps"]
    assert data["decode_kernels"] == found["decode_kernels"]
    assert data["classes"]["linear"] == "matmul"
    assert set(data["drawn"]) == set(LISTS)
    decode, prefill = (data["drawings"][data["drawn"][setting]] for setting in LISTS)
    labels = [{n["label"] for block in one for n in block["nodes"]} for one in (decode, prefill)]
    assert "rms_norm_linear_gated" in labels[0] - labels[1] and "linear" in labels[1] - labels[0]
    for setting, drawing in (("decode", decode), ("prefill", prefill)):
        costs = [n["cost"] for block in drawing for n in block["nodes"] if "cost" in n]
        assert costs and all(set(cost) == {setting} for cost in costs)
    assert not re.search(r"https?://|@import|url\(", text)
