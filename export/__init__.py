"""A checkpoint in, a bundle out: sources, layout, quantizers, graphs, pipeline."""
