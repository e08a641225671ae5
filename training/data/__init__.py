"""What there is to learn from: data files read, checked and labelled, before any model is loaded."""
