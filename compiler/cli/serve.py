"""``tilewright serve``: an engine or a model, over HTTP."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UsageError
from ...settings import API_KEY, current
from .console import progress
from .options import (
    BackendOption,
    CheckpointOption,
    ContextOption,
    EngineOrModel,
    SinksOption,
    WindowOption,
    check_model,
    open_causal_lm,
)

if TYPE_CHECKING:
    from ...serving.encoder import Encoder
    from ..registered import Chosen

_AT_ONCE = 32  # sequences, of a model that is compiled for this

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")]
Port = Annotated[
    int, typer.Option(help="Port to listen on; 0: any that is free.", min=0, max=65535)
]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--served-model-name", help="Name that clients use; may be repeated.", show_default=False
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-keys",
        metavar="FILE",
        help=f"Keys that clients must send, one a line; {API_KEY.name} holds one too.",
        show_default=False,
    ),
]
PerMinute = Annotated[
    int | None, typer.Option("--rate-limit", help="Requests a minute of one key.", min=1)
]
AtOnce = Annotated[
    int | None, typer.Option("--concurrency-limit", help="Requests at once of one key.", min=1)
]
MostRequests = Annotated[
    int, typer.Option("--max-requests", help="Held at once; more are answered with 429.", min=1)
]
Batch = Annotated[
    int | None, typer.Option("--max-batch-size", help="Sequences at once.", show_default="32")
]
Timeout = Annotated[
    float | None, typer.Option(help="Seconds that an answer may take; it is cut then.")
]


def serve(
    engine: EngineOrModel,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    served_model_name: Names = None,
    api_keys: KeyFile = None,
    rate_limit: PerMinute = None,
    concurrency_limit: AtOnce = None,
    max_requests: MostRequests = 1024,
    timeout: Timeout = None,
    max_batch_size: Batch = None,
    backend: BackendOption = "auto",
    max_model_len: ContextOption = None,
    window: WindowOption = None,
    sinks: SinksOption = 4,
    checkpoint: CheckpointOption = None,
) -> None:
    """Serve ENGINE over HTTP, as OpenAI's and Ollama's clients expect it; the folder of an encoder
    answers /v1/embeddings.
    """
    keys = _keys(api_keys)
    if timeout is not None and timeout <= 0:
        raise UsageError(
            "option --timeout",
            expected="a number of seconds above 0",
            found=str(timeout),
            remedy="Raise it, or leave it out.",
        )
    try:
        from ...runtime.collector import freeze
        from ...serving.access import Limits
        from ...serving.app import make_app
        from ...serving.embeddings import make_embedding_app
        from ...serving.server import Server, address, allow_connections, bind
        from ...serving.service import Rules
    except ModuleNotFoundError as error:
        raise UsageError(
            "tilewright serve",
            expected="fastapi, uvicorn and httptools",
            found=f"no {error.name}",
            remedy="Install them: pip install 'tilewright[serve]'.",
        ) from error

    from ..encoders import is_encoder

    allow_connections()
    bound = bind(host, port)  # before minutes of work, not after them
    chosen = check_model(engine)
    rules = Rules(
        models=tuple(served_model_name or [chosen.short]),
        keys=keys,
        limits=Limits(rate_limit, concurrency_limit),
        most_requests=max_requests,
        deadline=timeout,
        catalog=chosen.catalog(),
    )
    named = bool(served_model_name or chosen.name)
    page = ""
    if is_encoder(chosen.path):
        _refuse_lm_options(chosen, max_batch_size, max_model_len, checkpoint, window)
        encoder = _open_encoder(chosen.path, backend)
        rules = rules if named else replace(rules, models=(encoder.facts.name,))
        app = make_embedding_app(encoder, rules)
    else:
        loaded = open_causal_lm(
            engine,
            backend=backend,
            max_model_len=max_model_len,
            max_batch_size=max_batch_size or _AT_ONCE,
            checkpoint=checkpoint,
            window=window,
            sinks=sinks,
        )
        loaded.warm_up()
        freeze()
        rules = rules if named else replace(rules, models=(loaded.image.name,))
        app, page = make_app(loaded, rules), f" and a page at {address(bound)}"
    where = f"{rules.models[0]} on {address(bound)}/v1{page}"
    announce = partial(print, f"serving {where} (Ctrl-C ends it)", flush=True)
    Server(app, announce).run(sockets=[bound])


def _open_encoder(path: str, backend: str) -> Encoder:
    from ..encoders import open_encoder

    with progress(f"compile {Path(path).name}") as advance:
        return open_encoder(path, backend, advance)


def _refuse_lm_options(
    chosen: Chosen,
    max_batch_size: int | None,
    max_model_len: int | None,
    checkpoint: Path | None,
    window: int | None,
) -> None:
    given: dict[str, object] = {"max-batch-size": max_batch_size, "max-model-len": max_model_len}
    given |= {"checkpoint": checkpoint, "window": window}
    preset = chosen.manifest is not None and chosen.manifest.quantize
    said = [f"--{name}" for name, value in given.items() if value is not None]
    said += [f"the scheme {preset}"] if preset else []
    if said:
        raise UsageError(
            f"{chosen.path} with {', '.join(said)}",
            expected="neither, for an encoder, which takes any batch of texts up to its longest",
            found=said[0],
            remedy="Leave it out.",
        )


def _keys(path: Path | None) -> tuple[str, ...]:
    keys = [current().api_key or ""]
    if path is not None:
        try:
            keys += path.read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"option --api-keys {path}",
                expected="a text file with a key a line",
                found=str(error),
                remedy="Write the keys into it.",
            ) from error
    found = tuple(key.strip() for key in keys if key.strip())
    if path is not None and not found:
        raise UsageError(
            f"option --api-keys {path}",
            expected="a key a line",
            found="none",
            remedy="Write the keys into it, or leave it out to serve anybody.",
        )
    return found
