"""Engines: compiled models, ready to run. What `tw.compile` returns and `tw.load` reads back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from ..codegen.program import Json
from ..errors import EngineError, KernelError, UsageError
from ..formats.tokenizer import Tokenizer
from ..targets import Target, gpu_problem
from .beam_search import BeamSearcher
from .beams import BeamCompletion, BeamSearchParams
from .counters import Counters
from .executor import PagedExecutor, SlotExecutor
from .folder import load_image, save_engine
from .grammar import Grammars
from .image import EngineImage, LMConfig, Signature
from .loop import GenerationLoop
from .memory import pool_pages, prefill_tokens
from .output import Completion, Delta
from .params import SamplingParams
from .pool import KVPool, PagedPool, SlotPool
from .refit import refit, refit_refused
from .runner import ProgramRunner, bind_sizes
from .sampling import Sampler
from .scheduler import Scheduler
from .step import Step, StepExecutor
from .structure import Branch, flatten, rebuild
from .weights import LoadReport, place_weights

Prompts: TypeAlias = "str | Sequence[str] | Sequence[Sequence[int]]"


class Engine:
    """A compiled model, which can be saved. `load` and `tw.compile` make the right kind of it.

    One that was compiled for another device than this machine's is of this class itself.
    """

    def __init__(self, image: EngineImage) -> None:
        self.image = image

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Runs the model.

        Raises:
            EngineError: the engine is for another device.
        """
        check_device(self.image)
        raise AssertionError("engines for this device are of a subclass")

    @property
    def target(self) -> Target:
        """The device that it was compiled for."""
        return Target.parse(self.image.target)

    def save(self, path: str | Path, weights: str = "embed") -> None:
        """Writes the engine folder; one that is there already is replaced whole, or stays whole.

        Args:
            path: of the folder.
            weights: "embed" copies them into it; "reference" refers to the checkpoint that the
                model was compiled from, whose files have to stay as they are.

        Raises:
            EngineError: the folder cannot be written.
            UsageError: weights that are to be referred to, and that no file or seed backs.
        """
        save_engine(self.image, path, weights)

    def report(self) -> Mapping[str, Json]:
        """What compiling found: passes, calls by backend, what fell back and why."""
        return self.image.report


class RunningEngine(Engine):
    """An engine with its weights and kernels loaded.

    Attributes:
        weight_load: what loading the weights took.
        runner: of the Program that takes any input; ``decode_runner``: of the one for decode steps
            of a causal LM, None where there is none.

    Raises:
        EngineError: this machine does not have the device that it was compiled for.
        CapacityError: the weights do not fit the device.
    """

    def __init__(self, image: EngineImage) -> None:
        super().__init__(image)
        check_device(image)
        device = torch.device(self.target.device_type)
        if device.type == "cuda":  # the current one is another in each thread
            device = torch.device("cuda", torch.cuda.current_device())
        loaded = place_weights(image.weights, device)
        self.weight_load: LoadReport = loaded.report
        # A module's results are the user's, to write to and to differentiate behind.
        inside = image.kind == "causal_lm"
        read = image.files.__getitem__
        self.runner = ProgramRunner(
            image.program, loaded.tensors, read, device=device, inference=inside
        )
        self.decode_runner: ProgramRunner | None = None
        if image.decode is not None:
            self.decode_runner = ProgramRunner(
                image.decode.program, loaded.tensors, read, device=device, inference=inside
            )


class ModuleEngine(RunningEngine):
    """A compiled plain module: called like the module, gives what the module gives."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """The module's result for these arguments.

        Raises:
            UsageError: arguments of another structure, shape or element type than at compile time.
        """
        signature = self.image.signature
        assert signature is not None
        inputs = self._inputs(signature, args, kwargs)
        # Results are where the inputs are, as the module's would be.
        device = next((tensor.device for tensor in inputs.values()), self.runner.device)
        outputs = self.runner.run(inputs)
        return rebuild(signature.output, self._unshared(inputs, outputs.values(), device))

    def takes(self, *args: object, **kwargs: object) -> bool:
        """Whether these arguments have the structure, shapes and element types that the engine was
        compiled for.
        """
        signature = self.image.signature
        assert signature is not None
        try:
            self._inputs(signature, args, kwargs)
        except UsageError:
            return False
        return True

    def _inputs(
        self, signature: Signature, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> dict[str, torch.Tensor]:
        try:
            found = flatten(signature.call, _bound(signature, args, kwargs))
        except ValueError as error:
            raise UsageError(
                f"arguments of {self.image.name}",
                expected="the structure given at compile time",
                found=str(error),
                remedy="Call the engine as the module was called in example_inputs.",
            ) from error
        program = self.runner.program
        inputs = {program.inputs[i]: tensor for i, tensor in found.items()}
        sizes = bind_sizes(program, inputs)
        for symbol, least, greatest in signature.ranges:
            size = sizes.get(symbol, least)
            if size < least or (greatest is not None and size > greatest):
                raise self._out_of_range(symbol, least, greatest, size)
        return inputs

    def _out_of_range(self, symbol: str, least: int, greatest: int | None, size: int) -> UsageError:
        buffers = self.runner.program.buffers
        users = [n for n in self.runner.program.inputs if symbol in buffers[n].symbols]
        limits = f"{least} or more" if greatest is None else f"from {least} to {greatest}"
        return UsageError(
            f"size {symbol} of input {', '.join(map(repr, users))}",
            expected=f"{limits}, as dynamic_shapes and the module allow",
            found=str(size),
            remedy="Pass another size, or compile with a wider range in dynamic_shapes.",
        )

    def _unshared(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Iterable[torch.Tensor],
        device: torch.device,
    ) -> list[torch.Tensor]:
        """The outputs on ``device``, copied where they lie in memory of the engine, of an input or
        of another output: whoever gets a result may write to it.
        """
        taken = set(self._constants) | {x.untyped_storage().data_ptr() for x in inputs.values()}
        own = []
        for output in outputs:
            result = output.to(device)
            if result.untyped_storage().data_ptr() in taken:
                result = result.clone()
            taken.add(result.untyped_storage().data_ptr())
            own.append(result)
        return own

    @cached_property
    def _constants(self) -> frozenset[int]:
        held = self.runner.constants.values()
        return frozenset(tensor.untyped_storage().data_ptr() for tensor in held)


class CausalLMEngine(RunningEngine):
    """A compiled causal LM: continuous generation over a KV cache."""

    def __init__(self, image: EngineImage) -> None:
        super().__init__(image)
        assert image.lm is not None
        self.config: LMConfig = image.lm
        tokens = prefill_tokens(self.runner.program, self.config, self.runner.device)
        self.executor, self.pool = _memory(self.config, self.runner, self.decode_runner, tokens)
        scheduler = Scheduler(
            self.pool,
            self.executor.capabilities,
            max_prefill_tokens=tokens,
            max_num_seqs=self.config.max_batch_size,
        )
        eos, vocab = self.config.eos_token_ids, self.config.vocab_size
        grammars = Grammars(image.tokenizer, eos, vocab) if image.tokenizer else None
        self.loop = GenerationLoop(
            self.executor,
            self.pool,
            scheduler,
            Sampler(),
            image.tokenizer,
            eos,
            self.config.max_model_len,
            vocab,
            grammars,
        )

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None when it came without one."""
        return self.image.tokenizer

    @property
    def counters(self) -> Counters:
        """Tokens computed and steps run so far."""
        return self.loop.counters

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Logits f32[B, S, V] for token ids i64[B, S], or f32[S, V] for i64[S].

        Raises:
            UsageError: ids of another type, out of the vocabulary, or longer than the context.
            CapacityError: requests that are running leave no room in the KV memory.
        """
        rows = _rows(token_ids)
        if (
            rows.shape[1] > self.config.max_model_len
            or not 0 <= int(rows.min()) <= int(rows.max()) < self.config.vocab_size
        ):
            raise UsageError(
                "token_ids",
                expected=f"at most {self.config.max_model_len} ids "
                f"from 0 to {self.config.vocab_size - 1}",
                found=f"{rows.shape[1]} ids from {int(rows.min())} to {int(rows.max())}",
                remedy="Shorten the sequence, or compile with a larger max_model_len.",
            )
        with self.loop.lock:
            self.loop.settle()
            logits = torch.stack([score(self.executor, self.pool, row.long()) for row in rows])
        return logits[0] if token_ids.dim() == 1 else logits

    def generate(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Completions of the prompts, ``n`` of them a prompt, in order.

        Args:
            prompts: a str, several, or lists of token ids.
            params: for all prompts, or one each.

        Raises:
            UsageError: an empty prompt, one that is longer than the context, or text without a
                tokenizer.
            CapacityError: a prompt that can never fit the KV memory.
        """
        found = self.loop.generate([self._encode(prompt) for prompt in _listed(prompts)], params)
        return [completion for completions in found for completion in completions]

    def beam_search(
        self,
        prompts: Prompts,
        *,
        beam_width: int = 4,
        max_new_tokens: int = 256,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ) -> list[list[BeamCompletion]]:
        """The ``beam_width`` likeliest completions of each prompt, best first, by the rules of
        Hugging Face's ``generate(num_beams=…)``. Other requests wait meanwhile.

        Args:
            prompts: a str, several, or lists of token ids.
            beam_width, max_new_tokens, length_penalty, early_stopping: see ``BeamSearchParams``.

        Raises:
            UsageError: as ``generate``, or more beams than max_batch_size.
            CapacityError: the beams outgrow the KV memory.
        """
        params = BeamSearchParams(beam_width, max_new_tokens, length_penalty, early_stopping)
        searcher = BeamSearcher(self.loop, self.config.eos_token_ids, self.tokenizer)
        return searcher.search([self._encode(prompt) for prompt in _listed(prompts)], params)

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """The completion of one prompt as it comes; closing the iterator frees its memory."""
        return self.loop.stream(self._encode(prompt), params)

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat template.

        Raises:
            UsageError: the model has no tokenizer or no chat template, or messages of another
                form.
        """
        tokenizer = self._needs_tokenizer()
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise UsageError(
                    "messages",
                    expected="a list of {'role': …, 'content': …}",
                    found=repr(message)[:60],
                    remedy="Give each message its role (user, assistant, system) and its content.",
                )
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._needs_tokenizer().encode(prompt)
        if isinstance(prompt, Sequence):
            return [*prompt]
        raise _no_prompt(prompt)

    def _needs_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError(
                f"model {self.image.name}",
                expected="a tokenizer, for text",
                found="none",
                remedy="Pass token ids, or compile from files that include a tokenizer.",
            )
        return self.tokenizer


def score(executor: StepExecutor, pool: KVPool, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits f32[S, V] of every position of one sequence i64[S], computed in one step."""
    count = len(token_ids)
    pool.add(_SCORED)
    try:
        slots, _ = pool.append(_SCORED, count)
        positions = torch.arange(count)
        lens = torch.tensor([count], dtype=torch.int32)
        starts = torch.tensor([0, count], dtype=torch.int32)
        tables = pool.block_tables([_SCORED])
        step = Step(token_ids, positions, starts, lens, torch.as_tensor(slots), tables, positions)
        # A copy: an executor may write the next step's logits to the same memory.
        return executor.run(step).to("cpu", copy=True)
    finally:
        pool.free(_SCORED)


_SCORED = -1  # requests number their sequences from 0


def load(path: str | Path, checkpoint: str | Path | None = None) -> Engine:
    """An engine from its folder, every file's hash checked. Runs no code from the folder.

    Args:
        path: of the folder.
        checkpoint: where the checkpoint is that the engine refers to (``save(…,
            weights="reference")``), if it has been moved; its files' hashes are checked too.

    Raises:
        EngineError: no engine, a damaged one, one made for another version or device, or a
            checkpoint that is missing or has changed.
        UsageError: a checkpoint for an engine that refers to none.
        CapacityError: the weights do not fit the device.
    """
    return start(load_image(path, checkpoint))


def start(image: EngineImage) -> Engine:
    """Loads weights and kernels of an image; EngineError when this machine cannot run it.

    Kernels for another GPU, and those that the driver does not take, are compiled here, with a
    warning, where Triton is installed.
    """
    image = refit(image)
    kind = CausalLMEngine if image.kind == "causal_lm" else ModuleEngine
    try:
        return kind(image)
    except KernelError as error:
        refused = error.with_traceback(None)  # whose frames hold the weights just loaded
    return kind(refit_refused(image, refused))


def runs_here(target: Target) -> bool:
    """Whether this machine has the device: any CPU, or a GPU of the same architecture."""
    return target.is_cpu or Target.detect().arch == target.arch


def check_device(image: EngineImage) -> None:
    """EngineError when this machine is not what the engine was compiled for."""
    target = Target.parse(image.target)
    if not runs_here(target):
        here = Target.detect()
        problem = gpu_problem()
        raise EngineError(
            f"engine {image.name}",
            expected=f"a {target.sm} device, which it was compiled for ({target.name})",
            found=f"{here.name} ({here.sm})" + (f": {problem}" if problem else ""),
            remedy=f"Run it on such a device, or compile with target={here.name!r}.",
        )


def _memory(
    config: LMConfig, runner: ProgramRunner, decode: ProgramRunner | None, tokens: int
) -> tuple[PagedExecutor | SlotExecutor, KVPool]:
    if config.kv_cache == "slot":
        pool = SlotPool(config.max_batch_size, config.max_model_len)
        return SlotExecutor(runner, config.max_batch_size), pool
    sizes = (config.max_batch_size, config.max_model_len, tokens)
    executor = PagedExecutor(runner, *sizes, decode=decode)
    programs = tuple(one.program for one in (runner, decode) if one is not None)
    page_bytes = executor.bytes_per_token * config.page_size
    pages = pool_pages(config, page_bytes, programs, runner.device, tokens)
    return executor, PagedPool(pages, config.page_size)


def _bound(
    signature: Signature, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The call as it was captured: keywords of parameters that were positional then are made
    positional.
    """
    call = signature.call
    assert isinstance(call, Branch)
    positional, named = (part for part in call.items)
    assert isinstance(positional, Branch) and isinstance(named, Branch)
    rest, bound = dict(kwargs), list(args)
    count = len(positional.items)
    names = signature.arguments[len(args) : count]
    bound.extend(rest.pop(name) for name in names if name in rest)
    rest.update(zip(signature.arguments[count:], bound[count:], strict=False))
    surplus = bound[max(count, len(signature.arguments)) :]
    return (*bound[:count], *surplus), rest


def _listed(prompts: Prompts) -> list[str | Sequence[int]]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise _no_prompt(prompts)
    return list(prompts)


def _no_prompt(found: object) -> UsageError:
    return UsageError(
        "the prompt",
        expected="text, or a list of token ids for each prompt",
        found=repr(found)[:60],
        remedy="For one prompt of token ids write generate([[1, 2, 3]]).",
    )


def _rows(token_ids: object) -> torch.Tensor:
    """Token ids as [B, S]; UsageError for all but integer tensors of one or two axes."""
    if isinstance(token_ids, torch.Tensor):
        rows = token_ids[None] if token_ids.dim() == 1 else token_ids
        if rows.dim() == 2 and rows.dtype in (torch.int64, torch.int32) and rows.numel():
            return rows
        found = f"{token_ids.dtype} {list(token_ids.shape)}"
    else:
        found = repr(token_ids)[:60]
    raise UsageError(
        "token_ids",
        expected="a tensor of integers [B, S] or [S], at least one token",
        found=found,
        remedy="Pass the ids that the tokenizer gives, as a tensor.",
    )
