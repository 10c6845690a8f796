"""``tilewright generate``: text from a prompt, as it comes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UsageError
from .console import note, print_json
from .generate_options import (
    BeamsOption,
    ChatOption,
    ChoiceOption,
    GrammarOption,
    JsonSchemaOption,
    LengthPenaltyOption,
    LogprobsOption,
    PromptLogprobsOption,
    RegexOption,
    StopTokensOption,
    check_beams,
    form_of,
    preset_params,
)
from .options import (
    BackendOption,
    CheckpointOption,
    ContextOption,
    EngineOrModel,
    JsonOption,
    SinksOption,
    TraceOption,
    WindowOption,
    check_model,
    check_places,
    open_causal_lm,
    traced,
)

if TYPE_CHECKING:
    from ...runtime.beams import BeamCompletion
    from ...runtime.engine import CausalLMEngine
    from ...runtime.output import Completion
    from ...runtime.params import SamplingParams
    from ...serving.registry.manifest import Preset


def generate(
    context: typer.Context,
    engine: EngineOrModel,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    chat: ChatOption = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Fewest tokens with this much probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="This many of the likeliest tokens; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="-2 to 2.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="-2 to 2.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    min_new_tokens: Annotated[int, typer.Option(help="No stop before this many.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be repeated.")] = None,
    stop_token_ids: StopTokensOption = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end.")] = False,
    seed: Annotated[int | None, typer.Option(help="For the same text each time.")] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Completions of the prompt.")] = 1,
    logprobs: LogprobsOption = None,
    prompt_logprobs: PromptLogprobsOption = None,
    json_schema: JsonSchemaOption = None,
    regex: RegexOption = None,
    grammar: GrammarOption = None,
    choice: ChoiceOption = None,
    beams: BeamsOption = None,
    length_penalty: LengthPenaltyOption = 1.0,
    backend: BackendOption = "auto",
    max_model_len: ContextOption = None,
    window: WindowOption = None,
    sinks: SinksOption = 4,
    checkpoint: CheckpointOption = None,
    trace: TraceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Complete PROMPT with ENGINE, streaming the text."""
    from ...runtime.params import SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stop=stop or (),
        stop_token_ids=stop_token_ids or (),
        ignore_eos=ignore_eos,
        seed=seed,
        n=n,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        structured_outputs=form_of(json_schema, regex, grammar, choice),
    )
    preset = check_model(engine).preset
    params = preset_params(params, preset, context)
    if beams is not None:
        check_beams(params)
    text = _text(prompt)
    check_places({"trace": trace})
    loaded = open_causal_lm(
        engine,
        backend=backend,
        max_model_len=max_model_len,
        max_batch_size=max(n, beams or 1),
        checkpoint=checkpoint,
        window=window,
        sinks=sinks,
    )
    token_ids = _encode(loaded, text, chat, system, preset)
    with traced(loaded, trace):
        if beams is not None:
            _search(loaded, token_ids, beams, length_penalty, max_new_tokens, as_json)
        else:
            _print(loaded, token_ids, params, as_json)


def _text(prompt: str) -> str:
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError(
            "prompt",
            expected="text",
            found="an empty prompt",
            remedy="Write the prompt as the second argument, or - and pipe it in.",
        )
    return text


def _print(
    engine: CausalLMEngine, token_ids: list[int], params: SamplingParams, as_json: bool
) -> None:
    if as_json:
        print_json(_as_data(engine.generate([token_ids], params), token_ids))
    elif params.n > 1:
        _print_all(engine.generate([token_ids], params))
    else:
        _stream(engine, token_ids, params)


def _encode(
    engine: CausalLMEngine, text: str, chat: bool | None, system: str | None, preset: Preset
) -> list[int]:
    tokenizer = engine.tokenizer
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    if chat or (chat is None and has_template):
        said = preset.system if system is None else system
        messages = [{"role": "system", "content": said}] if said else []
        messages.append({"role": "user", "content": text})
        return engine.chat_prompt(messages, **preset.template_options)
    if system is not None:
        raise UsageError(
            "option --system",
            expected="a chat, which a system message belongs to",
            found="--no-chat" if chat is False else "a model without a chat template",
            remedy="Leave --system out, or put its text into the prompt.",
        )
    if tokenizer is None:
        raise UsageError(
            f"engine {engine.image.name}",
            expected="a tokenizer, for text",
            found="none",
            remedy="Compile from a folder with tokenizer.json, or from a GGUF file.",
        )
    return tokenizer.encode(text)


def _stream(engine: CausalLMEngine, token_ids: list[int], params: SamplingParams) -> None:
    before = engine.counters
    prefill, decode = before.prefill_seconds, before.decode_seconds
    count = 0
    for delta in engine.stream(token_ids, params):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
        count += len(delta.token_ids)
    sys.stdout.write("\n")
    sys.stdout.flush()
    after = engine.counters
    seconds = after.decode_seconds - decode
    rate = f", {(count - 1) / seconds:.1f} tok/s" if count > 1 and seconds > 0 else ""
    note(
        f"{len(token_ids)} prompt tokens in {after.prefill_seconds - prefill:.2f} s, "
        f"{count} new tokens{rate}"
    )


def _search(
    engine: CausalLMEngine,
    token_ids: list[int],
    beams: int,
    length_penalty: float,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    found: list[BeamCompletion] = engine.beam_search(
        [token_ids],
        beam_width=beams,
        max_new_tokens=max_new_tokens,
        length_penalty=length_penalty,
    )[0]
    if as_json:
        completions = [asdict(one) for one in found]
        print_json({"prompt_token_ids": token_ids, "completions": completions})
        return
    for index, one in enumerate(found):
        print(f"--- {index + 1} of {len(found)} ({one.finish_reason}, score {one.score:.3f})")
        print(one.text)


def _print_all(completions: list[Completion]) -> None:
    for index, completion in enumerate(completions):
        print(f"--- {index + 1} of {len(completions)} ({completion.finish_reason})")
        print(completion.text)


def _as_data(completions: list[Completion], token_ids: list[int]) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "prompt_token_ids": token_ids,
        "completions": [
            {
                "text": one.text,
                "token_ids": one.token_ids,
                "finish_reason": one.finish_reason,
                "logprobs": None if one.logprobs is None else [asdict(p) for p in one.logprobs],
                "prompt_logprobs": None
                if one.prompt_logprobs is None
                else [None if p is None else asdict(p) for p in one.prompt_logprobs],
                "usage": asdict(one.usage),
                "ttft_seconds": one.timings.ttft,
                "tpot_seconds": one.timings.tpot,
                "queue_seconds": one.timings.queue,
                "e2e_seconds": one.timings.e2e,
                "preemptions": one.timings.preemptions,
            }
            for one in completions
        ],
    }
