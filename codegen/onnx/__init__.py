"""The ONNX Runtime backend: maximal convertible regions of a graph as ONNX models, the rest eager."""
