"""Shapes of models that nothing has to be written for."""

from lowmem.artifact.config import ModelConfig

SEVEN_B = ModelConfig("mistral", 32000, 4096, 14336, 32, 32, 8, 128, 1e-5, 1e4, 32768, 4096)
