"""A detector as one graph that runs without this package: ONNX, torch.export, OpenVINO."""
