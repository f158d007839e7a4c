"""The trainer: one process, AdamW, a byte-level OLMoE-architecture model, a Hugging Face checkpoint at the end.

What a step computes is a function of the weights, the seed and the step's number. Here are the model, data, schedule,
training state, evaluation and export; never Ray, terminals or argument parsing. Begin at `loop.train` and
`config.TrainConfig`; this file imports neither, so that reading a configuration does not import torch.
"""
