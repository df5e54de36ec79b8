"""Which plans can run and fit, how fast each is here, and which one to run."""
