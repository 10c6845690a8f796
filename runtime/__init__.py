"""Turns a compiled engine into text: KV pool, scheduler, sampling, the step loop."""

from __future__ import annotations

from .counters import Counters
from .loop import GenerationLoop
from .output import Completion, Delta, Timings, TokenLogprobs, Usage
from .params import SamplingParams
from .pool import KVPool, PagedPool
from .sampling import Sampler
from .scheduler import Scheduler
from .slot_pool import SlotPool
from .step import Capabilities, Step, StepExecutor
from .structured import StructuredOutputsParams

__all__ = [
    "Capabilities",
    "Completion",
    "Counters",
    "Delta",
    "GenerationLoop",
    "KVPool",
    "PagedPool",
    "Sampler",
    "SamplingParams",
    "Scheduler",
    "SlotPool",
    "Step",
    "StepExecutor",
    "StructuredOutputsParams",
    "Timings",
    "TokenLogprobs",
    "Usage",
]
