"""Evaluation of exported models: pass@k on benchmarks with verifiable answers, and negative log-likelihood on a corpus."""
