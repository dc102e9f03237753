"""What a model repository does where it will run: builds its TensorRT engines."""
