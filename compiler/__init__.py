"""From a model to a compiled engine: capture, lowering to the IR, `compile()` and the CLI."""
