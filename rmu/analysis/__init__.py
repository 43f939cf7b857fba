"""What unlearning does inside a model, and what it does not withstand.

One module an analysis, each a function that measures one model (or a pair) and returns a pandas table: see ``docs/analysis.md``.
"""
