"""The engine folder: an EngineImage on disk. Readable text, safetensors, and a manifest with a
hash of every file.

    manifest.json                what it is, and the sha256 of every other file
    program.json                 calls and buffers
    decode.json                  the same for decode steps, where they have a Program of their own
    graphs/NNN-<pass>.txt        the IR after each pass, for reading; graphs/decode/ likewise
    weights/NNNNN.safetensors    every weight as the program takes it; or
    weights.json                 every weight as an expression over a checkpoint or seeds, and
    held.safetensors             beside it what the model's own code computed, if anything
    tokenizer.json, tokenizer_config.json, report.json, and what the backend adds (onnx/…)

Nothing in it is executed: texts are parsed in closed grammars, tensors are mapped.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from ..codegen.program import Json, Program
from ..errors import EngineError, UsageError
from ..formats.atomic import atomic_folder
from ..formats.hashing import sha256_files
from ..formats.tokenizer import Tokenizer
from ..formats.weight_refs import References
from ..version import __version__
from .image import (
    FORMAT_VERSION,
    DecodePart,
    EngineImage,
    LMConfig,
    LoadableWeight,
    Signature,
)
from .structure import from_json, to_json

SHARD_BYTES = 2**31
MANIFEST = "manifest.json"
DECODE = "decode.json"
REFERENCES = "weights.json"
HELD = "held.safetensors"
WEIGHT_FORMS = ("embed", "reference")


def save_engine(image: EngineImage, path: str | Path, weights: str = "embed") -> None:
    """Writes an engine folder; an engine that is there already is replaced whole, or stays whole.

    Args:
        image: the engine.
        path: of the folder.
        weights: "embed" copies them; "reference" writes how each is made from the checkpoint's
            files, which have to stay, or from seeds.

    Raises:
        UsageError: ``path`` is a file, or weights that can only be embedded are to be referred to.
        EngineError: it cannot be written (a full disk, no permission).
    """
    from safetensors import SafetensorError  # what its writer makes of an OSError

    check_form(weights)
    try:
        references = References.of(image.weights) if weights == "reference" else None
        with atomic_folder(path) as folder:
            _fill(image, folder, references)
    except (OSError, SafetensorError) as error:
        raise EngineError(
            f"engine folder {path}",
            expected="a place to write to",
            found=f"{type(error).__name__}: {error}",
            remedy="Free space or choose another folder; what was there before is untouched.",
        ) from error


def check_form(weights: str) -> None:
    """UsageError for a way to save weights that does not exist."""
    if weights not in WEIGHT_FORMS:
        raise UsageError(
            "option weights",
            expected=f"one of {', '.join(WEIGHT_FORMS)}",
            found=repr(weights),
            remedy="Choose one of those.",
        )


def load_image(path: str | Path, checkpoint: str | Path | None = None) -> EngineImage:
    """Reads an engine folder back, every file's hash checked.

    Args:
        path: of the folder.
        checkpoint: where the checkpoint is that the engine refers to, if it has been moved.

    Raises:
        EngineError: no engine, another format version, or a file, be it of the checkpoint, that is
            missing, added or changed.
        UsageError: a checkpoint for an engine that refers to none.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    try:
        _check_hashes(folder, manifest)
        _warn_of_versions(folder, manifest)
        return _read_image(folder, manifest, checkpoint)
    except (AssertionError, LookupError, TypeError, ValueError, OSError) as error:
        raise _refused(
            folder,
            "what this version writes",
            f"{type(error).__name__}: {error}",
            "Compile the model again with this version.",
        ) from error


def _read_image(
    folder: Path, manifest: Mapping[str, Json], checkpoint: str | Path | None
) -> EngineImage:
    listed = manifest["files"]
    assert isinstance(listed, dict)
    artifacts = _strings(manifest["artifacts"])
    if foreign := sorted(set(artifacts) - set(listed)):
        raise ValueError(f"{foreign[0]} is used, but has no hash")
    lm, signature = manifest["lm"], manifest["signature"]
    if isinstance(lm, dict) == isinstance(signature, dict):
        raise ValueError("an engine is a causal LM or a module")
    return EngineImage(
        str(manifest["name"]),
        "causal_lm" if lm else "module",
        str(manifest["target"]),
        str(manifest["backend"]),
        Program.from_json(json.loads((folder / "program.json").read_text(encoding="utf-8"))),
        {name: (folder / name).read_bytes() for name in artifacts},
        _read_weights(folder, checkpoint),
        _read_graphs(folder / "graphs"),
        json.loads((folder / "report.json").read_text(encoding="utf-8")),
        _read_lm(lm) if isinstance(lm, dict) else None,
        _read_signature(signature) if isinstance(signature, dict) else None,
        Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None,
        _read_decode(folder),
    )


def _read_decode(folder: Path) -> DecodePart | None:
    path = folder / DECODE
    if not path.exists():
        return None
    program = Program.from_json(json.loads(path.read_text(encoding="utf-8")))
    return DecodePart(program, _read_graphs(folder / "graphs" / "decode"))


def _read_graphs(folder: Path) -> tuple[tuple[str, str], ...]:
    return tuple(
        (path.stem.split("-", 1)[1], path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.txt"))
    )


def _write_graphs(graphs: Sequence[tuple[str, str]], folder: Path) -> None:
    folder.mkdir()
    for index, (name, text) in enumerate(graphs):
        (folder / f"{index:03d}-{name}.txt").write_text(text, encoding="utf-8")


def _fill(image: EngineImage, folder: Path, references: References | None) -> None:
    (folder / "program.json").write_text(
        json.dumps(image.program.to_json(), indent=1), encoding="utf-8"
    )
    (folder / "report.json").write_text(json.dumps(dict(image.report), indent=1), encoding="utf-8")
    _write_graphs(image.graphs, folder / "graphs")
    if image.decode is not None:
        text = json.dumps(image.decode.program.to_json(), indent=1)
        (folder / DECODE).write_text(text, encoding="utf-8")
        _write_graphs(image.decode.graphs, folder / "graphs" / "decode")
    for name, content in image.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if references is None:
        _write_weights(image, folder / "weights")
    else:
        _write_references(references, folder)
    if image.tokenizer is not None:
        image.tokenizer.save(folder)
    written = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = {p.relative_to(folder).as_posix(): sha for p, sha in sha256_files(written).items()}
    manifest = _manifest(image, hashes)
    manifest["self"] = _digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _write_weights(image: EngineImage, folder: Path) -> None:
    """Shards of at most SHARD_BYTES, one in memory at a time."""
    folder.mkdir()
    shard: dict[str, torch.Tensor] = {}
    size, count = 0, 0
    for name, weight in image.weights.items():
        tensor = weight.load()
        if shard and size + tensor.nbytes > SHARD_BYTES:
            _write_shard(shard, folder / f"{count:05d}.safetensors")
            shard, size, count = {}, 0, count + 1
        # A copy: safetensors refuses tensors that share memory, as tied and sliced ones may.
        shard[name] = tensor.clone()
        size += tensor.nbytes
    _write_shard(shard, folder / f"{count:05d}.safetensors")


def _write_references(references: References, folder: Path) -> None:
    text = json.dumps(references.to_json(), indent=1)
    (folder / REFERENCES).write_text(text, encoding="utf-8")
    if references.held:
        _write_shard({name: t.clone() for name, t in references.held.items()}, folder / HELD)


def _write_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    path.touch()  # with the mode that the user's umask gives; safetensors alone makes it private
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)


def _manifest(image: EngineImage, hashes: Mapping[str, str]) -> dict[str, Json]:
    signature = image.signature
    return {
        "format": FORMAT_VERSION,
        "tilewright": __version__,
        "torch": torch.__version__,
        "name": image.name,
        "target": image.target,
        "backend": image.backend,
        "lm": None if image.lm is None else _lm_data(image.lm),
        "signature": None
        if signature is None
        else {
            "call": to_json(signature.call),
            "arguments": list(signature.arguments),
            "output": to_json(signature.output),
            "paths": list(signature.paths),
            "ranges": _ranges(signature),
        },
        "artifacts": [*sorted(image.files)],
        "files": dict(hashes),
    }


def _ranges(signature: Signature) -> list[Json]:
    return [[symbol, least, greatest] for symbol, least, greatest in signature.ranges]


def _read_manifest(folder: Path) -> dict[str, Json]:
    path = folder / MANIFEST
    if not path.is_file():
        found = "a folder without manifest.json" if folder.is_dir() else "nothing"
        raise _refused(
            folder, "an engine folder", found, "Make one with: tilewright compile MODEL -o DIR."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _refused(path, "JSON", str(error), "Compile the model again.") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise _refused(
            path,
            f"engine format {FORMAT_VERSION}",
            f"format {version}",
            "Compile the model again with this version, or use the version that made it.",
        )
    wanted = {"name", "target", "backend", "lm", "signature", "artifacts", "files", "torch"}
    digest = manifest.pop("self", None)
    if digest != _digest(manifest):
        raise _refused(path, "the manifest as it was written", "a changed one", "Compile again.")
    if missing := wanted - set(manifest):
        raise _refused(path, "all fields", f"no {sorted(missing)}", "Compile the model again.")
    fields: dict[str, Json] = manifest
    return fields


def _warn_of_versions(folder: Path, manifest: Mapping[str, Json]) -> None:
    """Another torch or Tilewright may compute differently: said once, and not refused."""
    for name, here in (("torch", torch.__version__), ("tilewright", __version__)):
        if manifest.get(name) != here:
            warnings.warn(
                f"{folder} was compiled with {name} {manifest.get(name)}, and runs with {here}; "
                "tilewright verify compares its numbers with the reference",
                stacklevel=4,
            )


def _digest(manifest: Mapping[str, Json]) -> str:
    """Of the manifest without its own digest, whatever its layout."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_hashes(folder: Path, manifest: Mapping[str, Json]) -> None:
    files = manifest["files"]
    assert isinstance(files, dict)
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    remedy = "Restore the file, or compile the model again."
    if missing := sorted(set(files) - there):
        raise _refused(folder / missing[0], "a file of the engine", "nothing", remedy)
    if foreign := sorted(there - set(files) - {MANIFEST}):
        raise _refused(
            folder / foreign[0], "files that the manifest lists", "another", "Remove it."
        )
    hashes = sha256_files(folder / name for name in files)
    for name, expected in files.items():
        if (found := hashes[folder / name]) != expected:
            raise _refused(folder / name, f"sha256 {expected}", found, remedy)


def _read_weights(folder: Path, checkpoint: str | Path | None) -> Mapping[str, LoadableWeight]:
    from ..formats.safetensors import SafetensorsCheckpoint

    if (folder / REFERENCES).is_file():
        held: dict[str, torch.Tensor] = {}
        if (folder / HELD).is_file():
            kept = SafetensorsCheckpoint(folder / HELD)
            held = {name: kept.tensor(name).load() for name in kept.names()}
        data = json.loads((folder / REFERENCES).read_text(encoding="utf-8"))
        return References.from_json(data, held).weights(checkpoint)
    if checkpoint is not None:
        raise UsageError(
            f"checkpoint {checkpoint}",
            expected="none: the engine holds its weights",
            found="one",
            remedy="Leave it out.",
        )
    return dict(_stored_weights(folder))


def _stored_weights(folder: Path) -> Iterator[tuple[str, LoadableWeight]]:
    from ..formats.safetensors import SafetensorsCheckpoint

    for path in sorted(folder.glob("weights/*.safetensors")):
        checkpoint = SafetensorsCheckpoint(path)
        for name in checkpoint.names():
            yield name, checkpoint.tensor(name)


def _lm_data(config: LMConfig) -> dict[str, Json]:
    data: dict[str, Json] = asdict(config)
    del data["batching"]  # as whoever loads it likes
    return data


def _read_lm(data: Mapping[str, Json]) -> LMConfig:
    eos = data["eos_token_ids"]
    assert isinstance(eos, list)
    numbers = {k: int(str(data[k])) for k in _LM_INTS}
    kv_cache: Literal["paged", "slot"] = "slot" if data["kv_cache"] == "slot" else "paged"
    return LMConfig(
        **numbers,
        kv_cache=kv_cache,
        eos_token_ids=tuple(int(str(i)) for i in eos),
        memory_fraction=float(str(data["memory_fraction"])),
        # An older engine says nothing of these.
        prefix_caching=data.get("prefix_caching") is not False,
        swap_space=float(str(data.get("swap_space", 0.0))),
        batching="auto",
    )


_LM_INTS = ("vocab_size", "max_model_len", "max_batch_size", "page_size")


def _read_signature(data: Mapping[str, Json]) -> Signature:
    return Signature(
        from_json(data["call"]),
        tuple(_strings(data["arguments"])),
        from_json(data["output"]),
        tuple(_strings(data["paths"])),
        tuple(_range(entry) for entry in _list(data["ranges"])),
    )


def _range(data: Json) -> tuple[str, int, int | None]:
    name, least, greatest = _list(data)
    return str(name), int(str(least)), None if greatest is None else int(str(greatest))


def _list(data: Json) -> list[Json]:
    assert isinstance(data, list)
    return data


def _strings(data: Json) -> list[str]:
    return [str(item) for item in _list(data)]


def _refused(path: Path, expected: str, found: str, remedy: str) -> EngineError:
    return EngineError(str(path), expected=expected, found=found, remedy=remedy)
