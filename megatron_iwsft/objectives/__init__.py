"""SFT, iw-SFT, DFT, PSFT and custom objectives: log-probs in, a loss and summed metrics out."""
