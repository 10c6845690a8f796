"""Quantization schemes, one file each, and the table of them."""

from __future__ import annotations

from dataclasses import replace

from ...errors import UnsupportedError, UsageError
from ...targets import Target
from . import fp8, fp8_block, fp8_tensor, fp8_weight, int4, int8, int8_weight
from .base import Linear, Nodes, Parts, Scheme
from .config import METHODS, STORED, QuantConfig

SCHEMES: dict[str, Scheme] = {
    module.SCHEME.name: module.SCHEME
    for module in (int8_weight, int8, fp8, fp8_tensor, fp8_block, fp8_weight, int4)
}
"""Every scheme by name."""


def resolve_config(
    quantize: str | QuantConfig, target: Target | None = None, also: tuple[str, ...] = ()
) -> QuantConfig:
    """The configuration with the scheme's own group and method filled in.

    Args:
        quantize: the name of a scheme, or a configuration.
        target: the device to compute on; None for any.
        also: what else is valid where this is called, for the message of an error.

    Raises:
        UsageError: a scheme, group, method or number that is not valid; it lists those that are.
        UnsupportedError: a scheme that the device has no units for; it lists those it can have.
    """
    config = QuantConfig(quantize) if isinstance(quantize, str) else quantize
    if not isinstance(config, QuantConfig) or config.scheme not in SCHEMES:
        found = config.scheme if isinstance(config, QuantConfig) else config
        raise _wrong("quantize", found, (*SCHEMES, *also, "QuantConfig(…)", "None"))
    scheme = SCHEMES[config.scheme]
    if config.group is not None and config.group not in scheme.groups:
        raise _wrong(f"group of {scheme.name}", config.group, tuple(map(str, scheme.groups)))
    if config.method is not None and config.method not in scheme.methods:
        raise _wrong(f"method of {scheme.name}", config.method, scheme.methods)
    if not config.symmetric and not scheme.asymmetric:
        raise _wrong(f"symmetric of {scheme.name}", False, ("True",))
    if config.compute not in scheme.computes:
        raise _wrong(f"compute of {scheme.name}", config.compute, scheme.computes)
    if isinstance(config.skip, str):
        raise _wrong("QuantConfig.skip", config.skip, ("a tuple of patterns",))
    for name in ("tokens", "seed", "report_tokens"):
        value = getattr(config, name)
        if type(value) is not int or value < (name != "seed"):
            raise _wrong(f"QuantConfig.{name}", value, ("a positive integer",))
    if target is not None and not runs_on(scheme, target):
        raise UnsupportedError(
            f"quantize={scheme.name!r} on target {target.name}",
            expected="one of " + ", ".join(s.name for s in SCHEMES.values() if runs_on(s, target)),
            found=f"{scheme.name}, whose products compute in {scheme.rate}",
            remedy="Choose one of those; the ones with -weight keep activations as they are.",
        )
    return replace(
        config,
        group=scheme.groups[0] if config.group is None else config.group,
        method=config.method or scheme.methods[0],
        skip=tuple(config.skip),
    )


def runs_on(scheme: Scheme, target: Target) -> bool:
    """Whether a device computes in the scheme's element type; a CPU computes in any, slowly."""
    return target.is_cpu or scheme.rate is None or scheme.rate in dict(target.tflops)


def _wrong(option: str, found: object, valid: tuple[str, ...]) -> UsageError:
    return UsageError(
        f"option {option}",
        expected=f"one of {', '.join(valid)}",
        found=repr(found),
        remedy="Choose one of those.",
    )


__all__ = [
    "METHODS",
    "SCHEMES",
    "STORED",
    "Linear",
    "Nodes",
    "Parts",
    "QuantConfig",
    "Scheme",
    "resolve_config",
    "runs_on",
]
