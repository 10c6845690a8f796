"""Rules: each ONNX op in torch calls, a file an op family; `table.RULES` has them all."""
