"""Offline quantization: checkpoints in, calibrated NVFP4 checkpoints out."""
