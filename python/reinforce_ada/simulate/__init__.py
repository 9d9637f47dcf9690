"""The simulator, which plans a run before it is paid for: the real sampler on a virtual clock, with models of engine and prompts."""
