"""Rows and agreements between the workers of one generation, and expert parallelism on top of them.

Transports behind one interface (`base.Exchange`): one worker, one host (shared memory), many hosts (process
groups). Never here: the model, pages, Ray, or any decision about who is a member.
"""
