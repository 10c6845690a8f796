"""HTTP over the runtime: what OpenAI's clients expect of a server. `tilewright serve` starts it."""
