"""Stage 3: real inputs become statistics, and with them graphs of FP16, BF16, INT8 and INT4."""
