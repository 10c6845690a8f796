"""Networks for TensorRT: described, lowered from the IR, and built."""
