"""What lies on disk: config, contract, formats, manifest, tensors, verdicts."""
