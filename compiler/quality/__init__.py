"""What quantization cost: perplexity, divergence, errors of layers, and the bytes it saved."""
