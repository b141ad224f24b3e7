"""Trained models as files for other programs: ONNX, and graphs of torch.export."""
