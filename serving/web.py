"""The page at `/`: a chat and live figures, in one file that fetches nothing from elsewhere."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from ..version import __version__
from .service import Service

# Beside the policy of content: nobody may frame the page, guess at types, or learn where it is.
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def add_page(app: FastAPI, service: Service) -> None:
    """Adds the page, and the figures that it shows, to an app."""
    text, policy = page()
    headers = {**_HEADERS, "Content-Security-Policy": policy, "Cache-Control": "no-cache"}

    # HEAD is how Ollama's clients find out whether a server is there.
    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def root(_: Request) -> Response:
        return HTMLResponse(text, headers=headers)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        """The figures of the page; sums are of the server's life, seconds of its clock."""
        return figures(service)


def page() -> tuple[str, str]:
    """The page as HTML text, and the Content-Security-Policy that lets it do what it does: run its
    own script, and talk to its own server. Text never becomes markup in it (trusted types).
    """
    from jinja2 import Environment, StrictUndefined

    folder = files(__package__) / "page"
    markup, style, script = (
        (folder / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")
    )
    template = Environment(undefined=StrictUndefined, autoescape=False).from_string(markup)
    policy = {
        "default-src": "'none'",
        "script-src": _source(script),
        "style-src": _source(style),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    text = template.render(style=style, script=script)
    return text, "; ".join(f"{name} {value}" for name, value in policy.items())


def _source(text: str) -> str:
    """What allows an element of this text, and no other."""
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def figures(service: Service) -> dict[str, Any]:
    """What the server does at this moment, and has done so far."""
    metrics = service.engine.metrics
    of = metrics.loop.counters
    return asdict(metrics.occupancy()) | {
        "version": __version__,
        "draining": service.draining,
        "uptime": service.uptime,
        "max_model_len": service.engine.config.max_model_len,
        "held": service.worker.active,
        "most_held": service.rules.most_requests,
        "generated_tokens": of.sampled_tokens,
        "prompt_tokens": of.prefix.lookup_tokens,
        "cached_tokens": of.prefix.hit_tokens,
    }
