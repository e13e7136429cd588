"""What an exported model is worth: answers that can be checked, and the likelihood of a corpus."""
