import engine.topology  # noqa: F401  decides on the accelerator before DeepSpeed is imported anywhere below
