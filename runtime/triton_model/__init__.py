"""The models of a Triton repository, as Triton's Python backend runs them."""
