"""The demo's own material: a small model, WordNet corpora, general prose and evaluation tasks."""
