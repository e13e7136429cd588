"""Exported models measured: verifiable answers, and the likelihood of a corpus."""
