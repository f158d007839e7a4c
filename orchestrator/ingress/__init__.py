"""The OpenAI-compatible HTTP front: text in and out, admission, routing to workers, recovery of lost streams.

Everything that is text lives here (tokenizer, chat template, stop strings); workers see token ids only. ``import
ray`` appears only in ``deployment``; placement, pages and generations never appear here.
"""
