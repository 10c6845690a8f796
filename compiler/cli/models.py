"""``tilewright models``: models by name, each of their files held once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import UsageError
from .console import note, out, print_json, progress
from .options import JsonOption
from .tables import facts_table, plain_table

if TYPE_CHECKING:
    from ...serving.registry.manifest import Manifest
    from ...serving.registry.names import ModelName
    from ...serving.registry.store import Entry

models_app = typer.Typer(
    help="Models by name. NAME stands wherever a verb takes MODEL; a path that exists goes first. "
    "A model is held by hard links where the file system allows, else by copies, under "
    "TILEWRIGHT_CACHE/models; the files that were added stay where they are.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="NAME[:TAG]", show_default=False)]
NameOption = Annotated[
    str | None,
    typer.Option(metavar="NAME[:TAG]", help="By default the file's or folder's.", show_default=""),
]
System = Annotated[
    str | None, typer.Option(help="System message of conversations without one of their own.")
]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--parameter",
        metavar="NAME=VALUE",
        help="Of the sampling, by default of requests: temperature, top_k, top_p, min_p, seed, "
        "num_predict, stop, repeat_penalty, presence_penalty, frequency_penalty; and num_ctx. "
        "May be repeated.",
        show_default=False,
    ),
]
TemplateOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--template-option",
        metavar="NAME=VALUE",
        help="What the chat template reads, such as enable_thinking=false. May be repeated.",
        show_default=False,
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(metavar="SCHEME", help="What it is compiled with.", show_default=False),
]
Verify = Annotated[bool, typer.Option("--verify", help="Hash its files, and compare.")]


@models_app.command("add")
def add(
    path: Annotated[
        Path, typer.Argument(help="A .gguf file or a Hugging Face folder.", show_default=False)
    ],
    name: NameOption = None,
    system: System = None,
    parameter: Parameters = None,
    template_option: TemplateOptions = None,
    quantize: Quantize = None,
    as_json: JsonOption = False,
) -> None:
    """Give the model at PATH a name, and say how it is to be asked."""
    from ...serving.registry.manifest import Preset
    from ...serving.registry.names import name_of_path, parse_name
    from ..registered import open_registry

    stem = path.stem if path.suffix.lower() == ".gguf" else path.resolve().name
    chosen = name_of_path(stem) if name is None else parse_name(name)
    preset = Preset(
        system,
        _pairs("--parameter", parameter, several="stop"),
        _pairs("--template-option", template_option),
    )
    with progress(f"add {path.name}") as advance:
        advance("hashing", 0.0)
        manifest = open_registry().add(path, chosen, preset, quantize)
    if as_json:
        print_json(_data(chosen, manifest))
    else:
        out().print(f"added {chosen}: {_size(manifest.size)}", markup=False)
        note(f"try: tilewright serve {chosen.short}")


@models_app.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """List what is registered."""
    from ..registered import open_registry

    entries = list(open_registry().entries())
    if as_json:
        print_json([_entry_data(entry) for entry in entries])
    elif entries:
        table = plain_table(("name", "id", "kind", "created", "size"), left=4)
        for entry in entries:
            table.add_row(*_row(entry))
        out().print(table)
    else:
        note("no models yet: tilewright models add PATH --name NAME")
    if any(entry.manifest is None for entry in entries):
        raise typer.Exit(1)


@models_app.command("show")
def show(name: Name, verify: Verify = False, as_json: JsonOption = False) -> None:
    """Show what NAME is made of and how it is asked; --verify exits with 1 if it is damaged."""
    from ...errors import CheckpointError
    from ...serving.registry.names import parse_name
    from ..registered import open_registry
    from .console import print_error

    registry, chosen = open_registry(), parse_name(name)
    manifest = registry.read(chosen)
    damage: CheckpointError | None = None
    if verify:
        try:
            with progress(f"verify {chosen}") as advance:
                advance("hashing", 0.0)
                registry.verify(manifest)
        except CheckpointError as error:
            damage = error
    if as_json:
        state = {"damage": None if damage is None else str(damage)} if verify else {}
        print_json(_data(chosen, manifest) | state)
    else:
        out().print(facts_table(_facts(chosen, manifest)))
    if damage is not None:
        print_error(damage)
        raise typer.Exit(1)


@models_app.command("copy")
def copy(source: Name, target: Name) -> None:
    """Give the model SOURCE another name too; no file is copied."""
    from ...serving.registry.names import parse_name
    from ..registered import open_registry

    open_registry().copy(parse_name(source), parse_name(target))


@models_app.command("remove")
def remove(name: Name, as_json: JsonOption = False) -> None:
    """Take NAME away, and the files that no other name needs."""
    from ...serving.registry.names import parse_name
    from ..registered import open_registry

    chosen = parse_name(name)
    freed = open_registry().remove(chosen)
    if as_json:
        print_json({"removed": str(chosen), "bytes": freed})
    else:
        out().print(f"removed {chosen}, and {_size(freed)} that nothing else needs", markup=False)


@models_app.command("prune")
def prune(as_json: JsonOption = False) -> None:
    """Remove files that no name needs, such as those sent to a server and never used."""
    from ..registered import open_registry

    freed = open_registry().prune()
    if as_json:
        print_json({"bytes": freed})
    else:
        out().print(f"removed {_size(freed)}", markup=False)


def _pairs(option: str, given: list[str] | None, several: str = "") -> dict[str, Any]:
    """NAME=VALUE as a dict; a value is JSON where it can be, else the text itself."""
    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UsageError(
                f"option {option}",
                expected="NAME=VALUE",
                found=repr(text[:80]),
                remedy="Write it so, e.g. temperature=0.2.",
            )
        if name == several:  # texts, whatever they look like
            found.setdefault(name, []).append(value)
            continue
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _entry_data(entry: Entry) -> dict[str, Any]:
    if entry.manifest is None:
        return {"name": str(entry.name), "damage": entry.damage}
    return _data(entry.name, entry.manifest)


def _data(name: ModelName, manifest: Manifest) -> dict[str, Any]:
    return {
        "name": str(name),
        "digest": manifest.digest,
        "checkpoint": manifest.checkpoint,
        "size": manifest.size,
        **manifest.to_json(),
    }


def _row(entry: Entry) -> tuple[str, ...]:
    found = entry.manifest
    if found is None:
        return (str(entry.name), "", "damaged", "", "")
    identity = found.digest.removeprefix("sha256:")[:12]
    return (str(entry.name), identity, found.kind, found.created[:10], _size(found.size))


def _facts(name: ModelName, manifest: Manifest) -> list[tuple[str, str]]:
    preset = manifest.preset
    facts = [("name", str(name)), ("kind", manifest.kind), ("size", _size(manifest.size))]
    facts += [("digest", manifest.digest), ("created", manifest.created)]
    facts += [("quantize", manifest.quantize)] if manifest.quantize else []
    facts += [("system", preset.system)] if preset.system is not None else []
    facts += [("parameter", f"{k}={json.dumps(v)}") for k, v in preset.parameters.items()]
    facts += [("template", f"{k}={json.dumps(v)}") for k, v in preset.template_options.items()]
    facts += [("file", f"{one.path}  {one.blob.digest}") for one in manifest.files]
    return facts


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
