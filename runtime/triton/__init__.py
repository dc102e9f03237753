"""What a model repository of Triton Inference Server consists of; no module of Triton is needed."""
