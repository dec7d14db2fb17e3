"""Scoring a model on benchmarks, item by item, with lm-eval's numbers.

tasks      lm-eval tasks by name, their data found (task_data) and their documents numbered
requests   what a task asks of a model, as token sequences that equal those of lm-eval's HFLM
layout     those sequences as prefix trees in batches that stay the same for a whole run
scorer     log-likelihoods and generations of a resident model
backends   who answers: native (the scorer), hf (lm-eval's HFLM), vllm (lm-eval's VLLM on a live engine)
evaluator  per-item values of every metric
groups     what a group of tasks scores as a whole
scores     what is kept: per-item values, their sum, and its standard error (no torch)
splits     which items steer, choose, and report (no torch)
"""
