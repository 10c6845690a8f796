"""The ONNX Runtime backend: maximal convertible regions as ONNX models, the rest eager."""
