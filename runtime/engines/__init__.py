"""Builds TensorRT engines of a bundle's graphs, and opens them; needs no onnx and no torch."""
