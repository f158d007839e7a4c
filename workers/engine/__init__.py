"""The engine of one worker: which tokens run in a step, where their KV lives, and which token comes next.

`blocks`, `sequence` and `scheduler` are pure and free of torch, so that they can be tested by the million;
`sampler` and `engine` use torch. Nothing here knows sockets, Ray, text or the model's insides.
"""
