"""`tilewright inspect` of a tiny Llama compiled for an H100: what a user reads of each kernel."""

from __future__ import annotations

import json
import re

import pytest
import torch

import tilewright as tw
from cli_running import run
from tilewright.codegen.triton.package import read_package
from tilewright.compiler.inspect.facts import DECODE, final_graph
from tilewright.compiler.inspect.kernels import kernel_report, nodes_of_calls
from tilewright.ir.graph import Graph
from tiny_models import tiny_model

# Launches at decode and prefill, by kernel without the hashes. A layer's ten at decode: the norm
# before attention, q+k+v, RoPE with the KV write, attention over splits and their merge, o, the
# norm before the MLP, gate+up, the gated activation, down.
GOLDEN = {
    "linear": (9, 9),
    "paged_attention": (4, 2),
    "add_rms_norm": (3, 3),
    "gated": (2, 2),
    "rope_append_kv": (2, 2),
    "embedding_rms_norm": (2, 2),
    "add": (1, 1),
    "mul_cos_sin": (1, 1),
    "cast": (1, 1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_model("llama").to(torch.bfloat16)
    engine = tw.compile(model, target="h100", verify="structure")
    path = tmp_path_factory.mktemp("h100") / "tiny"
    engine.save(path)
    return path


@pytest.fixture(scope="module")
def found(folder) -> dict:
    result = run("inspect", folder, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def stem(name: str) -> str:
    return re.sub(r"(_[0-9a-f]{4})?-[0-9a-f]{8}$", "", name)


def test_launches_of_a_step_are_the_known_ones(found):
    launches: dict[str, tuple[int, int]] = {}
    for kernel in found["kernels"]:
        decode, prefill = launches.get(stem(kernel["kernel"]), (0, 0))
        more = kernel["launches"]
        launches[stem(kernel["kernel"])] = (decode + more["decode"], prefill + more["prefill"])
    assert launches == GOLDEN
    assert found["steps"]["decode"]["launches"] == sum(decode for decode, _ in GOLDEN.values())
    assert found["steps"]["decode"]["layers"] == 2
    # The second layer has the add that only the last one is followed by.
    assert found["steps"]["decode"]["launches_a_layer"] == 10.5


def test_every_kernel_of_ours_has_its_facts(found, folder):
    for kernel in found["kernels"]:
        assert kernel["kind"] in ("generated", "template", "library")
        if kernel["kind"] == "library":
            assert kernel["binaries"] == [] and kernel["source"] is None
            continue
        assert kernel["source"] == (folder / "kernels" / kernel["kernel"] / "kernel.py").read_text()
        assert any("decode" in one["runs_at"] for one in kernel["binaries"])
        for one in kernel["binaries"]:
            assert 0 < one["registers"] <= 255 and one["threads"] % 32 == 0
            assert 0 < one["occupancy"] <= 1 and one["blocks_per_sm"] > 0


def test_costs_come_to_those_of_the_graph(found):
    assert found["steps"]["decode"]["flops"] == sum(r["flops"] for r in found["costs"]["decode"])
    linear = next(row for row in found["kernels"] if row["kernel"] == "linear")
    products = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96) + 160 * 64
    assert linear["costs"]["decode"]["flops"] == 2 * products
    moved = linear["costs"]["decode"]["bytes"]
    assert 2 * products < moved < 2.2 * products  # bfloat16 weights, and a few activations
    assert linear["costs"]["decode"]["roofline_seconds"] == pytest.approx(moved / 3352e9)


def test_every_call_is_traced_to_the_node_that_it_came_from(folder):
    from tilewright.runtime.folder import load_image

    image = load_image(folder)
    made = nodes_of_calls(final_graph(image), image.program)
    for call, nodes in zip(image.program.calls, made, strict=True):
        (node,) = nodes
        body = node.attr("body")
        ops = [n.op for n in body.calls()] if isinstance(body, Graph) else [node.op]
        assert list(call.origin) == ops
    packages = [k.package for k in kernel_report(image, (DECODE,)).kernels if k.package]
    assert packages == [read_package(image.files.__getitem__, package.id) for package in packages]


def test_the_text_has_a_row_a_kernel_and_the_sums(folder, found):
    text = run("inspect", folder).stdout
    table = re.search(r"^Kernels: .*?\n(.*?)^decode: ", text, re.MULTILINE | re.DOTALL)[1]
    for kernel in found["kernels"]:
        (row,) = (line for line in table.splitlines() if line.startswith(f"{kernel['kernel']} "))
        assert row.split()[1:4] == [kernel["kind"], *map(str, kernel["launches"].values())]
    assert re.search(r"decode: 25 launches a step, 10\.5 a layer \(2 layers\); .* at least ", text)
    assert "triton (10 generated calls, 9 library calls, 4 template calls)" in text


def test_one_kernel_prints_its_source(folder, found):
    result = run("inspect", folder, "--kernel", "rope_append_kv")
    kernel = next(k for k in found["kernels"] if stem(k["kernel"]) == "rope_append_kv")
    assert result.exit_code == 0 and result.stdout.endswith(kernel["source"])
    assert "no spills" in result.stdout and "blocks an SM" in result.stdout
    alone = run("inspect", folder, "--kernel", kernel["kernel"], "--json")
    assert json.loads(alone.stdout) == kernel
    assert "No source" in run("inspect", folder, "--kernel", "linear").stdout


@pytest.mark.parametrize("name", ["nonesuch", "embedding_rms_norm", ""])
def test_a_kernel_that_is_not_there_or_not_one_is_refused(folder, found, name):
    result = run("inspect", folder, "--kernel", name)
    assert result.exit_code == 2 and f"kernel '{name}'" in result.stderr
    assert all(kernel["kernel"] in result.stderr for kernel in found["kernels"])


def test_the_page_has_every_source(folder, found, tmp_path):
    result = run("inspect", folder, "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "page.html").read_text("utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["kernels"] == found["kernels"] and data["steps"] == found["steps"]
    assert data["classes"]["linear"] == "matmul"
    assert not re.search(r"https?://|@import|url\(", text)
