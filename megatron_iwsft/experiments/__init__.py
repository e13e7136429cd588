"""The paper's experiments outside language modelling."""
