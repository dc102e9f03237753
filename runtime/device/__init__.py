"""What drives a GPU: memory, streams, events and captured graphs over cuda-python."""
