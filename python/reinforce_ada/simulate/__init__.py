"""Plan a run before paying for it: the real sampler on a virtual clock, with models of the engine and of the prompts."""
