"""Stage 3: calibration to FP16 and INT8; empty until quantization lands."""
